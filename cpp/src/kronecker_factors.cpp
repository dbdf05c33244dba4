#include "ctrlora/kronecker_factors.h"

#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>

#include "detail/factor_refresh.h"
#include "detail/owners.h"
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

using detail::joined;
using Commit = KroneckerFactors::Commit;

// One side's sums and what it has so far, of all layers.
struct Side {
  at::Tensor trace, weight;         // (L) of the sums
  at::Tensor size, smallest, mean;  // (L) d; trace that counts as something; trace of the factor

  Side(const std::vector<Commit>& parts,
       FactorSketch CurvatureSketch::* sums,
       LowRankEigen KroneckerFactors::* factor) {
    trace = joined(parts, [&](const Commit& part) { return (part.sketch.*sums).trace; });
    weight = joined(parts, [&](const Commit& part) { return (part.sketch.*sums).weight; });
    mean = joined(parts, [&](const Commit& part) { return (part.factors.*factor).trace(); });
    const auto number = [&](const auto& of) {
      return joined(parts, [&](const Commit& part) {
        return at::full_like(part.factors.base_square, of(part.factors.*factor));
      });
    };
    size = number([](const LowRankEigen& own) { return static_cast<double>(own.size()); });
    smallest = number(
        [](const LowRankEigen& own) { return detail::smallest_trace(own.size(), own.dtype()); });
  }

  // The gradient proxy has no scale of its own: normalised to a mean eigenvalue of 1.
  [[nodiscard]] at::Tensor unit() const { return size * weight / trace; }

  // The scale at which a sample enters: a spike's trace is bounded, its shape stays.
  [[nodiscard]] at::Tensor calm(const at::Tensor& scale, const at::Tensor& known) const {
    const at::Tensor sample = scale * trace / weight;
    const at::Tensor entering = detail::bounded_sample(sample, mean, known);
    return at::where(entering < sample, scale * (entering / sample), scale);
  }
};

// Factor on the mean of g g^T that makes it E[g^ g^T] for one loss term: with T terms in W rows,
// mean loss: S = T sum(w g g^T) = (T W) mean; summed loss: S = sum(w g g^T) / T = (W / T) mean.
at::Tensor loss_scale_of_output(const at::Tensor& rows,
                                const at::Tensor& sequences,
                                const Options& options) {
  at::Tensor terms = rows;
  if (options.loss_terms == kLossTermsSequences) {
    terms = sequences;
  } else if (options.loss_terms != kLossTermsTokens) {
    terms = at::full_like(rows, static_cast<double>(options.loss_terms));
  }
  const double unscale = 1.0 / (options.loss_scale * options.loss_scale);
  return (options.loss_reduction == "mean" ? terms * rows : rows / terms) * unscale;
}

using Batch = std::vector<LowRankEigen::Update>;

// Both sides of all parts, in as few batches as their sketch ranks allow.
struct Batches {
  std::vector<Batch> updates;
  std::vector<std::vector<at::Tensor>> places;  // where in `failed` each update's layers are
  at::Tensor failed;                            // (L) bool

  Batches(const std::vector<Commit>& parts,
          const at::Tensor& keep,
          const at::Tensor& input_scale,
          const at::Tensor& output_scale,
          bool divided)
      : failed(at::zeros(keep.sizes(), keep.options().dtype(at::kBool))) {
    int64_t begin = 0;
    for (const Commit& part : parts) {
      const int64_t end = begin + part.factors.base_square.size(0);
      const auto own = [&](const at::Tensor& x) { return x.slice(0, begin, end); };
      add({part.factors.input, part.sketch.input, own(keep), own(input_scale)}, own(failed),
          divided);
      add({part.factors.output, part.sketch.output, own(keep), own(output_scale)}, own(failed),
          divided);
      begin = end;
    }
  }

  void add(LowRankEigen::Update update, const at::Tensor& place, bool divided) {
    const auto fits = [&](const Batch& batch) {
      const LowRankEigen& first = batch.front().factor;
      return first.updates_with(update.factor) &&
             (!divided || detail::Owners::divides(first) == detail::Owners::divides(update.factor));
    };
    const auto b =
        static_cast<size_t>(std::find_if(updates.begin(), updates.end(), fits) - updates.begin());
    if (b == updates.size()) {
      updates.emplace_back();
      places.emplace_back();
    }
    updates[b].push_back(std::move(update));
    places[b].push_back(place);
  }
};

// The refresh of all batches; with `owners`, decompositions are divided where that is worth it.
// @return (L) bool: those of `has` whose sums entered: all, or none where a process left.
at::Tensor refresh(const Batches& batches, const at::Tensor& has, detail::Owners* owners) {
  std::vector<detail::FactorRefresh> all;
  std::vector<std::optional<detail::Owners::Share>> shares(batches.updates.size());
  all.reserve(batches.updates.size());
  for (size_t b = 0; b < batches.updates.size(); ++b) {
    all.emplace_back(batches.updates[b]);
    if (owners == nullptr || !detail::Owners::divides(batches.updates[b].front().factor)) {
      all[b].decompose();
      continue;
    }
    shares[b] = owners->next(all[b].bases());
    if (shares[b]->begin < shares[b]->end) {
      shares[b]->put(all[b].decompose(shares[b]->begin, shares[b]->end));
    }
  }
  at::Tensor complete;
  if (owners != nullptr) {
    owners->exchange();
    complete = owners->complete();
  }
  for (size_t b = 0; b < all.size(); ++b) {
    if (shares[b]) {
      all[b].adopt(shares[b]->all());
    }
    const at::Tensor each = all[b].finish(complete);
    int64_t at = 0;
    for (const at::Tensor& place : batches.places[b]) {
      place.logical_or_(each.slice(0, at, at + place.size(0)));
      at += place.size(0);
    }
  }
  return complete.defined() ? has.logical_and(complete) : has;
}

}  // namespace

void KroneckerFactors::commit(const CurvatureSketch& sketch, const Options& options) {
  commit_all({{*this, sketch}}, options);
}

std::shared_ptr<detail::Owners> KroneckerFactors::owners(
    const std::vector<Commit>& parts, std::shared_ptr<const Processes> processes) {
  std::vector<LowRankEigen> sides;
  sides.reserve(2 * parts.size());
  for (const Commit& part : parts) {
    sides.push_back(part.factors.input);
    sides.push_back(part.factors.output);
  }
  return std::make_shared<detail::Owners>(std::move(processes), sides);
}

void KroneckerFactors::commit_all(const std::vector<Commit>& parts,
                                  const Options& options,
                                  detail::Owners* owners) {
  try {
    enter(parts, options, owners);
  } catch (...) {
    if (owners != nullptr) {
      owners->leave();
    }
    throw;
  }
}

void KroneckerFactors::enter(const std::vector<Commit>& parts,
                             const Options& options,
                             detail::Owners* owners) {
  const auto of_sketch = [&](at::Tensor CurvatureSketch::* field) {
    return joined(parts, [&](const Commit& part) { return part.sketch.*field; });
  };
  const auto present = [&](at::Tensor KroneckerFactors::* field) {
    return joined(parts, [&](const Commit& part) { return part.factors.*field; });
  };
  const Side input(parts, &CurvatureSketch::input, &KroneckerFactors::input);
  const Side output(parts, &CurvatureSketch::output, &KroneckerFactors::output);
  const at::Tensor base = of_sketch(&CurvatureSketch::base_square);
  const at::Tensor proxy = of_sketch(&CurvatureSketch::from_gradient);
  const at::Tensor seen = present(&KroneckerFactors::seen);
  const at::Tensor absolute = present(&KroneckerFactors::absolute);
  const at::Tensor misses = present(&KroneckerFactors::misses);
  const at::Tensor base_square = present(&KroneckerFactors::base_square);

  const at::Tensor has = (input.weight > 0)
                             .logical_and(input.trace > input.smallest)
                             .logical_and(output.trace > output.smallest)
                             .logical_and(input.trace.isfinite())
                             .logical_and(output.trace.isfinite());
  // The gradient proxy gives way to the first observation, whose scale differs from its own.
  const at::Tensor restart =
      has.logical_and(absolute.logical_not()).logical_and(proxy.logical_not());
  const at::Tensor count = at::where(restart, at::zeros_like(seen), seen) + 1;
  at::Tensor keep = (1 - 1 / count).clamp_max(options.factor_beta);
  keep = at::where(has, keep, at::ones_like(keep));
  const at::Tensor known = count > 1;
  const at::Tensor observed =
      loss_scale_of_output(output.weight, of_sketch(&CurvatureSketch::sequences), options);
  const Batches batches(
      parts, keep, input.calm(at::where(proxy, input.unit(), at::ones_like(keep)), known),
      output.calm(at::where(proxy, output.unit(), observed), known), owners != nullptr);
  const at::Tensor entered = refresh(batches, has, owners);

  // A base whose output nobody handed over counts as unobserved: negative.
  const at::Tensor assumed = proxy.logical_or(base < 0);
  const at::Tensor trace =
      joined(parts, [](const Commit& part) { return part.factors.input.trace(); });  // as it is now
  const at::Tensor fresh =
      at::where(assumed, trace * (output.size / input.size), base / input.weight);
  const at::Tensor entering = detail::bounded_sample(fresh, base_square, known);
  const at::Tensor mixed = at::where(assumed, fresh, keep * base_square + (1 - keep) * entering);
  const at::Tensor new_base = at::where(entered.logical_and(mixed.isfinite()), mixed, base_square);
  const at::Tensor new_seen = at::where(entered, count, seen);
  const at::Tensor new_absolute = at::where(entered, proxy.logical_not(), absolute);
  const at::Tensor new_misses =
      at::where(entered, (misses + batches.failed) * batches.failed, misses);
  int64_t begin = 0;
  for (const Commit& part : parts) {
    const int64_t end = begin + part.factors.base_square.size(0);
    part.factors.base_square.copy_(new_base.slice(0, begin, end));
    part.factors.seen.copy_(new_seen.slice(0, begin, end));
    part.factors.absolute.copy_(new_absolute.slice(0, begin, end));
    part.factors.misses.copy_(new_misses.slice(0, begin, end));
    begin = end;
  }
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
