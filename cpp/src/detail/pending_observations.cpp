#include "detail/pending_observations.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "detail/philox.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora::detail {

namespace {

// Early commits of the gradient proxy may see zero gradients (B = 0): keep starting anew while
// nothing has entered a factor.
constexpr int64_t kProxyStarts = 5;

void add_sketch(FactorSketch& sums, const FactorSketch& sketch) {
  if (!sums.product.defined()) {
    sums = sketch;
    return;
  }
  sums.product = sums.product + sketch.product;
  sums.trace = sums.trace + sketch.trace;
  sums.weight = sums.weight + sketch.weight;
}

FactorSketch empty_sketch(const LowRankEigen& factor) {
  const at::Tensor none = at::zeros({1}, factor.trace().options());
  const at::Tensor basis = factor.basis().slice(0, 0, 1);
  return {at::zeros_like(basis, factor.options()), none, none};
}

// A slab with the layers' numbers one after the other, as all of it lies in memory.
at::Tensor in_memory_order(const at::Tensor& slab) {
  return slab[0].is_contiguous() ? slab : slab.mT();
}

struct Part {
  const FactorSketch* sums;
  at::Tensor memory;  // of the product, prepared in the backward: no call per layer in a step
};

// @param factor of these layers. @param rows where to put the products on a CPU, kept for the next
// time.
FactorSketch concatenate(const std::vector<Part>& parts,
                         const LowRankEigen& factor,
                         at::Tensor& rows) {
  const at::Tensor& basis = factor.basis();
  std::vector<at::Tensor> product, trace, weight;
  for (std::vector<at::Tensor>* list : {&product, &trace, &weight}) {
    list->reserve(parts.size());
  }
  for (const Part& part : parts) {
    product.push_back(part.memory);
    trace.push_back(part.sums->trace);
    weight.push_back(part.sums->weight);
  }
  at::Tensor all;
  if (basis.is_cpu()) {
    if (!rows.defined() || rows.size(0) < basis.size(0) || rows.scalar_type() != factor.dtype()) {
      rows = at::empty_like(basis, factor.options());
    }
    all = in_memory_order(rows.slice(0, 0, basis.size(0)));
    at::cat_out(all, product);
  } else {
    rows.reset();
    all = at::cat(product);
  }
  return {basis[0].is_contiguous() ? all : all.mT(), at::cat(trace), at::cat(weight),
          /*disposable=*/true};
}

FactorSketch select_sketch(const at::Tensor& mask,
                           const FactorSketch& yes,
                           const FactorSketch& no) {
  return {select_layers(mask, yes.product, no.product), at::where(mask, yes.trace, no.trace),
          at::where(mask, yes.weight, no.weight), /*disposable=*/true};
}

// Rows that hold a non-finite number, or overflow, become zero.
PendingObservations::Rows finite_rows(const at::Tensor& values) {
  PendingObservations::Rows rows;
  rows.values = values.unsqueeze(0);
  rows.squares = row_squares(values).unsqueeze(0);
  rows.finite = rows.squares < std::numeric_limits<double>::infinity();  // false for NaN, too
  if (!known_to_be_true(rows.finite)) {
    const auto clean = [](const at::Tensor& mask, const at::Tensor& x) {
      return at::where(mask, x, at::zeros({}, x.options()));
    };
    rows.values = clean(rows.finite.unsqueeze(-1), rows.values);
    rows.squares = clean(rows.finite, rows.squares);
  }
  return rows;
}

}  // namespace

PendingObservations::PendingObservations(int64_t layers, const Options& options)
    : seed_(options.seed),
      observe_every_(options.factor_every),
      mean_loss_(options.loss_reduction == "mean"),
      sums_(static_cast<size_t>(layers)),
      share_set_(at::full({layers}, -1, at::kLong)),
      started_(at::zeros({layers}, at::kBool)),
      observed_(at::zeros({layers}, at::kBool)) {}

std::vector<std::pair<std::string, at::Tensor>> PendingObservations::named_tensors() const {
  return {{"share_set", share_set_}, {"started", started_}, {"observed", observed_}};
}

bool PendingObservations::is(const at::Tensor& flags, int64_t layer) {
  return flags.const_data_ptr<bool>()[layer];
}

void PendingObservations::set(const at::Tensor& flags, int64_t layer) {
  flags.data_ptr<bool>()[layer] = true;
}

int64_t PendingObservations::micro_batch(int64_t layer) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return sums_[static_cast<size_t>(layer)].count;
}

// A share set must stay within one part of the schedule: only then are its bases refreshed
// together.
bool PendingObservations::together(int64_t layer, int64_t other) const {
  const auto layers = static_cast<int64_t>(sums_.size());
  const auto part = [&](int64_t l) { return l * observe_every_ / layers; };
  return part(layer) == part(other);
}

// Sets that were found under another schedule.
void PendingObservations::separate() {
  auto* set = share_set_.data_ptr<int64_t>();
  for (int64_t l = 0; l < share_set_.numel(); ++l) {
    if (set[l] >= 0 && !together(l, set[l])) {
      set[l] = l;
    }
  }
}

FactorSketch PendingObservations::input_sketch(int64_t layer,
                                               const Observation& observation,
                                               const Rows& rows,
                                               KroneckerFactors& factors) {
  auto* set = share_set_.data_ptr<int64_t>() + layer;
  const bool same_input = last_.inputs.defined() && last_.inputs.is_same(observation.inputs);
  const bool first = *set < 0;
  if (first) {
    *set = same_input && last_.set >= 0 && together(layer, last_.set) ? last_.set : layer;
  }
  LowRankEigen factor = factors.input.slice(layer, layer + 1);
  if (!is(started_, layer)) {
    factor.start_basis(rows.values, at::ones({1}, rows.finite.options()), seed_);
  }
  if (same_input && *set == last_.set) {
    return last_.sketch;
  }
  if (!first && *set != layer && *set == last_.set) {
    *set = layer;  // another input than the rest of its set: on its own from now on
  }
  last_ = {observation.inputs, rows, *set, factor.sketch(rows.values, rows.weights, rows.squares)};
  return last_.sketch;
}

void PendingObservations::add(int64_t layer,
                              const Observation& observation,
                              KroneckerFactors& factors) {
  const std::lock_guard<std::mutex> lock(mutex_);
  LowRankEigen output = factors.output.slice(layer, layer + 1);
  if (observation.inputs.device() != output.basis().device() ||
      observation.inputs.size(-1) != factors.input.size() ||
      observation.output_grads.size(-1) != output.size()) {
    return;  // a model in the middle of a move, or a module whose output is not this layer's
  }
  const at::ScalarType dtype = output.dtype();
  const bool known = last_.inputs.defined() && last_.inputs.is_same(observation.inputs);
  Rows inputs = known ? last_.rows : finite_rows(observation.inputs.to(dtype));
  Rows grads = finite_rows(observation.output_grads.to(dtype));
  // Rows without a gradient (padding, ignored labels) and rows with non-finite numbers do not
  // count.
  const at::Tensor counts = (grads.squares > 0).logical_and_(inputs.finite);
  inputs.weights = grads.weights = counts.to(at::kDouble) * observation.row_weight;

  Sums& sums = sums_[static_cast<size_t>(layer)];
  add_sketch(sums.input, input_sketch(layer, observation, inputs, factors));
  if (!is(started_, layer)) {
    output.start_basis(grads.values, at::ones({1}, counts.options()), seed_);
  }
  add_sketch(sums.output, output.sketch(grads.values, grads.weights, grads.squares));
  const at::TensorOptions numbers = grads.weights.options();
  const at::Tensor base =
      observation.base_square.defined()
          ? at::where(counts, observation.base_square * grads.weights, at::zeros({}, numbers))
                .sum(-1)
          : at::full({1}, -1.0, numbers);
  sums.base_square = sums.base_square.defined() ? sums.base_square + base : base;
  const at::Tensor sequences = at::full({1}, static_cast<double>(observation.sequences), numbers);
  sums.sequences = sums.sequences.defined() ? sums.sequences + sequences : sequences;
  sums.input_memory = in_memory_order(sums.input.product);
  sums.output_memory = in_memory_order(sums.output.product);
  sums.count += 1;
  set(started_, layer);
  set(observed_, layer);
}

CurvatureSketch PendingObservations::collect(int64_t begin,
                                             int64_t end,
                                             int64_t age,
                                             KroneckerFactors& factors,
                                             const GradientRows& gradient_rows,
                                             const at::Tensor& grad_ok) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const FactorSketch no_input = empty_sketch(factors.input);
  const FactorSketch no_output = empty_sketch(factors.output);
  const Part no_input_part{&no_input, in_memory_order(no_input.product)};
  const Part no_output_part{&no_output, in_memory_order(no_output.product)};
  std::vector<Part> input, output;
  std::vector<at::Tensor> base_square, sequences;
  std::vector<uint8_t> proxy;  // one tensor at the end: no launch per layer
  bool any_proxy = false;
  for (int64_t l = begin; l < end; ++l) {
    const Sums& sums = sums_[static_cast<size_t>(l)];
    const bool has = sums.count > 0;
    const bool needs_proxy = !has && !is(observed_, l);
    any_proxy = any_proxy || needs_proxy;
    input.push_back(has ? Part{&sums.input, sums.input_memory} : no_input_part);
    output.push_back(has ? Part{&sums.output, sums.output_memory} : no_output_part);
    base_square.push_back(has ? sums.base_square : no_input.weight);
    sequences.push_back(has ? sums.sequences : no_input.weight);
    proxy.push_back(needs_proxy ? 1 : 0);  // with other processes: unless one of them observed it
  }
  CurvatureSketch sketch{concatenate(input, factors.input, input_rows_),
                         concatenate(output, factors.output, output_rows_), at::cat(base_square),
                         at::cat(sequences),
                         at::tensor(proxy, at::kByte).to(grad_ok.device(), at::kBool)};
  if (processes_ != nullptr) {
    sketch = processes_->sum(sketch, mean_loss_);
  }
  if (any_proxy) {
    const auto [rows_a, rows_b] = gradient_rows();
    const at::Tensor weights =
        grad_ok.to(at::kDouble).unsqueeze(-1).expand({end - begin, rows_a.size(1)});
    if (age < kProxyStarts * observe_every_) {
      const at::Tensor fresh = sketch.from_gradient.logical_and(factors.seen == 0);
      factors.input.start_basis(rows_a, fresh, seed_);
      factors.output.start_basis(rows_b, fresh, seed_);
    }
    sketch.input =
        select_sketch(sketch.from_gradient, factors.input.sketch(rows_a, weights), sketch.input);
    sketch.output =
        select_sketch(sketch.from_gradient, factors.output.sketch(rows_b, weights), sketch.output);
  }
  return sketch;
}

void PendingObservations::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Sums& sums : sums_) {
    sums = {};
  }
  last_ = {};
}

void PendingObservations::set_processes(std::shared_ptr<const Processes> processes,
                                        int64_t observe_every,
                                        KroneckerFactors& factors) {
  clear();
  const std::lock_guard<std::mutex> lock(mutex_);
  processes_ = std::move(processes);
  observe_every_ = observe_every;
  separate();
  start_all(factors);
}

// No process can start a basis from its own rows: the sums of all must be in one basis.
void PendingObservations::start_all(KroneckerFactors& factors) {
  const at::Tensor missing = started_.logical_not();
  started_.fill_(true);
  for (LowRankEigen* factor : {&factors.input, &factors.output}) {
    const at::Tensor& basis = factor->basis();
    const at::Tensor rows =
        philox_normal(seed_, 3, {1, factor->sketch_rank(), factor->size()}, factor->options());
    factor->start_basis(rows.expand({basis.size(0), -1, -1}), missing.to(basis.device()), seed_);
  }
}

void PendingObservations::resume(KroneckerFactors& factors) {
  const std::lock_guard<std::mutex> lock(mutex_);
  separate();
  if (processes_ != nullptr) {
    start_all(factors);
  }
}

}  // namespace ctrlora::detail
