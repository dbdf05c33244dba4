#include "ctrlora/engine.h"

#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <tuple>

#include "ctrlora/trust_region.h"
#include "ctrlora/version.h"
#include "detail/check.h"
#include "detail/fallback.h"
#include "detail/rank_control.h"
#include "detail/rank_space.h"
#include "detail/tensor_math.h"
#include "detail/trial.h"

namespace ctrlora {

struct Engine::StepReport {
  at::Tensor predicted_kl;  // (1) before the Fisher ball
  at::Tensor kl_shrink;     // (1) phi of the Fisher ball
  at::Tensor shrink;        // (1) phi of both
  double kl_radius = 0.0;
  at::Tensor head_change;  // (1) of the heads' outputs at most, before their ball; undefined: none
  double head_radius = 0.0;
  std::vector<detail::RankSpace> spaces;  // with their proposals; read by metrics() alone
};

Engine::Engine(const Options& options)
    : options_(options),
      head_meter_(std::make_shared<HeadMeter>()),
      report_(std::make_unique<StepReport>()),
      side_stream_(options.overlap) {
  options_.validate();
  sampler_ = std::make_shared<RowSampler>(options_.sample_rows, options_.seed);
}

Engine::~Engine() = default;

void Engine::add_pairs(const std::vector<LoraPair>& pairs, int64_t group) {
  std::set<const c10::TensorImpl*> known;
  for (const auto& existing : groups_) {
    for (const LoraPair& pair : existing->pairs()) {
      known.insert({pair.a.unsafeGetTensorImpl(), pair.b.unsafeGetTensorImpl()});
    }
  }
  using Shape = std::tuple<int64_t, int64_t, int64_t, at::ScalarType, std::string>;
  std::vector<Shape> order;
  std::map<Shape, std::vector<LoraPair>> sorted;
  for (const LoraPair& pair : pairs) {
    pair.validate();
    for (const at::Tensor* tensor : {&pair.a, &pair.b}) {
      CTRLORA_CHECK(known.insert(tensor->unsafeGetTensorImpl()).second,
                    "ctrlora::Engine::add_pairs", "pair '", pair.name, "': a tensor of shape ",
                    tensor->sizes(),
                    " is trained here already. Remedy: pass every parameter once.");
    }
    if (pair.rank() > pair.in_features()) {  // A's Gram is singular: no tangent step
      hand_to_adamw(pair, group);
      TORCH_WARN("[ctrlora::Engine] layer '", pair.name, "' has rank ", pair.rank(), " but only ",
                 pair.in_features(), " inputs; AdamW trains it.");
      continue;
    }
    const Shape shape{pair.out_features(), pair.in_features(), pair.rank(), pair.a.scalar_type(),
                      pair.a.device().str()};
    if (sorted.find(shape) == sorted.end()) {
      order.push_back(shape);
    }
    sorted[shape].push_back(pair);
  }
  for (const Shape& shape : order) {
    groups_.push_back(std::make_shared<LayerGroup>(sorted[shape], group, options_, sampler_));
    LayerGroup::connect(groups_.back());
  }
  if (processes_ != nullptr) {
    inform_of_processes(groups_.size() - order.size());
  }
}

void Engine::add_fallback(const std::vector<at::Tensor>& params, int64_t group) {
  if (!params.empty()) {
    fallbacks_.push_back(std::make_unique<detail::AdamW>(params, group));
  }
  for (size_t i = 0; i < params.size(); ++i) {
    if (const std::shared_ptr<HeadSlot> head = find_head(params[i])) {
      const int64_t number = head_meter_->add_head(params[i]);
      fallbacks_.back()->heads[i] = number;
      head->connect(head_meter_, number);
      heads_.push_back(head);
    }
  }
}

void Engine::step(const std::vector<GroupSettings>& settings) {
  const detail::NumericsGuard guard;
  const std::vector<const GroupSettings*> by_group = checked(settings);
  std::vector<detail::RankSpace::Member> moving;
  std::vector<LayerGroup*> observing;
  join_refreshes();
  for (const auto& group : groups_) {
    GroupSettings own = *by_group[static_cast<size_t>(group->group())];
    own.radius_factor *= radius_.factor;
    if (own.lr == 0.0) {
      group->drop_observations();
      continue;
    }
    group->bind();
    group->update_momentum();
    moving.push_back({group, own});
    observing.push_back(group.get());
  }
  commit_heads(by_group);
  if (!moving.empty()) {
    LayerGroup::commit_observations(observing, side_stream_);
    report_->spaces = detail::RankSpace::sort(moving);
    detail::RankSpace::propose(report_->spaces, options_);
    fisher_ball();
    head_ball();
    for (const detail::RankSpace& space : report_->spaces) {
      space.apply(report_->shrink);
    }
    if (trial_ != nullptr) {  // before the gauge changes
      trial_->add_decrease(0, paired_parameters());
    }
    for (const detail::RankSpace& space : report_->spaces) {
      space.finish();
    }
    ++steps_;
    sampler_->set_step(steps_);
    if (rank_control_ != nullptr) {
      rank_control_->after_step(groups_, steps_);
    }
  }
  for (const auto& fallback : fallbacks_) {
    if (by_group[static_cast<size_t>(fallback->group())]->lr != 0.0) {
      fallback->step(fallback_settings(*fallback, by_group), options_.maximize, *head_meter_,
                     options_.head_step);
    }
  }
  if (!moving.empty() && steps_ % options_.balance_every == 0) {
    retire_failed_layers();  // last: this gradient was theirs, and counted if it was skipped
  }
  if (trial_ != nullptr) {
    trial_->add_decrease(paired_parameters(), all_parameters().size());
  }
}

void Engine::join_refreshes() const {
  side_stream_.join();
  const std::string error = side_stream_.take_error();
  if (!error.empty()) {  // e.g. out of memory: the factors stay as they were
    TORCH_WARN("[ctrlora::Engine] a refresh of curvature factors failed and was left out: ", error);
  }
}

double Engine::schedule() const {
  double ratio = 0.0;
  for (const detail::RankSpace& space : report_->spaces) {
    ratio = std::max(ratio, space.schedule());
  }
  return ratio;
}

// One phi <= 1 for all layers: half the sum of the quartics at the lengths found so far, as one
// quartic in phi.
void Engine::fisher_ball() {
  const double scale = schedule() * radius_.factor;
  const Quartic kl = detail::RankSpace::predicted_kl(report_->spaces);
  const at::Tensor one = at::ones({1}, kl.c2.options());
  report_->kl_radius = options_.kl_radius * scale * scale;
  report_->predicted_kl = kl(one);
  report_->kl_shrink =
      std::isinf(options_.kl_radius)
          ? one
          : inside_ball(kl, at::full({1}, std::sqrt(report_->kl_radius), one.options()), one);
  report_->shrink = report_->kl_shrink;
}

// What heads showed since the last step enters their averages, unless nothing moves.
void Engine::commit_heads(const std::vector<const GroupSettings*>& by_group) {
  const bool still = std::all_of(by_group.begin(), by_group.end(),
                                 [](const GroupSettings* own) { return own->lr == 0.0; });
  if (still || heads_.empty()) {
    head_meter_->drop();
    return;
  }
  for (const auto& fallback : fallbacks_) {
    const GroupSettings own = fallback_settings(*fallback, by_group);
    for (const auto& [index, head] : fallback->heads) {
      if (own.lr != 0.0 && options_.head_step != 0.0) {
        head_meter_->set_direction(head, fallback->raw_direction(index, own), own.beta2);
      }
    }
  }
  head_meter_->commit(options_.factor_beta, options_.loss_scale, processes_.get());
}

// Another phi: what all layers together change the loss by is no more than what a change of the
// heads' outputs by head_radius would.
void Engine::head_ball() {
  report_->head_change = at::Tensor();
  if (heads_.empty() || std::isinf(options_.head_radius)) {
    return;
  }
  const at::Tensor decrease =
      detail::RankSpace::predicted_decrease(report_->spaces) * report_->kl_shrink;
  const at::Tensor sensitivity = head_meter_->sensitivity().to(decrease.device());
  report_->head_radius = options_.head_radius * schedule() * radius_.factor;
  const at::Tensor zero = at::zeros({}, decrease.options());
  report_->head_change = at::where(decrease > 0, decrease / sensitivity, zero);
  const at::Tensor phi = report_->head_radius / report_->head_change;
  report_->shrink = report_->kl_shrink * at::where(phi < 1, phi, at::ones_like(phi));
}

std::vector<const GroupSettings*> Engine::checked(
    const std::vector<GroupSettings>& settings) const {
  std::vector<const GroupSettings*> out;
  for (const GroupSettings& own : settings) {
    own.validate();
    out.push_back(&own);
  }
  const auto known = [&](int64_t group) {
    return group >= 0 && group < static_cast<int64_t>(settings.size());
  };
  const bool complete = std::all_of(groups_.begin(), groups_.end(),
                                    [&](const auto& g) { return known(g->group()); }) &&
                        std::all_of(fallbacks_.begin(), fallbacks_.end(),
                                    [&](const auto& f) { return known(f->group()); });
  CTRLORA_CHECK(complete, "ctrlora::Engine::step",
                "expected settings for every parameter group; got ", settings.size(), ".");
  return out;
}

GroupSettings Engine::fallback_settings(const detail::AdamW& fallback,
                                        const std::vector<const GroupSettings*>& by_group) const {
  GroupSettings own = *by_group[static_cast<size_t>(fallback.group())];
  if (!fallback.retired.empty()) {  // follows the pairs' schedule at AdamW's scale
    own.lr = own.initial_lr > 0.0 ? options_.fallback_lr * own.lr / own.initial_lr : 0.0;
  }
  return own;
}

void Engine::retire_failed_layers() {
  for (const auto& group : groups_) {
    for (const LoraPair& pair : group->take_failed()) {
      hand_to_adamw(pair, group->group());
      TORCH_WARN("[ctrlora::Engine] layer '", pair.name, "' failed ", options_.max_misses,
                 " times in a row; AdamW trains it from now on.");
    }
  }
}

void Engine::hand_to_adamw(const LoraPair& pair, int64_t group) {
  retired_.push_back(pair.name);
  fallbacks_.push_back(
      std::make_unique<detail::AdamW>(std::vector<at::Tensor>{pair.a, pair.b}, group));
  fallbacks_.back()->retired = pair.name;
}

void Engine::set_processes(Processes processes) {
  const detail::NumericsGuard guard;
  processes.validate();
  sampler_->set_process(processes.rank);
  processes_ = std::make_shared<const Processes>(std::move(processes));
  inform_of_processes(0);
}

void Engine::inform_of_processes(size_t first) {
  if (exchange_every_ == 0) {
    exchange_every_ = options_.exchange_every;
  }
  if (exchange_every_ == 0 && !groups_.empty()) {  // one schedule for all that is here by now
    Processes::Traffic all;
    for (const auto& group : groups_) {
      const Processes::Traffic own = group->traffic();
      all.sketches += own.sketches;
      all.gradients += own.gradients;
      all.ranks += own.ranks;
    }
    if (rank_control_ != nullptr) {
      all.ranks /= rank_control_->options().schedule.interval();
    }
    exchange_every_ = Processes::exchange_every(all);
  }
  for (size_t i = first; i < groups_.size(); ++i) {
    groups_[i]->set_processes(processes_, exchange_every_);
  }
}

void Engine::drop_observations() {
  for (const auto& group : groups_) {
    group->drop_observations();
  }
  head_meter_->drop();
}

void Engine::set_loss_scale(double loss_scale) {
  options_.loss_scale = loss_scale;
  options_.validate();
  for (const auto& group : groups_) {
    group->set_loss_scale(loss_scale);
  }
}

std::map<std::string, double> Engine::metrics() const {
  const detail::NumericsGuard guard;
  std::map<std::string, double> out = {{"steps", static_cast<double>(steps_)},
                                       {"retired", static_cast<double>(retired_.size())},
                                       {"state_bytes", static_cast<double>(state_bytes())}};
  int64_t skipped = 0;
  int64_t misses = 0;
  double captured_input = 0.0;
  double captured_output = 0.0;
  int64_t layers = 0;
  for (const auto& group : groups_) {
    skipped += group->skipped().sum().item<int64_t>();
    misses += group->misses().sum().item<int64_t>() + group->factors().misses.sum().item<int64_t>();
    captured_input += group->factors().input.captured_share().sum().item<double>();
    captured_output += group->factors().output.captured_share().sum().item<double>();
    layers += group->layers();
  }
  for (const auto& fallback : fallbacks_) {
    skipped += fallback->skipped.item<int64_t>();
  }
  if (!heads_.empty() && options_.head_step != 0.0) {
    out["head_gain"] = head_meter_->gains(options_.head_step).mean().item<double>();
  }
  out["skipped"] = static_cast<double>(skipped);
  out["misses"] = static_cast<double>(misses);
  if (layers > 0) {
    out["captured_input"] = captured_input / static_cast<double>(layers);
    out["captured_output"] = captured_output / static_cast<double>(layers);
  }
  if (options_.ratio_every > 0) {
    out["radius_factor"] = radius_.factor;
    out["ratio"] = radius_.ratio;
    out["rejected"] = static_cast<double>(radius_.rejected);
  }
  if (report_->shrink.defined()) {
    out["predicted_kl"] = report_->predicted_kl.item<double>();
    out["kl_radius"] = report_->kl_radius;
    out["kl_shrink"] = report_->kl_shrink.item<double>();
    if (report_->head_change.defined()) {
      out["head_change"] = report_->head_change.item<double>();
      out["head_radius"] = report_->head_radius;
    }
    double decrease = 0.0;
    double mean = 0.0;
    double largest = 0.0;
    for (const detail::RankSpace& space : report_->spaces) {
      const detail::RankSpace::Change change = space.change(report_->shrink);
      decrease += change.predicted_decrease.sum().item<double>();
      mean += change.relative_output.sum().item<double>();
      largest = std::max(largest, change.relative_output.max().item<double>());
    }
    out["predicted_decrease"] = decrease;
    out["output_change_mean"] = layers > 0 ? mean / static_cast<double>(layers) : 0.0;
    out["output_change_max"] = largest;
  }
  return out;
}

}  // namespace ctrlora
