#include "ctrlora/tangent_step.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/zeros.h>

#include "detail/small_matrix.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

using detail::as_column;
using detail::small_bmm;

namespace {

// Far below any Gram of a trained adapter, far above float64's smallest number: the floor at B = 0.
constexpr double kAbsoluteFloor = 1e-60;

at::Tensor times_diagonal(const at::Tensor& diagonal, const at::Tensor& matrix) {
  return diagonal.unsqueeze(-1) * matrix;
}

at::Tensor trace_of_product(const at::Tensor& x, const at::Tensor& y) {
  return detail::inner(x, y.mT());
}

// X1, X2, X3 of one side. unwhiten: F_-gamma; role: Gram^-1 on the right; minus: -1 / s^2; h: the
// other side's inverse Gram role, P^-1 for B and Q^-1 for A. A momentum that the products could not
// tell from nothing (set_momentum) is none: its step would have a size that no Gram shows.
SideStep side_step(const SideProducts& products,
                   const PowerCoefficients& unwhiten,
                   const at::Tensor& role,
                   const at::Tensor& minus,
                   const at::Tensor& h) {
  const at::Tensor told = products.mm.diagonal(0, -2, -1).sum(-1) != 0;  // NaN is not nothing
  const at::Tensor z = role * minus * as_column(told);
  return {as_column(unwhiten.tail) * z, small_bmm(times_diagonal(unwhiten.diag, products.um), z),
          small_bmm(small_bmm(h, products.wm), z) * -0.5};
}

// <M, delta> for delta = M X1 + U X2 + W X3.
at::Tensor slope(const SideProducts& products, const SideStep& step) {
  return detail::inner(products.mm, step.momentum) + detail::inner(products.um, step.basis) +
         detail::inner(products.wm, step.weight);
}

at::Tensor all_finite(const SideStep& step) {
  return detail::finite_layers(step.momentum)
      .logical_and(detail::finite_layers(step.basis))
      .logical_and(detail::finite_layers(step.weight));
}

}  // namespace

SideProducts SideProducts::scale_momentum(const at::Tensor& factor) const {
  const at::Tensor f = as_column(factor);
  return {ww, uw, um * f, wm * f, mm * f.square()};
}

SideProducts SideProducts::slice(int64_t begin, int64_t end) const {
  return {ww.slice(0, begin, end), uw.slice(0, begin, end), um.slice(0, begin, end),
          wm.slice(0, begin, end), mm.slice(0, begin, end)};
}

SideProducts SideProducts::cat(const std::vector<SideProducts>& parts) {
  const auto joined = [&](at::Tensor SideProducts::* field) { return detail::cat(parts, field); };
  return {joined(&SideProducts::ww), joined(&SideProducts::uw), joined(&SideProducts::um),
          joined(&SideProducts::wm), joined(&SideProducts::mm)};
}

namespace {

// Rows of the joint Gram [W U M]^T M, in this order.
void split_momentum(SideProducts& products, const at::Tensor& joint, int64_t rank) {
  const int64_t sketch_rank = joint.size(1) - 2 * rank;
  products.wm = joint.slice(1, 0, rank);
  products.um = joint.slice(1, rank, rank + sketch_rank);
  products.mm = joint.slice(1, rank + sketch_rank);
}

// Rows of [W U]^T W.
void split_weight(SideProducts& products, const at::Tensor& joint, int64_t rank) {
  products.ww = joint.slice(1, 0, rank);
  products.uw = joint.slice(1, rank);
}

}  // namespace

void SideProducts::set_momentum(const at::Tensor& weight,
                                const at::Tensor& momentum,
                                const at::Tensor& basis) {
  at::Tensor joint = detail::tall_grams({{{weight, basis, momentum}, momentum}}).front();
  const at::Tensor square = joint.slice(1, -momentum.size(2)).diagonal(0, -2, -1).sum(-1);
  // Squares of next to nothing are lost in the products' dtype, and with them the step's length.
  const at::Tensor told =  // NaN too: it must show
      (square <= detail::smallest_trace(momentum.size(1), momentum.scalar_type())).logical_not();
  if (!detail::known_to_be_true(told)) {
    joint = detail::select_layers(told, joint, at::zeros({}, joint.options()));
  }
  split_momentum(*this, joint, weight.size(2));
}

void SideProducts::set_weight(const at::Tensor& weight, const at::Tensor& basis) {
  split_weight(*this, detail::tall_grams({{{weight, basis}, weight}}).front(), weight.size(2));
}

SideProducts side_products(const at::Tensor& weight,
                           const at::Tensor& momentum,
                           const at::Tensor& basis) {
  SideProducts products;
  products.set_weight(weight, basis);
  products.set_momentum(weight, momentum, basis);
  return products;
}

SideMetric SideMetric::of(const LowRankEigen& factor, double whitening, double damping) {
  return {factor.power(whitening, damping), factor.power(-whitening, damping),
          factor.power(1.0, 0.0)};
}

SideMetric SideMetric::slice(int64_t begin, int64_t end) const {
  return {whiten.slice(begin, end), unwhiten.slice(begin, end), plain.slice(begin, end)};
}

SideMetric SideMetric::cat(const std::vector<SideMetric>& parts) {
  std::vector<PowerCoefficients> whiten, unwhiten, plain;
  for (const SideMetric& part : parts) {
    whiten.push_back(part.whiten);
    unwhiten.push_back(part.unwhiten);
    plain.push_back(part.plain);
  }
  return {PowerCoefficients::cat(whiten), PowerCoefficients::cat(unwhiten),
          PowerCoefficients::cat(plain)};
}

at::Tensor weighted_gram(const PowerCoefficients& metric,
                         const at::Tensor& uw,
                         const at::Tensor& ww) {
  return as_column(metric.tail) * ww + small_bmm(uw.mT(), times_diagonal(metric.diag, uw));
}

SideStep SideStep::slice(int64_t begin, int64_t end) const {
  return {momentum.slice(0, begin, end), basis.slice(0, begin, end), weight.slice(0, begin, end)};
}

SideStep SideStep::where(const at::Tensor& ok) const {
  const auto kept = [&](const at::Tensor& x) {
    return detail::select_layers(ok, x, at::zeros({}, x.options()));
  };
  return {kept(momentum), kept(basis), kept(weight)};
}

at::Tensor SideStep::materialize(const at::Tensor& weight_slab,
                                 const at::Tensor& momentum_slab,
                                 const at::Tensor& basis_slab) const {
  const at::ScalarType dtype = weight_slab.scalar_type();
  return at::bmm(momentum_slab, momentum.to(dtype)) + at::bmm(basis_slab, basis.to(dtype)) +
         at::bmm(weight_slab, weight.to(dtype));
}

namespace {

// (L, r) float64: 1 where a direction is inactive, or so far below the layer's largest in A and in
// BA that products of inverses would leave the range of float64.
at::Tensor asleep(const at::Tensor& p, const at::Tensor& q) {
  constexpr double kLeast = 1e-80;  // of squares
  const at::Tensor of_b = p.diagonal(0, -2, -1), of_a = q.diagonal(0, -2, -1);
  const auto tiny = [](const at::Tensor& x) { return x < kLeast * x.amax(-1, /*keepdim=*/true); };
  const at::Tensor small =
      (of_a > 0).logical_and(of_b > 0).logical_and(tiny(of_a)).logical_and(tiny(of_b * of_a));
  return at::maximum(detail::zero_directions(p, q), small.to(q.scalar_type()));
}

}  // namespace

TangentStep tangent_step(const SideProducts& input,
                         const SideMetric& input_metric,
                         const SideProducts& output,
                         const SideMetric& output_metric,
                         const at::Tensor& scaling,
                         double gram_floor,
                         double eps) {
  const detail::NumericsGuard guard;
  const at::Tensor p = weighted_gram(output_metric.whiten, output.uw, output.ww);
  at::Tensor q = weighted_gram(input_metric.whiten, input.uw, input.ww);
  q = q + at::diag_embed(q.diagonal(0, -2, -1) * (4 * eps));
  const at::Tensor trace_pq = trace_of_product(p, q);
  // Inactive directions (cpp/README.md, section 10): 1 on the diagonals keeps them apart.
  const at::Tensor off = asleep(p, q);
  q = q + at::diag_embed(off);
  const detail::Cholesky cholesky_q = detail::robust_cholesky(q, eps);
  // Zero there, so that no gradient from outside the model can wake an inactive direction.
  const at::Tensor q_inverse = detail::cholesky_inverse(cholesky_q.factor) - at::diag_embed(off);

  // The floor moves with the gauge: tr PQ is invariant and Q^-1 transforms like P.
  const at::Tensor active = (static_cast<double>(p.size(-1)) - off.sum(-1)).clamp_min(1.0);
  const at::Tensor floor = trace_pq * gram_floor / active + kAbsoluteFloor;
  const detail::Cholesky cholesky_p =
      detail::robust_cholesky(p + as_column(floor) * q_inverse + at::diag_embed(off), eps);
  // (P + floor)^-1 P (P + floor)^-1: where B has no component, momentum left from an older B must
  // not be blown up by the floor's inverse; at B = 0 the step of A is exactly zero.
  const at::Tensor p_floored = detail::cholesky_inverse(cholesky_p.factor);
  const at::Tensor p_inverse = small_bmm(p_floored, small_bmm(p, p_floored));

  const at::Tensor minus = as_column(-1 / scaling.square());
  TangentStep step;
  step.b = side_step(output, output_metric.unwhiten, q_inverse, minus, p_inverse);
  step.a = side_step(input, input_metric.unwhiten, p_inverse, minus, q_inverse);
  step.ok = cholesky_p.ok.logical_and(cholesky_q.ok)
                .logical_and(all_finite(step.a))
                .logical_and(all_finite(step.b));
  step.a = step.a.where(step.ok);
  step.b = step.b.where(step.ok);
  step.predicted_decrease = -(slope(input, step.a) + slope(output, step.b));
  return step;
}

PlainStepGrams step_grams(const SideProducts& products, const SideStep& step) {
  const at::Tensor& x1 = step.momentum;
  const at::Tensor& x2 = step.basis;
  const at::Tensor& x3 = step.weight;
  PlainStepGrams grams;
  grams.ww = products.ww;
  grams.uw = products.uw;
  grams.ud = small_bmm(products.um, x1).add_(x2).add_(small_bmm(products.uw, x3));
  grams.wd = small_bmm(products.wm, x1)
                 .add_(small_bmm(products.uw.mT(), x2))
                 .add_(small_bmm(products.ww, x3));
  const at::Tensor md = small_bmm(products.mm, x1)
                            .add_(small_bmm(products.um.mT(), x2))
                            .add_(small_bmm(products.wm.mT(), x3));
  grams.dd =
      small_bmm(x1.mT(), md).add_(small_bmm(x2.mT(), grams.ud)).add_(small_bmm(x3.mT(), grams.wd));
  return grams;
}

StepGrams PlainStepGrams::in(const PowerCoefficients& metric) const {
  const at::Tensor tail = as_column(metric.tail);
  const at::Tensor weighted_ud = times_diagonal(metric.diag, ud);
  return {weighted_gram(metric, uw, ww), (tail * wd).add_(small_bmm(uw.mT(), weighted_ud)),
          (tail * dd).add_(small_bmm(ud.mT(), weighted_ud))};
}

TangentStep TangentStep::slice(int64_t begin, int64_t end) const {
  return {a.slice(begin, end), b.slice(begin, end), predicted_decrease.slice(0, begin, end),
          ok.slice(0, begin, end)};
}

PlainStepGrams PlainStepGrams::slice(int64_t begin, int64_t end) const {
  PlainStepGrams view;
  view.ww = ww.slice(0, begin, end);
  view.wd = wd.slice(0, begin, end);
  view.dd = dd.slice(0, begin, end);
  view.uw = uw.slice(0, begin, end);
  view.ud = ud.slice(0, begin, end);
  return view;
}

}  // namespace ctrlora
