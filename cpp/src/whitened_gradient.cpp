#include "ctrlora/whitened_gradient.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "detail/check.h"
#include "detail/philox.h"
#include "detail/small_matrix.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

using detail::as_column;
using detail::gram_root;
using detail::GramRoot;
using detail::small_bmm;
using detail::tall_gram;

namespace {

// Streams of the generator.
constexpr uint64_t kThetaStream = 11;
constexpr uint64_t kPsiStream = 12;

// Relative eigenvalues of a Gram below which nothing but rounding is left.
double rounding_of(const at::Tensor& slab) {
  return slab.scalar_type() == at::kDouble ? 1e-14 : 2e-6;
}

// Layers that hold NaN or inf zeroed: they come out as not ok, not as exceptions.
at::Tensor finite_or_zero(const at::Tensor& x, const at::Tensor& ok) {
  return detail::select_layers(ok, x, at::zeros_like(x));
}

at::Tensor probe(int64_t size,
                 int64_t columns,
                 uint64_t seed,
                 uint64_t stream,
                 const at::TensorOptions& options) {
  const at::Tensor normal =
      detail::philox_normal(seed, stream, {1, size, columns}, options.dtype(at::kDouble));
  return detail::orthonormalize(normal).basis.to(options);
}

// v - W (W^T W)^+ W^T v: off the span of W (L, d, r).
at::Tensor project_off(const at::Tensor& v, const at::Tensor& span) {
  const GramRoot root = gram_root(tall_gram(span, span), rounding_of(span));
  const at::Tensor unit = at::bmm(span, root.inverse.to(span.scalar_type()));
  return v - at::bmm(unit, tall_gram(unit, v).to(v.scalar_type()));
}

}  // namespace

at::Tensor WhiteningMetric::whiten(const at::Tensor& v) const {
  return factor.apply_power(v, -0.5 * whitening, damping);
}

at::Tensor WhiteningMetric::unwhiten(const at::Tensor& v) const {
  return factor.apply_power(v, 0.5 * whitening, damping);
}

PowerCoefficients WhiteningMetric::noise() const {
  const at::Tensor lambda = factor.trace() * (damping / static_cast<double>(factor.size())) + 1e-60;
  const at::Tensor rho = factor.tail();
  const at::Tensor outside = rho * (rho + lambda).pow(-whitening);
  const at::Tensor inside =
      factor.eigenvalues() * (factor.eigenvalues() + lambda.unsqueeze(-1)).pow(-whitening);
  return {outside, inside - outside.unsqueeze(-1)};
}

at::Tensor WhiteningMetric::noise_peak() const {
  const PowerCoefficients coefficients = noise();
  return coefficients.tail + coefficients.diag.amax(-1).clamp_min(0);
}

at::Tensor WhiteningMetric::noise_trace() const {
  const PowerCoefficients coefficients = noise();
  return coefficients.tail * static_cast<double>(factor.size()) + coefficients.diag.sum(-1);
}

at::Tensor WhiteningMetric::noise_along(const at::Tensor& directions) const {
  const PowerCoefficients coefficients = noise();
  const at::Tensor coordinates = tall_gram(factor.basis(), directions);  // (L, k, r)
  const at::Tensor inside = (coordinates.square() * coefficients.diag.unsqueeze(-1)).sum(1);
  return (coefficients.tail.unsqueeze(-1) + inside).clamp_min(0);
}

GradientSketch GradientSketch::slice(int64_t begin, int64_t end) const {
  return {range.slice(0, begin, end), corange.slice(0, begin, end), batches.slice(0, begin, end)};
}

GradientSketch GradientSketch::operator+(const GradientSketch& other) const {
  return {range + other.range, corange + other.corange, batches + other.batches};
}

WhitenedSvd svd(const FactoredGradient& gradient, int64_t rank) {
  const detail::NumericsGuard guard;
  const at::ScalarType dtype = gradient.left.scalar_type();
  CTRLORA_CHECK(rank >= 1 && rank <= gradient.left.size(2), "ctrlora::svd",
                "expected 1 <= rank <= ", gradient.left.size(2), "; got ", rank, ".");
  const at::Tensor ok =
      detail::finite_layers(gradient.left).logical_and(detail::finite_layers(gradient.right));
  const at::Tensor left = finite_or_zero(gradient.left, ok);
  const at::Tensor right = finite_or_zero(gradient.right, ok);
  const double rounding = rounding_of(left);
  const GramRoot output = gram_root(tall_gram(left, left), rounding);
  const GramRoot input = gram_root(tall_gram(right, right), rounding);
  const auto [u, values, vh] =
      at::linalg_svd(small_bmm(output.root.mT(), input.root), /*full_matrices=*/false);
  const at::Tensor from_left = small_bmm(output.inverse, u.narrow(-1, 0, rank));
  const at::Tensor from_right = small_bmm(input.inverse, vh.mT().narrow(-1, 0, rank));
  return {at::bmm(left, from_left.to(dtype)), values.narrow(-1, 0, rank),
          at::bmm(right, from_right.to(dtype)), ok};
}

at::Tensor along(const FactoredGradient& gradient,
                 const at::Tensor& left,
                 const at::Tensor& right) {
  const detail::NumericsGuard guard;
  return (tall_gram(left, gradient.left) * tall_gram(right, gradient.right)).sum(-1);
}

at::Tensor split_half_values(const FactoredGradient& first,
                             const FactoredGradient& second,
                             int64_t rank) {
  const WhitenedSvd one = svd(first, rank);
  const WhitenedSvd two = svd(second, rank);
  const at::Tensor both = along(second, one.left, one.right) + along(first, two.left, two.right);
  return (0.5 * both).clamp_min(0);
}

at::Tensor NoiseModel::floor() const {
  return unit * (rows.sqrt() + columns.sqrt());
}

at::Tensor NoiseModel::shrink(const at::Tensor& values) const {
  const at::Tensor longer = at::maximum(rows, columns);
  const at::Tensor b = (at::minimum(rows, columns) / longer).unsqueeze(-1);
  const at::Tensor scale = (unit * longer.sqrt()).clamp_min(1e-300).unsqueeze(-1);
  const at::Tensor square = (values / scale).square();
  const at::Tensor inside = ((square - b - 1).square() - 4 * b).clamp_min(0);
  const at::Tensor kept = inside.sqrt() / square.sqrt().clamp_min(1e-300) * scale;
  return at::where(values > floor().unsqueeze(-1), kept, at::zeros_like(values));
}

WhitenedGradient::WhitenedGradient(const KroneckerFactors& factors,
                                   double whitening,
                                   double damping,
                                   int64_t probes,
                                   uint64_t seed)
    : input_{factors.input, whitening, damping}, output_{factors.output, whitening, damping} {
  CTRLORA_CHECK(probes >= 1, "ctrlora::WhitenedGradient", "expected probes >= 1; got ", probes,
                ".");
  const detail::NumericsGuard guard;
  const at::TensorOptions options = factors.input.options();
  const int64_t n = factors.input.size();
  const int64_t m = factors.output.size();
  const int64_t p = std::min({probes, m, n});
  theta_ = probe(n, p, seed, kThetaStream, options);
  psi_ = probe(m, std::min(2 * p + 1, m), seed, kPsiStream, options);
  const auto mix = [&](const WhiteningMetric& side, const at::Tensor& test, at::Tensor& tail) {
    const PowerCoefficients power = side.factor.power(-0.5 * whitening, damping);
    tail = as_column(power.tail).to(options);
    const at::Tensor coordinates = at::matmul(side.factor.computed_basis().mT(), test);
    return coordinates * power.diag.unsqueeze(-1).to(options);
  };
  input_mix_ = mix(input_, theta_, input_tail_);
  output_mix_ = mix(output_, psi_, output_tail_);
}

int64_t WhitenedGradient::sketch_bytes(int64_t in_features,
                                       int64_t out_features,
                                       int64_t probes,
                                       int64_t element_size) {
  const int64_t p = std::min({probes, in_features, out_features});
  return (out_features * p + in_features * std::min(2 * p + 1, out_features)) * element_size;
}

GradientSketch WhitenedGradient::empty() const {
  return {at::zeros({layers(), psi_.size(1), theta_.size(2)}, theta_.options()),
          at::zeros({layers(), theta_.size(1), psi_.size(2)}, theta_.options()),
          at::zeros_like(input_.factor.trace())};
}

WhitenedGradient WhitenedGradient::slice(int64_t begin, int64_t end) const {
  WhitenedGradient view = *this;
  view.input_.factor = input_.factor.slice(begin, end);
  view.output_.factor = output_.factor.slice(begin, end);
  for (at::Tensor* tensor :
       {&view.input_mix_, &view.output_mix_, &view.input_tail_, &view.output_tail_}) {
    *tensor = tensor->slice(0, begin, end);
  }
  return view;
}

namespace {

// rows F_g^-1/2 probe. The whitened probe of one layer is formed for the moment: that costs less
// than projecting the rows on the basis.
at::Tensor whitened_coordinates(const at::Tensor& rows,
                                const at::Tensor& test,
                                const at::Tensor& basis,
                                const at::Tensor& mix,
                                const at::Tensor& tail) {
  return at::mm(rows, (test * tail).addmm_(basis, mix));
}

}  // namespace

at::Tensor WhitenedGradient::input_coordinates(int64_t layer, const at::Tensor& inputs) const {
  const detail::NumericsGuard guard;
  return whitened_coordinates(inputs, theta_[0], input_.factor.computed_basis()[layer],
                              input_mix_[layer], input_tail_[layer]);
}

void WhitenedGradient::add(GradientSketch& sums,
                           int64_t layer,
                           const at::Tensor& inputs,
                           const at::Tensor& coordinates,
                           const at::Tensor& output_grads) const {
  const detail::NumericsGuard guard;
  sums.range[layer].addmm_(output_grads.t(), coordinates);
  sums.corange[layer].addmm_(
      inputs.t(),
      whitened_coordinates(output_grads, psi_[0], output_.factor.computed_basis()[layer],
                           output_mix_[layer], output_tail_[layer]));
}

namespace {

// Factor that turns sums into means; 0 for layers without a batch.
at::Tensor mean_of(const at::Tensor& batches) {
  return at::where(batches > 0, 1 / batches.clamp_min(1), at::zeros_like(batches));
}

}  // namespace

FactoredGradient WhitenedGradient::reconstruct(const GradientSketch& sums) const {
  const detail::NumericsGuard guard;
  const at::ScalarType dtype = theta_.scalar_type();
  const at::Tensor mean = as_column(mean_of(sums.batches)).to(dtype);
  const at::Tensor range = output_.whiten(sums.range) * mean;     // G~ Theta
  const at::Tensor corange = input_.whiten(sums.corange) * mean;  // G~^T Psi
  const double rounding = rounding_of(range);
  const at::Tensor unit =
      at::bmm(range, gram_root(tall_gram(range, range), rounding).inverse.to(dtype));
  const at::Tensor seen = tall_gram(psi_.expand({layers(), -1, -1}), unit);  // Psi^T Q (L, q, p)
  const GramRoot fit = gram_root(small_bmm(seen.mT(), seen), 1e-12);
  const at::Tensor inverse = small_bmm(small_bmm(seen, fit.inverse), fit.inverse.mT());
  return {unit, at::bmm(corange, inverse.to(dtype))};
}

// From the side with more probes; exact where they are complete.
at::Tensor WhitenedGradient::corange_energy(const at::Tensor& corange) const {
  const double per_probe = static_cast<double>(psi_.size(1)) / static_cast<double>(psi_.size(2));
  return input_.whiten(corange).square().sum({1, 2}, /*keepdim=*/false, at::kDouble) * per_probe;
}

at::Tensor WhitenedGradient::energy(const GradientSketch& sums) const {
  const detail::NumericsGuard guard;
  return corange_energy(sums.corange) * mean_of(sums.batches).square();
}

at::Tensor WhitenedGradient::effective_samples(const GradientSketch& first,
                                               const GradientSketch& second) const {
  const detail::NumericsGuard guard;
  const at::Tensor one = mean_of(first.batches);
  const at::Tensor two = mean_of(second.batches);
  // |G~_1 - G~_2|^2 = tr S~ tr O~ (1/N_1 + 1/N_2), N_i proportional to the batches.
  const at::ScalarType dtype = theta_.scalar_type();
  const at::Tensor difference = corange_energy(first.corange * as_column(one).to(dtype) -
                                               second.corange * as_column(two).to(dtype));
  const at::Tensor noise = input_.noise_trace() * output_.noise_trace();
  return noise * (first.batches + second.batches) * (one + two) / difference;
}

NoiseModel WhitenedGradient::noise(const at::Tensor& effective_samples) const {
  const at::Tensor input_peak = input_.noise_peak();
  const at::Tensor output_peak = output_.noise_peak();
  return {(input_peak * output_peak / effective_samples).sqrt(),
          output_.noise_trace() / output_peak, input_.noise_trace() / input_peak};
}

at::Tensor WhitenedGradient::deviation(const WhitenedSvd& directions,
                                       const at::Tensor& effective_samples) const {
  const detail::NumericsGuard guard;
  return (output_.noise_along(directions.left) * input_.noise_along(directions.right) /
          effective_samples.unsqueeze(-1))
      .sqrt();
}

FactoredGradient WhitenedGradient::residual(const FactoredGradient& gradient,
                                            const at::Tensor& b,
                                            const at::Tensor& a) const {
  const detail::NumericsGuard guard;
  const at::ScalarType dtype = theta_.scalar_type();
  return {project_off(gradient.left, output_.unwhiten(b.to(dtype))),
          project_off(gradient.right, input_.unwhiten(a.mT().to(dtype)))};
}

}  // namespace ctrlora
