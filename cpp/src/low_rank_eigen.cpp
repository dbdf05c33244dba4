#include "ctrlora/low_rank_eigen.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "detail/check.h"
#include "detail/philox.h"
#include "detail/small_matrix.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

using detail::as_column;
using detail::select_layers;
using detail::small_bmm;

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

namespace {

// Slabs of several factors, whose small tensors lie below each other.
using Slabs = std::vector<at::Tensor>;

// f(i, begin, end) for each slab and its layers.
template <typename F>
void for_each(const Slabs& slabs, const F& f) {
  int64_t begin = 0;
  for (size_t i = 0; i < slabs.size(); ++i) {
    const int64_t end = begin + slabs[i].size(0);
    f(i, begin, end);
    begin = end;
  }
}

at::Tensor below(const std::vector<at::Tensor>& parts) {
  return parts.size() == 1 ? parts.front() : at::cat(parts);
}

// Products of the present basis U and the new rows' part Y of F U, all (L, k, k).
struct JointGram {
  at::Tensor uu, uy, yy;

  JointGram(const Slabs& bases, const Slabs& fresh) {
    std::vector<at::Tensor> joint, own;
    for (size_t i = 0; i < bases.size(); ++i) {
      std::vector<at::Tensor> grams =
          detail::tall_grams({{{bases[i], fresh[i]}, fresh[i]}, {{bases[i]}, bases[i]}});
      joint.push_back(std::move(grams[0]));
      own.push_back(std::move(grams[1]));
    }
    const int64_t k = bases.front().size(2);
    const at::Tensor of_both = below(joint);
    uy = of_both.slice(1, 0, k);
    yy = of_both.slice(1, k);
    uu = below(own);
  }
};

at::Tensor symmetric(const at::Tensor& x) {
  return (x + x.mT()) * 0.5;
}

struct Nystrom {
  at::Tensor map;     // (L, k, k): the new basis is range @ map
  at::Tensor values;  // (L, k)
  at::Tensor ok;      // (L) bool
};

// Nystrom approximation P K^-1 P^T of F from P = F U = U kept + Y, for F of mean eigenvalue 1.
// Everything but two combinations of U and Y is rank-space algebra on their Grams.
// @param fresh Y; becomes the range of P, orthonormal up to the second Cholesky-QR pass.
Nystrom nystrom(const Slabs& bases, const Slabs& fresh, const at::Tensor& kept) {
  const double eps = bases.front().scalar_type() == at::kDouble ? 1e-15 : 1e-7;
  const JointGram gram(bases, fresh);
  const at::Tensor up = gram.uu * kept.unsqueeze(1) + gram.uy;       // U^T P
  const at::Tensor yp = gram.uy.mT() * kept.unsqueeze(1) + gram.yy;  // Y^T P
  const at::Tensor core = symmetric(up);
  const at::Tensor square =  // (L, k) of P's columns
      (kept.unsqueeze(-1) * up + yp).diagonal(0, -2, -1).clamp_min(0);

  // Columns C_j = (P_j + mu_j U_j) / (K_jj + mu_j) are near orthonormal when U is warm. What lies
  // below mu need not be told apart: the damping's size, or what a Gram can tell from rounding.
  constexpr double kMu = 0.01;
  const at::Tensor mu = (square.sqrt() * std::sqrt(10 * eps)).clamp_min(kMu);
  const at::Tensor unit = 1 / (core.diagonal(0, -2, -1).clamp_min(0) + mu);
  const at::Tensor of_u = ((kept + mu) * unit).unsqueeze(-1);
  const at::Tensor of_y = unit.unsqueeze(-1);
  const at::Tensor cross = gram.uy * of_u * of_y.mT();
  const detail::OrthonormalMap first = detail::orthonormal_map(
      gram.uu * of_u * of_u.mT() + cross + cross.mT() + gram.yy * of_y * of_y.mT(), eps);
  const at::Tensor of_fresh = of_y * first.map, of_basis = of_u * first.map;
  std::vector<at::Tensor> grams;
  for_each(bases, [&](size_t i, int64_t begin, int64_t end) {  // Z = C first
    detail::tall_combine(
        {{fresh[i], of_fresh.slice(0, begin, end)}, {bases[i], of_basis.slice(0, begin, end)}});
    grams.push_back(detail::tall_grams({{{bases[i], fresh[i]}, fresh[i]}}).front());
  });
  const at::Tensor joint = below(grams);
  const at::Tensor uz = joint.slice(1, 0, kept.size(1));
  const at::Tensor zz = joint.slice(1, kept.size(1));
  const detail::OrthonormalMap second = detail::orthonormal_map(zz, eps);

  // Of F + nu I, and nu taken off again (Tropp et al. 2017, algorithm 3): where F has next to
  // nothing, K is the rounding of its large entries, which K^-1 would blow up. Z^T P by way of
  // P = C / unit - mu U, C = Z first^-1, for the same reason: not from the Grams that made Z.
  const at::Tensor nu = square.sum(-1, /*keepdim=*/true).sqrt() * (4 * eps);  // (L, 1)
  const at::Tensor back =
      at::linalg_solve_triangular(first.map, at::diag_embed(1 / unit), /*upper=*/true);
  const at::Tensor projected =
      small_bmm(second.map.mT(), small_bmm(zz, back) - uz.mT() * (mu - nu).unsqueeze(-2));
  const detail::Cholesky cholesky = detail::robust_cholesky(core + gram.uu * nu.unsqueeze(-1), eps);
  const at::Tensor half =
      at::linalg_solve_triangular(cholesky.factor, projected.mT(), /*upper=*/false);
  const at::Tensor inside = small_bmm(half.mT(), half);
  const detail::Eigh eigh = detail::symmetric_eigh(inside);
  return {small_bmm(second.map, eigh.vectors), eigh.values - nu,
          first.ok.logical_and(second.ok)
              .logical_and(cholesky.ok)
              .logical_and(detail::finite_layers(inside))
              .logical_and(detail::finite_layers(eigh.values))};
}

}  // namespace

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
  const auto joined = [&](const auto& field) {
    std::vector<at::Tensor> tensors;
    for (const Update& part : parts) {
      tensors.push_back(field(part));
    }
    return below(tensors);
  };
  const auto number = [&](const auto& field) {  // (L) float64 of a number of each factor
    return joined(
        [&](const Update& part) { return at::full_like(part.factor.trace_, field(part)); });
  };
  const at::Tensor weight = joined([](const Update& part) { return part.sketch.weight; });
  const at::Tensor added = joined([](const Update& part) { return part.sketch.trace; });
  const at::Tensor keep = joined([](const Update& part) { return part.keep; });
  const at::Tensor scale = joined([](const Update& part) { return part.scale; });
  const at::Tensor eigenvalues =
      joined([](const Update& part) { return part.factor.eigenvalues_; });
  const at::Tensor present = joined([](const Update& part) { return part.factor.trace_; });
  const at::Tensor finite =
      joined([](const Update& part) { return detail::finite_layers(part.sketch.product); });
  const at::Tensor size =
      number([](const Update& part) { return static_cast<double>(part.factor.size()); });
  const at::Tensor least = number([](const Update& part) {
    return detail::smallest_trace(part.factor.size(), part.factor.dtype());
  });

  at::Tensor live = (weight > 0)
                        .logical_and(added > least)
                        .logical_and(keep < 1)
                        .logical_and(finite)
                        .logical_and((added * scale / weight).isfinite());
  const at::Tensor fresh = at::where(live, (1 - keep) * scale / weight, at::zeros_like(keep));
  const at::Tensor old = at::where(live, keep, at::ones_like(keep));
  const at::Tensor trace = old * present + fresh * at::where(live, added, at::zeros_like(present));

  // In units of the mean eigenvalue, so that squares of small gradients stay in range.
  const at::Tensor mean = (trace / size).clamp_min(1e-300);
  const at::Tensor kept = (old / mean).unsqueeze(-1) * eigenvalues;
  const at::Tensor unit = fresh / mean;
  Slabs bases, rows;
  for (const Update& part : parts) {
    bases.push_back(part.factor.computed_basis());
    const at::Tensor& product = part.sketch.product;
    const bool in_place = part.sketch.disposable && product.strides() == bases.back().strides();
    rows.push_back(in_place ? product : at::empty_like(bases.back()));  // in the basis' layout
  }
  for_each(bases, [&](size_t i, int64_t begin, int64_t end) {
    const at::Tensor& product = parts[i].sketch.product;
    const at::Tensor enters = live.slice(0, begin, end);
    at::mul_out(rows[i],
                detail::known_to_be_true(enters)
                    ? product
                    : select_layers(enters, product, at::zeros({}, product.options())),
                as_column(unit.slice(0, begin, end)).to(rows[i].scalar_type()));
  });
  // All that may throw (no memory) comes before a factor's first write, so that it is as it was or
  // whole: tall_combine allocates, then writes.
  const int64_t k = kept.size(1);
  const at::Tensor identity = at::eye(k, kept.options()).expand({kept.size(0), -1, -1});
  const bool complete = k == parts.front().factor.size();
  at::Tensor values, of_basis, of_rows;
  if (complete) {  // K is the factor itself
    const JointGram gram(bases, rows);
    const at::Tensor core = symmetric(gram.uu * kept.unsqueeze(1) + gram.uy);
    const detail::Eigh eigh = detail::symmetric_eigh(core);
    live = live.logical_and(detail::finite_layers(core))
               .logical_and(detail::finite_layers(eigh.values));
    of_basis = select_layers(live, eigh.vectors, identity);
    values = eigh.values;
  } else {
    const Nystrom next = nystrom(bases, rows, kept);
    // It is below F: a sum above the trace is a decomposition that went wrong.
    live = live.logical_and(next.ok).logical_and(next.values.sum(-1) < 1.01 * size);
    const at::Tensor zero = at::zeros({}, kept.options());
    of_basis = select_layers(live, zero, identity);
    of_rows = select_layers(live, next.map, zero);
    values = next.values;
  }
  values = select_layers(live, values.clamp_min(0) * mean.unsqueeze(-1), eigenvalues);
  const at::Tensor whole = at::where(live, trace, present);
  const at::Tensor failed = (fresh > 0).logical_and(live.logical_not());
  for_each(bases, [&](size_t i, int64_t begin, int64_t end) {
    const auto part = [&](const at::Tensor& x) { return x.slice(0, begin, end); };
    std::vector<detail::Term> terms = {{bases[i], part(of_basis)}};
    if (!complete) {
      terms.push_back({rows[i], part(of_rows)});
    }
    detail::tall_combine(terms);
    const LowRankEigen& factor = parts[i].factor;
    if (factor.narrow_) {
      factor.basis_.copy_(bases[i]);
    }
    factor.eigenvalues_.copy_(part(values));
    factor.trace_.copy_(part(whole));
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
