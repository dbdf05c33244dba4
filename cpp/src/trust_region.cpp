#include "ctrlora/trust_region.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "detail/check.h"
#include "detail/tensor_math.h"

namespace ctrlora {

namespace {

// From a start within a few per cent of the root; each iteration doubles the digits.
constexpr int kNewtonIterations = 6;

}  // namespace

at::Tensor Quartic::operator()(const at::Tensor& f) const {
  return f.square() * (c2 + f * (c3 + f * c4));
}

Quartic Quartic::slice(int64_t begin, int64_t end) const {
  return {c2.slice(0, begin, end), c3.slice(0, begin, end), c4.slice(0, begin, end)};
}

Quartic Quartic::where(const at::Tensor& mask) const {
  const at::Tensor zero = at::zeros({}, c2.options());
  return {at::where(mask, c2, zero), at::where(mask, c3, zero), at::where(mask, c4, zero)};
}

Quartic Quartic::sum(const std::vector<Quartic>& parts) {
  const auto total = [&](at::Tensor Quartic::* field) {
    std::vector<at::Tensor> sums;
    sums.reserve(parts.size());
    for (const Quartic& part : parts) {
      sums.push_back((part.*field).sum(0, true).to((parts.front().*field).device()));
    }
    return at::cat(sums).sum(0, true);
  };
  return {total(&Quartic::c2), total(&Quartic::c3), total(&Quartic::c4)};
}

Quartic squared_norm(const StepGrams& input, const StepGrams& output, const at::Tensor& scaling) {
  using detail::inner;
  const at::Tensor s2 = scaling.square();
  return {s2 * (inner(output.ww, input.dd) + 2 * inner(output.wd, input.wd.mT()) +
                inner(output.dd, input.ww)),
          2 * s2 * (inner(output.wd, input.dd) + inner(output.dd, input.wd)),
          s2 * inner(output.dd, input.dd)};
}

at::Tensor inside_ball(const Quartic& norm, const at::Tensor& radius, const at::Tensor& start) {
  const at::Tensor target = radius.square();
  const at::Tensor start_fits = norm(start) <= target;
  if (detail::known_to_be_true(start_fits)) {  // the usual case
    return start;
  }
  const at::Tensor tangent = norm.c2.clamp_min(0);
  const at::Tensor cross = norm.c4.clamp_min(0);
  // |D(f)| <= f |T| + f^2 |Z|: the positive root of the right side at the radius is always inside.
  const at::Tensor bound = at::minimum(
      start, 2 * radius /
                 (tangent.sqrt() + (tangent + 4 * cross.sqrt() * radius).sqrt()).clamp_min(1e-300));
  // Newton from the root for T orthogonal to Z, where the quartic is quadratic in f^2.
  at::Tensor f =
      (2 * target / (tangent + (tangent.square() + 4 * cross * target).sqrt()).clamp_min(1e-300))
          .sqrt();
  const at::Tensor twice = 2 * norm.c2;
  const at::Tensor thrice = 3 * norm.c3;
  const at::Tensor fourfold = 4 * norm.c4;
  for (int i = 0; i < kNewtonIterations; ++i) {
    f = at::maximum(at::minimum(f, start), bound);
    // On |D| rather than |D|^2, which bends less where the cross term opposes the step.
    const at::Tensor slope = f * (twice + f * (thrice + f * fourfold));
    const at::Tensor square = norm(f);
    f = f - 2 * (square - radius * square.sqrt()) / slope;
  }
  // A root that Newton missed (a quartic that is not monotone, a NaN) leaves the bound.
  const at::Tensor found =
      (norm(f) <= target * (1 + 1e-9)).logical_and(f >= bound).logical_and(f <= start);
  return at::where(start_fits, start, at::where(found, f, bound));
}

TrustRegionSubproblem::Solution TrustRegionSubproblem::solve(const at::Tensor& radius,
                                                             double tolerance,
                                                             int64_t max_iterations) const {
  const detail::NumericsGuard guard;
  constexpr const char* kWhere = "ctrlora::TrustRegionSubproblem::solve";
  CTRLORA_CHECK(gradient.dim() == 3 && output_eigenvalues.sizes() == gradient.sizes().slice(0, 2) &&
                    input_eigenvalues.dim() == 2 && input_eigenvalues.size(0) == gradient.size(0) &&
                    input_eigenvalues.size(1) == gradient.size(2),
                kWhere,
                "expected gradient (L, m, n), output_eigenvalues (L, m), input_eigenvalues ",
                "(L, n); got ", gradient.sizes(), ", ", output_eigenvalues.sizes(), ", ",
                input_eigenvalues.sizes(), ".");
  CTRLORA_CHECK(
      radius.dim() == 1 && radius.size(0) == gradient.size(0) && (radius > 0).all().item<bool>(),
      kWhere, "expected a positive radius (L); got ", radius, ".");
  const at::Tensor curvature =
      output_eigenvalues.clamp_min(0).unsqueeze(-1) * input_eigenvalues.clamp_min(0).unsqueeze(1);
  const at::Tensor squared = gradient.square();
  const auto length = [&](const at::Tensor& nu, int power) {
    return at::where(squared > 0, squared / (curvature + detail::as_column(nu)).pow(power),
                     at::zeros_like(squared))
        .flatten(1)
        .sum(-1);
  };
  // 1/|D(nu)| is concave and increasing: Newton from the left approaches its root monotonically.
  // The start |G|/radius - max curvature is a lower bound of nu, and 0 is the interior solution.
  at::Tensor nu =
      (squared.flatten(1).sum(-1).sqrt() / radius - curvature.flatten(1).amax(-1)).clamp_min(0);
  at::Tensor iterations = at::zeros({radius.size(0)}, radius.options().dtype(at::kLong));
  at::Tensor open = length(nu, 2).sqrt() > radius * (1 + tolerance);
  for (int64_t i = 0; i < max_iterations && open.any().item<bool>(); ++i) {
    const at::Tensor square = length(nu, 2);
    const at::Tensor norm = square.sqrt();
    // A singular curvature at nu = 0 has an infinite norm: leave it by a step no longer than nu
    // itself.
    const at::Tensor newton = square / length(nu, 3) * (norm - radius) / radius;
    const at::Tensor finite = newton.isfinite();
    const at::Tensor leave = squared.flatten(1).sum(-1).sqrt() / radius * 1e-12;
    nu = at::where(open, nu + at::where(finite, newton, leave), nu);
    iterations = iterations + open;
    open = length(nu, 2).sqrt() > radius * (1 + tolerance);
  }
  const at::Tensor step = at::where(squared > 0, -gradient / (curvature + detail::as_column(nu)),
                                    at::zeros_like(gradient));
  const at::Tensor decrease =
      -(gradient * step).flatten(1).sum(-1) - 0.5 * (curvature * step.square()).flatten(1).sum(-1);
  return {step, nu, decrease, iterations};
}

}  // namespace ctrlora
