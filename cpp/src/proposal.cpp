#include "ctrlora/proposal.h"

#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "detail/tensor_math.h"

namespace ctrlora {

namespace {

template <typename T>
std::vector<T> fields(const std::vector<Measurement>& parts, T Measurement::* field) {
  std::vector<T> out;
  out.reserve(parts.size());
  for (const Measurement& part : parts) {
    out.push_back(part.*field);
  }
  return out;
}

}  // namespace

Measurement Measurement::cat(const std::vector<Measurement>& parts) {
  if (parts.size() == 1) {
    return parts.front();
  }
  const auto joined = [&](at::Tensor Measurement::* field) { return detail::cat(parts, field); };
  return {SideProducts::cat(fields(parts, &Measurement::input)),
          SideProducts::cat(fields(parts, &Measurement::output)),
          SideMetric::cat(fields(parts, &Measurement::input_metric)),
          SideMetric::cat(fields(parts, &Measurement::output_metric)),
          joined(&Measurement::scaling),
          joined(&Measurement::momentum_factor),
          joined(&Measurement::radius),
          joined(&Measurement::direction_rms),
          joined(&Measurement::live),
          joined(&Measurement::absolute),
          joined(&Measurement::isotropic),
          parts.front().rounding};
}

namespace {

at::Tensor finite(const Quartic& norm) {  // (L) bool
  return (norm.c2 + norm.c3 + norm.c4).isfinite();
}

// f before the output ball cuts it.
at::Tensor planned_length(const Measurement& measured,
                          const Proposal& proposal,
                          const std::string& step_length) {
  if (step_length == "rms") {
    return measured.radius / measured.direction_rms;
  }
  at::Tensor full = measured.radius / proposal.output_norm.c2.clamp_min(0).sqrt();
  if (step_length == "radius") {
    return full;
  }
  // The minimum of the K-FAC model along the direction. Without curvature (no absolute scale) it is
  // infinite, and the radius decides.
  const at::Tensor& curvature = proposal.fisher_norm.c2;
  const at::Tensor newton = proposal.step.predicted_decrease.clamp_min(0) / curvature;
  return at::where(curvature > 0, at::minimum(newton, full), full);
}

}  // namespace

Direction direction(const Measurement& measured, const Options& options) {
  const detail::NumericsGuard guard;
  const SideProducts input = measured.input.scale_momentum(measured.momentum_factor);
  const SideProducts output = measured.output.scale_momentum(measured.momentum_factor);
  Direction out;
  out.step = tangent_step(input, measured.input_metric, output, measured.output_metric,
                          measured.scaling, options.gram_floor, measured.rounding);
  out.input_grams = step_grams(input, out.step.a);
  out.output_grams = step_grams(output, out.step.b);
  out.input_omega = out.input_grams.in(measured.input_metric.plain);
  out.output_norm = squared_norm(out.input_omega, out.output_grams, measured.scaling);
  return out;
}

DirectionSquare Direction::square() const {
  const detail::NumericsGuard guard;
  const at::Tensor square = output_norm.c2.clamp_min(0);  // rounding of a direction near 0
  return {square, step.ok.logical_and(square.isfinite())};
}

Direction Direction::slice(int64_t begin, int64_t end) const {
  const auto part = [&](const at::Tensor& x) { return x.slice(0, begin, end); };
  return {step.slice(begin, end),
          input_grams.slice(begin, end),
          output_grams.slice(begin, end),
          {part(input_omega.ww), part(input_omega.wd), part(input_omega.dd)},
          output_norm.slice(begin, end)};
}

DirectionSquare direction_square(const Measurement& measured, const Options& options) {
  return direction(measured, options).square();
}

Proposal propose(const Measurement& measured, const Options& options) {
  return propose(measured, direction(measured, options), options);
}

Proposal propose(const Measurement& measured, const Direction& direction, const Options& options) {
  const detail::NumericsGuard guard;
  Proposal out;
  out.step = direction.step;
  out.input_grams = direction.input_grams;
  out.output_grams = direction.output_grams;
  out.output_norm = direction.output_norm;
  out.fisher_norm =
      squared_norm(direction.input_omega, out.output_grams.in(measured.output_metric.plain),
                   measured.scaling)
          .where(measured.absolute);
  if (options.curvature == "hutchinson") {
    const Quartic plain = squared_norm(out.input_grams, out.output_grams, measured.scaling);
    const at::Tensor& c = measured.isotropic;
    out.fisher_norm = {c * plain.c2, c * plain.c3, c * plain.c4};
  }
  out.radius = measured.radius;
  out.momentum_factor = measured.momentum_factor;
  const at::Tensor planned = planned_length(measured, out, options.step_length);
  const at::Tensor usable = planned.isfinite();
  const at::Tensor zero = at::zeros({}, planned.options());
  out.length = inside_ball(out.output_norm, measured.radius, at::where(usable, planned, zero));
  out.live = measured.live;
  // A momentum whose squares overflow asks for a step of length 0 and infinite norms.
  const at::Tensor measurable = finite(out.output_norm).logical_and(finite(out.fisher_norm));
  out.sound = out.step.ok.logical_and(measurable).logical_and(out.length.isfinite());
  out.ok = out.live.logical_and(out.sound).logical_and(usable);
  out.length = at::where(out.ok, out.length, zero);
  // A momentum whose direction is far above rms holds a spike; no gauge changes either. The step
  // itself ends at the ball, or is none.
  const at::Tensor& square = out.output_norm.c2;
  out.spike = (detail::bounded_sample(square, measured.direction_rms.square(), out.ok) < square)
                  .logical_or(out.live.logical_and(measurable.logical_not()));
  return out;
}

Proposal Proposal::slice(int64_t begin, int64_t end) const {
  const auto part = [&](const at::Tensor& x) { return x.slice(0, begin, end); };
  Proposal out;
  out.step = step.slice(begin, end);
  out.input_grams = input_grams.slice(begin, end);
  out.output_grams = output_grams.slice(begin, end);
  out.output_norm = output_norm.slice(begin, end);
  out.fisher_norm = fisher_norm.slice(begin, end);
  out.radius = part(radius);
  out.momentum_factor = part(momentum_factor);
  out.length = part(length);
  out.ok = part(ok);
  out.spike = part(spike);
  out.live = part(live);
  out.sound = part(sound);
  return out;
}

}  // namespace ctrlora
