#include "ctrlora/layer_group.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "ctrlora/gauge.h"
#include "detail/parameter_slabs.h"
#include "detail/pending_observations.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

using detail::as_column;
using detail::select_layers;

namespace {

at::ScalarType statistics_dtype(const at::Tensor& param) {
  return param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// One EMA step with its weight: biased sum and the sum of its coefficients.
void ema(const at::Tensor& value,
         const at::Tensor& weight,
         const at::Tensor& sample,
         const at::Tensor& live,
         double beta) {
  value.copy_(at::where(live, beta * value + (1 - beta) * sample, value));
  weight.copy_(at::where(live, beta * weight + (1 - beta), weight));
}

}  // namespace

LayerGroup::LayerGroup(std::vector<LoraPair> pairs,
                       int64_t group,
                       Options options,
                       std::shared_ptr<RowSampler> sampler)
    : pairs_(std::move(pairs)),
      group_(group),
      options_(std::move(options)),
      sampler_(std::move(sampler)),
      parameters_(std::make_unique<detail::ParameterSlabs>(pairs_)),
      observations_(std::make_unique<detail::PendingObservations>(layers(), options_)) {
  for (const LoraPair& pair : pairs_) {
    slots_.push_back(find_slot(pair.a));
  }
  const at::Tensor& a = pairs_.front().a;
  const int64_t count = layers();
  const at::TensorOptions statistics =
      at::TensorOptions().device(a.device()).dtype(statistics_dtype(a));
  const at::TensorOptions small = statistics.dtype(at::kDouble);
  momentum_a_ = at::zeros(parameters_->a().sizes(), statistics);
  momentum_b_ = at::zeros(parameters_->b().sizes(), statistics);
  momentum_weight_ = at::zeros({count}, small);
  rms_square_ = at::zeros({count}, small);
  rms_weight_ = at::zeros({count}, small);
  std::vector<double> scaling;
  scaling.reserve(pairs_.size());
  for (const LoraPair& pair : pairs_) {
    scaling.push_back(pair.scaling);
  }
  scaling_ = at::tensor(scaling, at::kDouble).to(a.device());
  active_ = at::ones({count}, small.dtype(at::kBool));
  grad_ok_ = at::ones({count}, small.dtype(at::kBool));
  misses_ = at::zeros({count}, small.dtype(at::kLong));
  skipped_ = at::zeros({count}, small.dtype(at::kLong));
  factors_ = KroneckerFactors(count, pairs_.front().in_features(), pairs_.front().out_features(),
                              options_, statistics);
}

LayerGroup::~LayerGroup() = default;

void LayerGroup::bind() {
  if (parameters_->bind()) {
    move_state(at::TensorOptions()
                   .device(parameters_->a().device())
                   .dtype(statistics_dtype(parameters_->a())));
  }
}

void LayerGroup::move_state(const at::TensorOptions& options) {
  momentum_a_ = momentum_a_.to(options);
  momentum_b_ = momentum_b_.to(options);
  for (at::Tensor* tensor : {&momentum_weight_, &rms_square_, &rms_weight_, &scaling_, &active_,
                             &grad_ok_, &misses_, &skipped_}) {
    *tensor = tensor->to(options.device());
  }
  factors_.to(options);
  observations_->clear();
}

// ---- One step ----

std::pair<at::Tensor, at::Tensor> LayerGroup::raw_gradients(Range range) const {
  const auto part = [&](const at::Tensor& x) { return x.slice(0, range.begin, range.end); };
  const auto [grads_a, grads_b] = parameters_->gradients(range.begin, range.end);
  return {detail::stack_gradients(grads_a, part(grad_ok_), part(momentum_a_)),
          detail::stack_gradients(grads_b, part(grad_ok_), part(momentum_b_))};
}

void LayerGroup::update_momentum() {
  const auto [grads_a, grads_b] = parameters_->gradients(0, layers());
  std::vector<uint8_t> present;
  for (const at::Tensor& grad : grads_a) {
    present.push_back(grad.defined() ? 1 : 0);
  }
  const at::Tensor exists = at::tensor(present, at::kByte).to(parameters_->a().device(), at::kBool);
  const at::Tensor finite = detail::finite_gradients(grads_a, momentum_a_)
                                .logical_and(detail::finite_gradients(grads_b, momentum_b_));
  grad_ok_ = finite.logical_and(exists).logical_and(active_);
  skipped_.add_(finite.logical_not());
  detail::momentum_step(grads_a, grad_ok_, momentum_a_, options_.beta1);
  detail::momentum_step(grads_b, grad_ok_, momentum_b_, options_.beta1);
  momentum_weight_ = at::where(grad_ok_, options_.beta1 * momentum_weight_ + (1 - options_.beta1),
                               momentum_weight_);
}

LayerGroup::Range LayerGroup::due(int64_t step) const {
  if (step < options_.factor_warmup_steps) {
    return {0, layers()};
  }
  const int64_t every = options_.factor_every;
  const int64_t part = step % every;  // layer l is due iff floor(l every / L) = part
  return {(part * layers() + every - 1) / every, ((part + 1) * layers() + every - 1) / every};
}

void LayerGroup::commit_observations() {
  const Range range = due(age_);
  if (range.begin < range.end) {
    KroneckerFactors view = factors_.slice(range.begin, range.end);
    const at::Tensor ok = grad_ok_.slice(0, range.begin, range.end);
    const auto rows = [&] {
      auto [raw_a, raw_b] = raw_gradients(range);
      return std::make_pair(raw_a, raw_b.mT());
    };
    view.commit(observations_->collect(range.begin, range.end, age_, view, rows, ok), options_);
  }
  observations_->clear();
}

void LayerGroup::update_rms(Range range,
                            const SideProducts& input,
                            const SideProducts& output,
                            const SideMetric& input_metric,
                            const SideMetric& output_metric) {
  const auto part = [&](const at::Tensor& x) { return x.slice(0, range.begin, range.end); };
  const at::Tensor ok = part(grad_ok_);
  const auto [raw_a, raw_b] = raw_gradients(range);
  SideProducts raw_input = input.slice(range.begin, range.end);
  SideProducts raw_output = output.slice(range.begin, range.end);
  raw_input.set_momentum(part(parameters_->a()).mT().to(raw_a.scalar_type()), raw_a.mT(),
                         part(factors_.input.basis()));
  raw_output.set_momentum(part(parameters_->b()).to(raw_b.scalar_type()), raw_b,
                          part(factors_.output.basis()));
  const SideMetric metric_in = input_metric.slice(range.begin, range.end);
  const SideMetric metric_out = output_metric.slice(range.begin, range.end);
  const TangentStep raw = tangent_step(raw_input, metric_in, raw_output, metric_out, part(scaling_),
                                       options_.gram_floor, rounding());
  const at::Tensor square = squared_norm(step_grams(raw_input, raw.a, &metric_in.plain),
                                         step_grams(raw_output, raw.b, nullptr), part(scaling_))
                                .c2;
  ema(part(rms_square_), part(rms_weight_), square,
      ok.logical_and(raw.ok).logical_and(square.isfinite()), options_.rms_beta);
}

Proposal LayerGroup::propose(const GroupSettings& settings) {
  const at::ScalarType dtype = momentum_a_.scalar_type();
  const SideProducts input_raw =
      side_products(parameters_->a().mT().to(dtype), momentum_a_.mT(), factors_.input.basis());
  const SideProducts output_raw =
      side_products(parameters_->b().to(dtype), momentum_b_, factors_.output.basis());
  const SideMetric input_metric =
      SideMetric::of(factors_.input, options_.whitening, options_.damping);
  const SideMetric output_metric =
      SideMetric::of(factors_.output, options_.whitening, options_.damping);
  const Range range = due(age_);
  if (range.begin < range.end) {
    update_rms(range, input_raw, output_raw, input_metric, output_metric);
  }

  Proposal proposal;
  proposal.momentum_factor = (options_.maximize ? -1.0 : 1.0) / momentum_weight_.clamp_min(1e-300);
  const SideProducts input = input_raw.scale_momentum(proposal.momentum_factor);
  const SideProducts output = output_raw.scale_momentum(proposal.momentum_factor);
  proposal.step = tangent_step(input, input_metric, output, output_metric, scaling_,
                               options_.gram_floor, rounding());
  const StepGrams input_grams = step_grams(input, proposal.step.a, &input_metric.plain);
  proposal.output_norm =
      squared_norm(input_grams, step_grams(output, proposal.step.b, nullptr), scaling_);
  proposal.fisher_norm = squared_norm(
      input_grams, step_grams(output, proposal.step.b, &output_metric.plain), scaling_);
  proposal.radius = settings.lr * factors_.base_square.clamp_min(0).sqrt();
  const at::Tensor size = options_.step_length == "radius"
                              ? proposal.output_norm.c2.clamp_min(0)
                              : rms_square_ / rms_weight_.clamp_min(1e-300);
  const at::Tensor planned = proposal.radius / size.sqrt();
  const at::Tensor usable = planned.isfinite();
  proposal.length = inside_ball(proposal.output_norm, proposal.radius,
                                at::where(usable, planned, at::zeros_like(planned)));
  const at::Tensor sound = proposal.step.ok.logical_and(proposal.length.isfinite());
  misses_ = at::where(grad_ok_, (misses_ + 1) * sound.logical_not(), misses_);
  proposal.ok = grad_ok_.logical_and(sound).logical_and(usable);
  proposal.length = at::where(proposal.ok, proposal.length, at::zeros_like(planned));
  return proposal;
}

void LayerGroup::apply(const Proposal& proposal,
                       const at::Tensor& shrink,
                       const GroupSettings& settings) {
  const at::Tensor f = proposal.length * shrink;
  const at::Tensor identity = at::eye(parameters_->a().size(1), f.options());
  // As in AdamW, a parameter without a gradient does not decay.
  const at::Tensor decay = at::where(
      grad_ok_, at::full_like(f, 1 - settings.lr * settings.weight_decay), at::ones_like(f));
  const auto coefficients = [&](const SideStep& step, const at::Tensor& weight,
                                const at::Tensor& momentum, const at::Tensor& basis) {
    const auto scaled = [&](const at::Tensor& x, const at::Tensor& factor) {
      return select_layers(proposal.ok, x * as_column(factor), at::zeros_like(x));
    };
    detail::tall_combine(weight, as_column(decay) * identity + scaled(step.weight, f), momentum,
                         scaled(step.momentum, f * proposal.momentum_factor), basis,
                         scaled(step.basis, f));
  };
  coefficients(proposal.step.b, parameters_->b(), momentum_b_, factors_.output.basis());
  coefficients(proposal.step.a, parameters_->a().mT(), momentum_a_.mT(), factors_.input.basis());
}

void LayerGroup::finish() {
  ++age_;
  // The first step leaves B = 0, where the gauge is undefined.
  if (age_ == 1 || age_ % options_.balance_every == 0) {
    balance_gauge();
  }
  want();
}

void LayerGroup::balance_gauge() {
  const at::ScalarType dtype = momentum_a_.scalar_type();
  const auto gram = [&](const at::Tensor& weight, const LowRankEigen& factor) {
    return weighted_gram(factor.power(options_.whitening, options_.damping),
                         detail::tall_gram(factor.basis(), weight),
                         detail::tall_gram(weight, weight));
  };
  GaugeMap gauge = balance(gram(parameters_->b().to(dtype), factors_.output),
                           gram(parameters_->a().mT().to(dtype), factors_.input));
  gauge.ok = gauge.ok.logical_and(active_).logical_and(momentum_weight_ > 0);
  apply_gauge(gauge, parameters_->a(), parameters_->b(), momentum_a_, momentum_b_);
}

void LayerGroup::want() {
  const Range range = due(age_);
  for (int64_t l = 0; l < layers(); ++l) {
    if (slots_[l] != nullptr) {
      slots_[l]->set_wanted(l >= range.begin && l < range.end);
    }
  }
}

void LayerGroup::connect(const std::shared_ptr<LayerGroup>& self) {
  for (int64_t l = 0; l < self->layers(); ++l) {
    if (self->slots_[l] != nullptr) {
      self->slots_[l]->connect(self, l);
    }
  }
  self->want();
}

std::vector<LoraPair> LayerGroup::take_failed() {
  return take_out(
      (misses_ >= options_.max_misses).logical_or(factors_.misses >= options_.max_misses));
}

std::vector<LoraPair> LayerGroup::take_out(const at::Tensor& layers) {
  const at::Tensor leaving = layers.to(active_.device()).logical_and(active_);
  const at::Tensor flags = leaving.to(at::kCPU).contiguous();
  std::vector<LoraPair> pairs;
  for (size_t l = 0; l < pairs_.size(); ++l) {
    if (flags.const_data_ptr<bool>()[l]) {
      pairs.push_back(pairs_[l]);
      if (slots_[l] != nullptr) {
        slots_[l]->set_wanted(false);
        slots_[l] = nullptr;
      }
    }
  }
  active_ = active_.logical_and(leaving.logical_not());
  return pairs;
}

// ---- Observation and state ----

int64_t LayerGroup::micro_batch(int64_t layer) const {
  return observations_->micro_batch(layer);
}

void LayerGroup::observe(int64_t layer, const Observation& observation) {
  observations_->add(layer, observation, factors_);
}

void LayerGroup::drop_observations() {
  observations_->clear();
}

double LayerGroup::rounding() const {
  return momentum_a_.scalar_type() == at::kDouble ? 1e-16 : 6e-8;
}

std::vector<std::pair<std::string, at::Tensor>> LayerGroup::named_tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> out = {{"momentum_a", momentum_a_},
                                                         {"momentum_b", momentum_b_},
                                                         {"momentum_weight", momentum_weight_},
                                                         {"rms_square", rms_square_},
                                                         {"rms_weight", rms_weight_},
                                                         {"active", active_},
                                                         {"misses", misses_},
                                                         {"skipped", skipped_},
                                                         {"share_set", observations_->share_set()}};
  for (const auto& item : factors_.named_tensors()) {
    out.push_back(item);
  }
  return out;
}

void LayerGroup::after_load(int64_t age) {
  age_ = age;
  observations_->clear();
  observations_->resume(factors_);
  want();
}

}  // namespace ctrlora
