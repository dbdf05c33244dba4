#include "ctrlora/low_rank_eigen.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "detail/check.h"
#include "detail/factor_refresh.h"
#include "detail/philox.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

using detail::as_column;
using detail::select_layers;

PowerCoefficients PowerCoefficients::slice(int64_t begin, int64_t end) const {
  return {tail.slice(0, begin, end), diag.slice(0, begin, end)};
}

PowerCoefficients PowerCoefficients::cat(const std::vector<PowerCoefficients>& parts) {
  return {detail::cat(parts, &PowerCoefficients::tail),
          detail::cat(parts, &PowerCoefficients::diag)};
}

LowRankEigen::LowRankEigen(int64_t layers,
                           int64_t size,
                           int64_t sketch_rank,
                           const at::TensorOptions& options,
                           bool wide,
                           bool narrow)
    : narrow_(narrow && c10::typeMetaToScalarType(options.dtype()) == at::kFloat) {
  CTRLORA_CHECK(layers >= 1 && sketch_rank >= 1 && sketch_rank <= size, "ctrlora::LowRankEigen",
                "expected layers >= 1 and 1 <= sketch_rank <= size; got layers = ", layers,
                ", sketch_rank = ", sketch_rank, ", size = ", size, ".");
  const at::TensorOptions small = options.dtype(at::kDouble);
  const at::TensorOptions kept = narrow_ ? options.dtype(at::kBFloat16) : options;
  basis_ = wide ? at::zeros({layers, sketch_rank, size}, kept).mT()
                : at::zeros({layers, size, sketch_rank}, kept);
  if (sketch_rank == size) {  // no tail to hold the identity
    basis_.copy_(at::eye(size, options).expand_as(basis_));
  }
  eigenvalues_ = at::ones({layers, sketch_rank}, small);
  trace_ = at::full({layers}, static_cast<double>(size), small);
}

LowRankEigen LowRankEigen::slice(int64_t begin, int64_t end) const {
  LowRankEigen view;
  view.narrow_ = narrow_;
  view.basis_ = basis_.slice(0, begin, end);
  view.eigenvalues_ = eigenvalues_.slice(0, begin, end);
  view.trace_ = trace_.slice(0, begin, end);
  return view;
}

void LowRankEigen::start_basis(const at::Tensor& rows, const at::Tensor& where, uint64_t seed) {
  const at::TensorOptions options = this->options();
  if (sketch_rank() == size()) {
    basis_.copy_(select_layers(where, at::eye(size(), options).expand_as(basis_), basis_));
    return;
  }
  // One power iteration of its own. The small Gaussian part completes the basis where the rows span
  // fewer than k directions.
  const at::Tensor mix = detail::philox_normal(seed, 1, {1, rows.size(1), sketch_rank()}, options);
  const at::Tensor filler = detail::philox_normal(seed, 2, {1, size(), sketch_rank()}, options);
  at::Tensor columns = at::matmul(rows.mT(), mix);
  const at::Tensor norm = columns.norm(2, {1}, /*keepdim=*/true);
  columns = columns / norm.clamp_min(1e-30) + filler * (0.03 / std::sqrt(size()));
  const detail::Orthonormal start = detail::orthonormalize(columns);
  basis_.copy_(select_layers(start.ok.logical_and(where), start.basis, basis_));
}

namespace {

// (L, k, d) as (L, d, k) in the memory of the basis, which the refresh works on.
at::Tensor in_layout_of(const at::Tensor& basis, const at::Tensor& turned) {
  if (!basis[0].is_contiguous()) {
    return turned.mT();
  }
  if (turned.size(0) > 1) {
    return turned.mT().contiguous();
  }
  // One layer, as in every backward: ATen turns matrices by blocks, batches number by number.
  return turned[0].t().contiguous().unsqueeze(0);
}

}  // namespace

FactorSketch LowRankEigen::sketch(const at::Tensor& rows,
                                  const at::Tensor& row_weights,
                                  const at::Tensor& squares) const {
  // As (k, .) on the left: BLAS takes two to seven times as long for a thin right side.
  const at::Tensor coordinates = at::bmm(computed_basis().mT(), rows.mT());  // (L, k, R)
  coordinates.mul_(row_weights.to(rows.scalar_type()).unsqueeze(1));
  FactorSketch sums;
  sums.product = in_layout_of(basis_, at::bmm(coordinates, rows));
  sums.trace = ((squares.defined() ? squares : detail::row_squares(rows)) * row_weights).sum(-1);
  sums.weight = row_weights.sum(-1);
  return sums;
}

at::Tensor LowRankEigen::update(const FactorSketch& sketch,
                                const at::Tensor& keep,
                                const at::Tensor& scale) {
  return update_all({{*this, sketch, keep, scale}});
}

bool LowRankEigen::updates_with(const LowRankEigen& other) const {
  return sketch_rank() == other.sketch_rank() && dtype() == other.dtype() &&
         (sketch_rank() == size()) == (other.sketch_rank() == other.size());
}

at::Tensor LowRankEigen::update_all(const std::vector<Update>& parts) {
  detail::FactorRefresh refresh(parts);
  refresh.decompose();
  return refresh.finish();
}

at::Tensor LowRankEigen::tail() const {
  const int64_t rest = size() - sketch_rank();
  if (rest == 0) {
    return at::zeros_like(trace_);
  }
  return ((trace_ - eigenvalues_.sum(-1)) / static_cast<double>(rest)).clamp_min(0);
}

PowerCoefficients LowRankEigen::power(double exponent, double damping) const {
  // The absolute floor keeps a dead factor's inverse powers finite.
  const at::Tensor lambda = damping == 0.0
                                ? at::zeros_like(trace_)
                                : trace_ * (damping / static_cast<double>(size())) + 1e-60;
  const at::Tensor damped = eigenvalues_ + lambda.unsqueeze(-1);
  if (sketch_rank() == size()) {  // no tail: tau M + U (...) U^T M would only cancel
    return {at::zeros_like(trace_), damped.pow(exponent)};
  }
  const at::Tensor rest = (tail() + lambda).pow(exponent);
  return {rest, damped.pow(exponent) - rest.unsqueeze(-1)};
}

at::Tensor LowRankEigen::apply_power(const at::Tensor& v, double exponent, double damping) const {
  const PowerCoefficients power_of = power(exponent, damping);
  const at::Tensor basis = computed_basis();
  const at::Tensor coordinates = at::bmm(basis.mT(), v);
  return v * as_column(power_of.tail).to(dtype()) +
         at::bmm(basis, coordinates * power_of.diag.unsqueeze(-1).to(dtype()));
}

at::Tensor LowRankEigen::captured_share() const {
  return (eigenvalues_.sum(-1) / trace_).clamp(0, 1);
}

at::Tensor LowRankEigen::to_dense() const {
  const at::Tensor identity = at::eye(size(), options()).expand({layers(), size(), size()});
  return apply_power(identity, 1.0, 0.0);
}

std::vector<std::pair<std::string, at::Tensor>> LowRankEigen::named_tensors() const {
  return {{"basis", basis_}, {"eigenvalues", eigenvalues_}, {"trace", trace_}};
}

void LowRankEigen::to(const at::TensorOptions& options) {
  narrow_ = narrow_ && c10::typeMetaToScalarType(options.dtype()) == at::kFloat;
  basis_ = basis_.to(narrow_ ? options.dtype(at::kBFloat16) : options);
  eigenvalues_ = eigenvalues_.to(options.device());
  trace_ = trace_.to(options.device());
}

}  // namespace ctrlora
