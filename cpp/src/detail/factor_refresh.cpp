#include "detail/factor_refresh.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <utility>

#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora::detail {

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
    const auto of_all = [&](const auto& field) { return joined(parts, field); };
    const auto number = [&](const auto& field) {  // one of each factor
      return of_all(
          [&](const auto& part) { return at::full_like(part.factor.trace(), field(part.factor)); });
    };
    const at::Tensor weight = of_all([](const auto& part) { return part.sketch.weight; });
    const at::Tensor trace = of_all([](const auto& part) { return part.sketch.trace; });
    const at::Tensor keep = of_all([](const auto& part) { return part.keep; });
    const at::Tensor scale = of_all([](const auto& part) { return part.scale; });
    const at::Tensor finite =
        of_all([](const auto& part) { return finite_layers(part.sketch.product); });
    const at::Tensor least = number(
        [](const LowRankEigen& factor) { return smallest_trace(factor.size(), factor.dtype()); });
    size = number([](const LowRankEigen& factor) { return static_cast<double>(factor.size()); });
    eigenvalues = of_all([](const auto& part) { return part.factor.eigenvalues(); });
    present = of_all([](const auto& part) { return part.factor.trace(); });
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
                known_to_be_true(enters)
                    ? product
                    : select_layers(enters, product, at::zeros({}, product.options())),
                as_column(unit.slice(0, begin, end)).to(out.scalar_type()));
    rows.push_back(out);
  });
  return rows;
}

// Layers [begin, end) of the batch, slab by slab.
Slabs part_of(const Slabs& slabs, int64_t begin, int64_t end) {
  Slabs out;
  for_each(slabs, [&](size_t i, int64_t first, int64_t last) {
    const int64_t from = std::max(begin, first), to = std::min(end, last);
    if (from < to) {
      out.push_back(slabs[i].slice(0, from - first, to - first));
    }
  });
  return out;
}

}  // namespace

FactorRefresh::FactorRefresh(Updates parts) : parts_(std::move(parts)) {
  const JoinedUpdates joined(parts_);
  // In units of the mean eigenvalue, so that squares of small gradients stay in range.
  mean_ = (joined.next / joined.size).clamp_min(1e-300);
  kept_ = (joined.old / mean_).unsqueeze(-1) * joined.eigenvalues;
  bases_.reserve(parts_.size());
  for (const LowRankEigen::Update& part : parts_) {
    bases_.push_back(part.factor.computed_basis());
  }
  rows_ = scaled_products(parts_, bases_, joined.live, joined.fresh / mean_);
  live_ = enters_ = joined.live;
  size_ = joined.size;
  present_ = joined.present;
  eigenvalues_ = joined.eigenvalues;
  next_ = joined.next;
}

void FactorRefresh::decompose() {
  if (bases_.front().size(1) == bases_.front().size(2)) {  // complete: K is the factor itself
    const JointGram gram(bases_, rows_);
    const at::Tensor core = symmetric(gram.uu * kept_.unsqueeze(1) + gram.uy);
    const Eigh eigh = symmetric_eigh(core);
    live_ = live_.logical_and(finite_layers(core)).logical_and(finite_layers(eigh.values));
    of_basis_ = eigh.vectors;
    values_ = eigh.values;
    return;
  }
  take(nystrom(bases_, rows_, kept_));
}

Nystrom FactorRefresh::decompose(int64_t begin, int64_t end) const {
  Slabs range = part_of(rows_, begin, end);  // the batch's own becomes the range in adopt()
  for (at::Tensor& slab : range) {
    slab = slab.clone();
  }
  return nystrom(part_of(bases_, begin, end), range, kept_.slice(0, begin, end));
}

void FactorRefresh::adopt(const Nystrom& all) {
  to_range(bases_, rows_, all);
  take(all);
}

void FactorRefresh::take(const Nystrom& next) {
  // It is below F: a sum above the trace is a decomposition that went wrong.
  live_ = live_.logical_and(next.ok).logical_and(next.values.sum(-1) < 1.01 * size_);
  of_basis_ = at::zeros({}, kept_.options());
  of_rows_ = next.map;
  values_ = next.values;
}

at::Tensor FactorRefresh::finish(const at::Tensor& wanted) {
  if (wanted.defined()) {
    live_ = live_.logical_and(wanted);
  }
  const at::Tensor identity =
      at::eye(kept_.size(1), kept_.options()).expand({kept_.size(0), -1, -1});
  const at::Tensor of_basis = select_layers(live_, of_basis_, identity);
  const at::Tensor of_rows = of_rows_.defined()
                                 ? select_layers(live_, of_rows_, at::zeros({}, kept_.options()))
                                 : at::Tensor();
  const at::Tensor values =
      select_layers(live_, values_.clamp_min(0) * mean_.unsqueeze(-1), eigenvalues_);
  const at::Tensor trace = at::where(live_, next_, present_);
  const at::Tensor failed = enters_.logical_and(live_.logical_not());
  // All that may throw (no memory) comes before a factor's first write, so that it is as it was or
  // whole: tall_combine allocates, then writes.
  for_each(bases_, [&](size_t i, int64_t begin, int64_t end) {
    const auto part = [&](const at::Tensor& x) { return x.slice(0, begin, end); };
    std::vector<Term> terms = {{bases_[i], part(of_basis)}};
    if (of_rows.defined()) {
      terms.push_back({rows_[i], part(of_rows)});
    }
    tall_combine(terms);
    const LowRankEigen& factor = parts_[i].factor;
    if (factor.basis().scalar_type() != bases_[i].scalar_type()) {  // kept narrow
      factor.basis().copy_(bases_[i]);
    }
    factor.eigenvalues().copy_(part(values));
    factor.trace().copy_(part(trace));
  });
  return failed;
}

}  // namespace ctrlora::detail
