#include "ctrlora/low_rank_eigen.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "detail/check.h"
#include "detail/nystrom.h"
#include "detail/philox.h"
#include "detail/small_matrix.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

using detail::as_column;
using detail::for_each;
using detail::select_layers;
using detail::Slabs;

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

namespace {

using Updates = std::vector<LowRankEigen::Update>;

// The small tensors of all parts, below each other; (L) float64 unless said otherwise.
struct JoinedUpdates {
  at::Tensor live;           // (L) bool: something enters
  at::Tensor fresh, old;     // shares of what enters and of what is there
  at::Tensor size;           // d
  at::Tensor present, next;  // traces
  at::Tensor eigenvalues;    // (L, k)

  explicit JoinedUpdates(const Updates& parts) {
    const auto joined = [&](const auto& field) { return detail::joined(parts, field); };
    const auto number = [&](const auto& field) {  // one of each factor
      return joined(
          [&](const auto& part) { return at::full_like(part.factor.trace(), field(part.factor)); });
    };
    const at::Tensor weight = joined([](const auto& part) { return part.sketch.weight; });
    const at::Tensor trace = joined([](const auto& part) { return part.sketch.trace; });
    const at::Tensor keep = joined([](const auto& part) { return part.keep; });
    const at::Tensor scale = joined([](const auto& part) { return part.scale; });
    const at::Tensor finite =
        joined([](const auto& part) { return detail::finite_layers(part.sketch.product); });
    const at::Tensor least = number([](const LowRankEigen& factor) {
      return detail::smallest_trace(factor.size(), factor.dtype());
    });
    size = number([](const LowRankEigen& factor) { return static_cast<double>(factor.size()); });
    eigenvalues = joined([](const auto& part) { return part.factor.eigenvalues(); });
    present = joined([](const auto& part) { return part.factor.trace(); });
    live = (weight > 0)
               .logical_and(trace > least)
               .logical_and(keep < 1)
               .logical_and(finite)
               .logical_and((trace * scale / weight).isfinite());
    fresh = at::where(live, (1 - keep) * scale / weight, at::zeros_like(keep));
    old = at::where(live, keep, at::ones_like(keep));
    next = old * present + fresh * at::where(live, trace, at::zeros_like(present));
  }
};

// The parts' Y, times `unit` (L): in the bases' layout.
Slabs scaled_products(const Updates& parts,
                      const Slabs& bases,
                      const at::Tensor& live,
                      const at::Tensor& unit) {
  Slabs rows;
  for_each(bases, [&](size_t i, int64_t begin, int64_t end) {
    const at::Tensor& product = parts[i].sketch.product;
    const bool in_place = parts[i].sketch.disposable && product.strides() == bases[i].strides();
    at::Tensor out = in_place ? product : at::empty_like(bases[i]);
    const at::Tensor enters = live.slice(0, begin, end);
    at::mul_out(out,
                detail::known_to_be_true(enters)
                    ? product
                    : select_layers(enters, product, at::zeros({}, product.options())),
                as_column(unit.slice(0, begin, end)).to(out.scalar_type()));
    rows.push_back(out);
  });
  return rows;
}

// The next bases as combinations of U and Y, and eigenvalues in units of the mean one.
struct Refreshed {
  at::Tensor live;               // (L) bool: the decomposition is sound
  at::Tensor of_basis, of_rows;  // (L, k, k); of_rows undefined for complete bases
  at::Tensor values;             // (L, k)
};

Refreshed refresh(const Slabs& bases,
                  const Slabs& rows,
                  const at::Tensor& kept,
                  const at::Tensor& size) {
  if (bases.front().size(1) == bases.front().size(2)) {  // complete: K is the factor itself
    const detail::JointGram gram(bases, rows);
    const at::Tensor core = detail::symmetric(gram.uu * kept.unsqueeze(1) + gram.uy);
    const detail::Eigh eigh = detail::symmetric_eigh(core);
    return {detail::finite_layers(core).logical_and(detail::finite_layers(eigh.values)),
            eigh.vectors,
            {},
            eigh.values};
  }
  const detail::Nystrom next = detail::nystrom(bases, rows, kept);
  // It is below F: a sum above the trace is a decomposition that went wrong.
  return {next.ok.logical_and(next.values.sum(-1) < 1.01 * size), at::zeros({}, kept.options()),
          next.map, next.values};
}

}  // namespace

at::Tensor LowRankEigen::update_all(const std::vector<Update>& parts) {
  const JoinedUpdates joined(parts);
  // In units of the mean eigenvalue, so that squares of small gradients stay in range.
  const at::Tensor mean = (joined.next / joined.size).clamp_min(1e-300);
  const at::Tensor kept = (joined.old / mean).unsqueeze(-1) * joined.eigenvalues;
  Slabs bases;
  bases.reserve(parts.size());
  for (const Update& part : parts) {
    bases.push_back(part.factor.computed_basis());
  }
  const Slabs rows = scaled_products(parts, bases, joined.live, joined.fresh / mean);
  const Refreshed next = refresh(bases, rows, kept, joined.size);
  const at::Tensor live = joined.live.logical_and(next.live);
  const at::Tensor identity = at::eye(kept.size(1), kept.options()).expand({kept.size(0), -1, -1});
  const at::Tensor of_basis = select_layers(live, next.of_basis, identity);
  const at::Tensor of_rows = next.of_rows.defined()
                                 ? select_layers(live, next.of_rows, at::zeros({}, kept.options()))
                                 : at::Tensor();
  const at::Tensor values =
      select_layers(live, next.values.clamp_min(0) * mean.unsqueeze(-1), joined.eigenvalues);
  const at::Tensor trace = at::where(live, joined.next, joined.present);
  const at::Tensor failed = (joined.fresh > 0).logical_and(live.logical_not());
  // All that may throw (no memory) comes before a factor's first write, so that it is as it was or
  // whole: tall_combine allocates, then writes.
  for_each(bases, [&](size_t i, int64_t begin, int64_t end) {
    const auto part = [&](const at::Tensor& x) { return x.slice(0, begin, end); };
    std::vector<detail::Term> terms = {{bases[i], part(of_basis)}};
    if (of_rows.defined()) {
      terms.push_back({rows[i], part(of_rows)});
    }
    detail::tall_combine(terms);
    const LowRankEigen& factor = parts[i].factor;
    if (factor.narrow_) {
      factor.basis_.copy_(bases[i]);
    }
    factor.eigenvalues_.copy_(part(values));
    factor.trace_.copy_(part(trace));
  });
  return failed;
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
