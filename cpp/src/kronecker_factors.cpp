#include "ctrlora/kronecker_factors.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "detail/tensor_math.h"

namespace ctrlora {

KroneckerFactors::KroneckerFactors(int64_t layers,
                                   int64_t in_features,
                                   int64_t out_features,
                                   const Options& options,
                                   const at::TensorOptions& tensor_options) {
  const int64_t cap = std::min(options.sketch_rank, options.dense_limit);
  const bool narrow = options.basis_dtype == "bfloat16";
  input = LowRankEigen(layers, in_features, std::min(cap, in_features), tensor_options,
                       /*wide=*/true, narrow);
  output = LowRankEigen(layers, out_features, std::min(cap, out_features), tensor_options,
                        /*wide=*/false, narrow);
  const at::TensorOptions small = tensor_options.dtype(at::kDouble);
  // Identity factors and a base of unit gain: |W0|_Omega^2 = (m / n) tr Omega = m.
  base_square = at::full({layers}, static_cast<double>(out_features), small);
  seen = at::zeros({layers}, small);
  absolute = at::zeros({layers}, tensor_options.dtype(at::kBool));
  misses = at::zeros({layers}, tensor_options.dtype(at::kLong));
}

KroneckerFactors KroneckerFactors::slice(int64_t begin, int64_t end) const {
  KroneckerFactors view;
  view.input = input.slice(begin, end);
  view.output = output.slice(begin, end);
  view.base_square = base_square.slice(0, begin, end);
  view.seen = seen.slice(0, begin, end);
  view.absolute = absolute.slice(0, begin, end);
  view.misses = misses.slice(0, begin, end);
  return view;
}

// Writes through the tensors, so it changes this object although no member is replaced.
// NOLINTNEXTLINE(readability-make-member-function-const)
void KroneckerFactors::assign(const KroneckerFactors& other) {
  const auto from = other.named_tensors();
  const auto to = named_tensors();
  for (size_t i = 0; i < to.size(); ++i) {
    to[i].second.copy_(from[i].second);
  }
}

namespace {

// Factor on the mean of g g^T that makes it E[g^ g^T] for one loss term: with T terms in W rows,
// mean loss: S = T sum(w g g^T) = (T W) mean; summed loss: S = sum(w g g^T) / T = (W / T) mean.
at::Tensor loss_scale_of_output(const CurvatureSketch& sketch, const Options& options) {
  const at::Tensor& rows = sketch.output.weight;
  at::Tensor terms = rows;
  if (options.loss_terms == kLossTermsSequences) {
    terms = sketch.sequences;
  } else if (options.loss_terms != kLossTermsTokens) {
    terms = at::full_like(rows, static_cast<double>(options.loss_terms));
  }
  const double unscale = 1.0 / (options.loss_scale * options.loss_scale);
  return (options.loss_reduction == "mean" ? terms * rows : rows / terms) * unscale;
}

// The scale at which a sample enters: a spike's trace is bounded, its shape stays.
at::Tensor calm(const LowRankEigen& factor,
                const FactorSketch& sums,
                const at::Tensor& scale,
                const at::Tensor& known) {
  const at::Tensor trace = scale * sums.trace / sums.weight;
  const at::Tensor entering = detail::bounded_sample(trace, factor.trace(), known);
  return at::where(entering < trace, scale * (entering / trace), scale);
}

}  // namespace

void KroneckerFactors::commit(const CurvatureSketch& sketch, const Options& options) {
  const auto something = [](const FactorSketch& sums, const LowRankEigen& factor) {
    return sums.trace > detail::smallest_trace(factor.size(), factor.dtype());
  };
  const at::Tensor has = (sketch.input.weight > 0)
                             .logical_and(something(sketch.input, input))
                             .logical_and(something(sketch.output, output))
                             .logical_and(sketch.input.trace.isfinite())
                             .logical_and(sketch.output.trace.isfinite());
  // The gradient proxy gives way to the first observation, whose scale differs from its own.
  const at::Tensor restart =
      has.logical_and(absolute.logical_not()).logical_and(sketch.from_gradient.logical_not());
  const at::Tensor count = at::where(restart, at::zeros_like(seen), seen) + 1;
  at::Tensor keep = (1 - 1 / count).clamp_max(options.factor_beta);
  keep = at::where(has, keep, at::ones_like(keep));

  // The gradient proxy has no scale of its own: normalised to a mean eigenvalue of 1.
  const auto unit = [](const FactorSketch& sums, int64_t size) {
    return static_cast<double>(size) * sums.weight / sums.trace;
  };
  const at::Tensor& proxy = sketch.from_gradient;
  const at::Tensor input_scale =
      at::where(proxy, unit(sketch.input, input.size()), at::ones_like(keep));
  const at::Tensor output_scale =
      at::where(proxy, unit(sketch.output, output.size()), loss_scale_of_output(sketch, options));
  const at::Tensor known = count > 1;
  const LowRankEigen::Update of_input{input, sketch.input, keep,
                                      calm(input, sketch.input, input_scale, known)};
  const LowRankEigen::Update of_output{output, sketch.output, keep,
                                       calm(output, sketch.output, output_scale, known)};
  const at::Tensor failures =
      input.updates_with(output)
          ? LowRankEigen::update_all({of_input, of_output})
          : at::cat({LowRankEigen::update_all({of_input}), LowRankEigen::update_all({of_output})});
  const at::Tensor failed = failures.view({2, -1}).any(0);
  // A base whose output nobody handed over counts as unobserved: negative.
  const at::Tensor assumed = sketch.from_gradient.logical_or(sketch.base_square < 0);
  const at::Tensor fresh =
      at::where(assumed, input.trace() * (static_cast<double>(output.size()) / input.size()),
                sketch.base_square / sketch.input.weight);
  const at::Tensor entering = detail::bounded_sample(fresh, base_square, known);
  const at::Tensor mixed = at::where(assumed, fresh, keep * base_square + (1 - keep) * entering);
  base_square.copy_(at::where(has.logical_and(mixed.isfinite()), mixed, base_square));
  seen.copy_(at::where(has, count, seen));
  absolute.copy_(at::where(has, sketch.from_gradient.logical_not(), absolute));
  misses.copy_(at::where(has, (misses + failed) * failed, misses));
}

std::vector<std::pair<std::string, at::Tensor>> KroneckerFactors::named_tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> out = {{"base_square", base_square},
                                                         {"seen", seen},
                                                         {"absolute", absolute},
                                                         {"factor_misses", misses}};
  for (const auto& [name, tensor] : input.named_tensors()) {
    out.emplace_back("input." + name, tensor);
  }
  for (const auto& [name, tensor] : output.named_tensors()) {
    out.emplace_back("output." + name, tensor);
  }
  return out;
}

void KroneckerFactors::to(const at::TensorOptions& options) {
  input.to(options);
  output.to(options);
  for (at::Tensor* tensor : {&base_square, &seen, &absolute, &misses}) {
    *tensor = tensor->to(options.device());
  }
}

}  // namespace ctrlora
