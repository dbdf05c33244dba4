#include "ctrlora/layer_group.h"

#include <ATen/ops/eye.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "detail/group_ranks.h"
#include "detail/parameter_slabs.h"
#include "detail/pending_observations.h"
#include "detail/side_move.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

using detail::as_column;

namespace {

at::ScalarType statistics_dtype(const at::Tensor& param) {
  return param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

LayerGroup::LayerGroup(std::vector<LoraPair> pairs,
                       int64_t group,
                       Options options,
                       std::shared_ptr<RowSampler> sampler)
    : pairs_(std::move(pairs)),
      group_(group),
      options_(std::move(options)),
      observe_every_(options_.factor_every),
      sampler_(std::move(sampler)),
      parameters_(std::make_unique<detail::ParameterSlabs>(pairs_, options_.master_weights)),
      observations_(std::make_unique<detail::PendingObservations>(layers(), options_)) {
  for (const LoraPair& pair : pairs_) {
    slots_.push_back(options_.curvature == "gradient" ? nullptr : find_slot(pair.a));
  }
  if (options_.curvature == "hutchinson") {
    options_.whitening = 0.0;
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
  trace_sum_ = at::zeros({count}, small);
  trace_weight_ = at::zeros({count}, small);
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
  const int64_t rank = pairs_.front().rank();
  const auto grams = [&](const LowRankEigen& factor) {
    SideProducts kept;
    kept.ww = at::zeros({count, rank, rank}, small);
    kept.uw = at::zeros({count, factor.sketch_rank(), rank}, small);
    return kept;
  };
  input_ = grams(factors_.input);
  output_ = grams(factors_.output);
  refresh_metrics();
  may_lag_ = SideStream(options_.overlap).overlaps(a.device()) && options_.max_staleness > 0 &&
             options_.factor_every > 1;
  if (may_lag_) {
    back_ = KroneckerFactors(count, pairs_.front().in_features(), pairs_.front().out_features(),
                             options_, statistics);
  }
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
  for (at::Tensor* tensor : {&momentum_weight_, &rms_square_, &rms_weight_, &trace_sum_,
                             &trace_weight_, &scaling_, &active_, &grad_ok_, &misses_, &skipped_,
                             &input_.ww, &input_.uw, &output_.ww, &output_.uw}) {
    *tensor = tensor->to(options.device());
  }
  factors_.to(options);
  if (may_lag_) {
    back_.to(options);
  }
  if (ranks_ != nullptr) {
    ranks_->to(options);
  }
  refresh_metrics();
  observations_->clear();
}

// ---- One step ----

void LayerGroup::update_momentum() {
  const auto [grads_a, grads_b] = parameters_->gradients(0, layers());
  std::vector<uint8_t> present;
  present.reserve(grads_a.size());
  for (const at::Tensor& grad : grads_a) {
    present.push_back(grad.defined() ? 1 : 0);
  }
  const at::Tensor wanted =
      at::tensor(present, at::kByte).to(active_.device(), at::kBool).logical_and_(active_);
  const at::Tensor finite =
      detail::momentum_step(grads_a, momentum_a_, grads_b, momentum_b_, wanted, options_.beta1);
  grad_ok_ = finite.logical_and(wanted);
  skipped_.add_(finite.logical_not().logical_and(active_));  // the others are AdamW's to count
  momentum_weight_ = at::where(grad_ok_, options_.beta1 * momentum_weight_ + (1 - options_.beta1),
                               momentum_weight_);
}

Measurement LayerGroup::measurement(Range range,
                                    const at::Tensor& momentum_a,
                                    const at::Tensor& momentum_b) const {
  const auto part = [&](const at::Tensor& x) { return x.slice(0, range.begin, range.end); };
  const auto products = [&](const SideProducts& kept, const at::Tensor& weight,
                            const at::Tensor& momentum, const LowRankEigen& factor) {
    SideProducts out;
    out.ww = part(kept.ww);
    out.uw = part(kept.uw);
    out.set_momentum(part(weight).to(momentum.scalar_type()), momentum, part(factor.basis()));
    return out;
  };
  Measurement out;
  out.input = products(input_, parameters_->a().mT(), momentum_a.mT(), factors_.input);
  out.output = products(output_, parameters_->b(), momentum_b, factors_.output);
  out.input_metric = input_metric_.slice(range.begin, range.end);
  out.output_metric = output_metric_.slice(range.begin, range.end);
  out.scaling = part(scaling_);
  out.live = part(grad_ok_);
  out.absolute = part(factors_.absolute);
  out.radius = out.direction_rms = out.momentum_factor = at::ones_like(out.scaling);
  out.isotropic = part(trace_sum_ / trace_weight_.clamp_min(1e-300)).clamp_min(0);
  out.rounding = rounding();
  return out;
}

std::optional<Measurement> LayerGroup::measure_gradients() const {
  const Range range = measured();
  if (range.begin == range.end) {
    return std::nullopt;
  }
  const auto [raw_a, raw_b] = raw_gradients(range);
  return measurement(range, raw_a, raw_b);
}

void LayerGroup::update_rms(const DirectionSquare& direction) {
  const Range range = measured();
  const auto part = [&](const at::Tensor& x) { return x.slice(0, range.begin, range.end); };
  // Right after a restart of the factors the mean is in another metric's units.
  const at::Tensor mean = part(rms_square_) / part(rms_weight_).clamp_min(1e-300);
  const at::Tensor sample = detail::bounded_sample(direction.square, mean, part(factors_.seen) > 1);
  detail::ema(part(rms_square_), part(rms_weight_), sample,
              part(grad_ok_).logical_and(direction.ok), options_.rms_beta);
}

at::Tensor LayerGroup::direction_rms() const {
  return (rms_square_ / rms_weight_.clamp_min(1e-300)).sqrt();
}

int64_t LayerGroup::measured_layers() const {
  const Range range = measured();
  return range.end - range.begin;
}

Measurement LayerGroup::measure(const GroupSettings& settings) const {
  Measurement out = measurement({0, layers()}, momentum_a_, momentum_b_);
  // 0, not infinity, for a layer without a usable gradient so far: its Grams are carried on.
  const at::Tensor unbiased = (options_.maximize ? -1.0 : 1.0) / momentum_weight_;
  out.momentum_factor = at::where(momentum_weight_ > 0, unbiased, at::zeros_like(unbiased));
  out.radius = settings.lr * settings.radius_factor * factors_.base_square.clamp_min(0).sqrt();
  out.direction_rms = direction_rms();
  if (ranks_ != nullptr && ranks_->phase() != detail::SketchPhase::kNone) {
    ranks_->score(out.input.wm * as_column(out.momentum_factor), grad_ok_);
  }
  return out;
}

void LayerGroup::apply(const Proposal& proposal,
                       const at::Tensor& shrink,
                       const GroupSettings& settings) {
  misses_ = at::where(proposal.live, (misses_ + 1) * proposal.sound.logical_not(), misses_);
  const at::Tensor f = proposal.length * shrink;
  // As in AdamW, a parameter without a gradient does not decay.
  const at::Tensor moves = proposal.live.logical_and(proposal.sound);
  const at::Tensor one = at::ones({}, f.options());
  const at::Tensor keep =
      as_column(at::where(moves, one * (1 - settings.lr * settings.weight_decay), one));
  const at::Tensor identity = at::eye(parameters_->a().size(1), f.options());
  using detail::SideMove;
  SideMove b =
      SideMove::scaled(proposal.step.b, proposal.output_grams, f, proposal.momentum_factor);
  SideMove a = SideMove::scaled(proposal.step.a, proposal.input_grams, f, proposal.momentum_factor);
  if (options_.curvature_decay > 0.0) {
    const at::Tensor p = weighted_gram(output_metric_.whiten, output_.uw, output_.ww);
    const at::Tensor q = weighted_gram(input_metric_.whiten, input_.uw, input_.ww);
    const at::Tensor rate =
        at::where(moves, one * (settings.lr * options_.curvature_decay), at::zeros_like(one));
    b.decay(output_metric_.whiten, q, rate, scaling_);
    a.decay(input_metric_.whiten, p, rate, scaling_);
  }
  const auto move = [&](const SideMove& side, const SideProducts& kept, const at::Tensor& weight,
                        const at::Tensor& momentum, const at::Tensor& basis) {
    detail::tall_combine({{weight, keep * identity + side.step.weight},
                          {momentum, side.step.momentum},
                          {basis, side.step.basis}});
    kept.ww.copy_(side.carried_ww(keep));
    kept.uw.copy_(side.carried_uw(keep));
  };
  move(b, output_, parameters_->b(), momentum_b_, factors_.output.basis());
  move(a, input_, parameters_->a().mT(), momentum_a_.mT(), factors_.input.basis());
  parameters_->publish();
  const at::Tensor calm = proposal.spike.logical_not();
  if (!detail::known_to_be_true(calm)) {
    momentum_a_.mul_(as_column(calm).to(momentum_a_.scalar_type()));
    momentum_b_.mul_(as_column(calm).to(momentum_b_.scalar_type()));
    momentum_weight_ = momentum_weight_ * calm;
  }
}

void LayerGroup::finish() {
  ++age_;
  // The first step leaves B = 0, where the gauge is undefined.
  if (age_ == 1 || age_ % options_.balance_every == 0) {
    balance_gauge();
  }
  parameters_->remember();
  observe_next(true);
}

std::vector<LoraPair> LayerGroup::take_failed() {
  return take_out(
      (misses_ >= options_.max_misses).logical_or(factors_.misses >= options_.max_misses));
}

std::vector<LoraPair> LayerGroup::active_pairs(const at::Tensor& layers) const {
  const at::Tensor flags = layers.to(at::kCPU).logical_and(active_.to(at::kCPU)).contiguous();
  std::vector<LoraPair> pairs;
  for (size_t l = 0; l < pairs_.size(); ++l) {
    if (flags.const_data_ptr<bool>()[l]) {
      pairs.push_back(pairs_[l]);
    }
  }
  return pairs;
}

std::vector<LoraPair> LayerGroup::take_out(const at::Tensor& layers) {
  const at::Tensor leaving = layers.to(active_.device()).logical_and(active_);
  const at::Tensor flags = leaving.to(at::kCPU).contiguous();
  std::vector<LoraPair> pairs = active_pairs(layers);
  for (size_t l = 0; l < pairs_.size(); ++l) {
    if (flags.const_data_ptr<bool>()[l] && slots_[l] != nullptr) {
      slots_[l]->set_wanted(false);
      slots_[l] = nullptr;
    }
  }
  active_ = active_.logical_and(leaving.logical_not());
  return pairs;
}

// ---- State ----

double LayerGroup::rounding() const {
  return momentum_a_.scalar_type() == at::kDouble ? 1e-16 : 6e-8;
}

std::vector<std::pair<std::string, at::Tensor>> LayerGroup::named_tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> out = {{"momentum_a", momentum_a_},
                                                         {"momentum_b", momentum_b_},
                                                         {"momentum_weight", momentum_weight_},
                                                         {"rms_square", rms_square_},
                                                         {"rms_weight", rms_weight_},
                                                         {"trace_sum", trace_sum_},
                                                         {"trace_weight", trace_weight_},
                                                         {"active", active_},
                                                         {"misses", misses_},
                                                         {"skipped", skipped_},
                                                         {"input.ww", input_.ww},
                                                         {"input.uw", input_.uw},
                                                         {"output.ww", output_.ww},
                                                         {"output.uw", output_.uw},
                                                         {"probe_a", parameters_->probe_a()},
                                                         {"probe_b", parameters_->probe_b()}};
  for (const auto& part : {observations_->named_tensors(), factors_.named_tensors()}) {
    out.insert(out.end(), part.begin(), part.end());
  }
  if (parameters_->has_masters()) {
    out.emplace_back("master_a", parameters_->a());
    out.emplace_back("master_b", parameters_->b());
  }
  if (may_lag_) {
    for (const auto& [name, tensor] : back_.named_tensors()) {
      out.emplace_back("back." + name, tensor);
    }
  }
  if (ranks_ != nullptr) {
    for (const auto& item : ranks_->named_tensors()) {
      out.push_back(item);
    }
  }
  return out;
}

void LayerGroup::after_load(int64_t age, int64_t observe_every) {
  age_ = age;
  observations_->clear();
  observations_->resume(factors_);
  if (ranks_ != nullptr) {
    ranks_->resume();
  }
  refreshing_ = age > 0 && lags(age - 1) ? due(age - 1, observe_every) : Range{0, 0};
  refresh_metrics();
  observe_next(true);
}

}  // namespace ctrlora
