#include "ctrlora/engine.h"

#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>

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

namespace ctrlora {

struct Engine::StepReport {
  at::Tensor predicted_kl;  // (1) before the Fisher ball
  at::Tensor shrink;        // (1) phi
  double kl_radius = 0.0;
  std::vector<detail::RankSpace> spaces;  // with their proposals; read by metrics() alone
};

Engine::Engine(const Options& options)
    : options_(options), side_stream_(options.overlap), report_(std::make_unique<StepReport>()) {
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
    if (processes_ != nullptr) {
      groups_.back()->set_processes(processes_);
    }
  }
}

void Engine::add_fallback(const std::vector<at::Tensor>& params, int64_t group) {
  if (!params.empty()) {
    fallbacks_.push_back(std::make_unique<detail::AdamW>(params, group));
  }
}

void Engine::step(const std::vector<GroupSettings>& settings) {
  const detail::NumericsGuard guard;
  const std::vector<const GroupSettings*> by_group = checked(settings);
  std::vector<detail::RankSpace::Member> moving;
  join_refreshes();
  for (const auto& group : groups_) {
    const GroupSettings& own = *by_group[static_cast<size_t>(group->group())];
    if (own.lr == 0.0) {
      group->drop_observations();
      continue;
    }
    group->bind();
    group->update_momentum();
    group->commit_observations(side_stream_);
    moving.push_back({group, own});
  }
  if (!moving.empty()) {
    report_->spaces = detail::RankSpace::sort(moving);
    detail::RankSpace::propose(report_->spaces, options_);
    fisher_ball();
    for (const detail::RankSpace& space : report_->spaces) {
      space.apply(report_->shrink);
    }
    ++steps_;
    sampler_->set_step(steps_);
    if (rank_control_ != nullptr) {
      rank_control_->after_step(groups_, steps_);
    }
  }
  for (const auto& fallback : fallbacks_) {
    if (by_group[static_cast<size_t>(fallback->group())]->lr != 0.0) {
      fallback->step(fallback_settings(*fallback, by_group), options_.maximize);
    }
  }
  if (!moving.empty() && steps_ % options_.balance_every == 0) {
    retire_failed_layers();  // last: this gradient was theirs, and counted if it was skipped
  }
}

void Engine::join_refreshes() const {
  side_stream_.join();
  const std::string error = side_stream_.take_error();
  if (!error.empty()) {  // e.g. out of memory: the factors stay as they were
    TORCH_WARN("[ctrlora::Engine] a refresh of curvature factors failed and was left out: ", error);
  }
}

// One phi <= 1 for all layers: half the sum of the quartics at the lengths found so far, as one
// quartic in phi.
void Engine::fisher_ball() {
  double ratio = 0.0;
  for (const detail::RankSpace& space : report_->spaces) {
    ratio = std::max(ratio, space.schedule());
  }
  const Quartic kl = detail::RankSpace::predicted_kl(report_->spaces);
  const at::Tensor one = at::ones({1}, kl.c2.options());
  report_->kl_radius = options_.kl_radius * ratio * ratio;
  report_->predicted_kl = kl(one);
  report_->shrink =
      std::isinf(options_.kl_radius)
          ? one
          : inside_ball(kl, at::full({1}, std::sqrt(report_->kl_radius), one.options()), one);
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
  for (const auto& group : groups_) {
    group->set_processes(processes_);
  }
}

void Engine::drop_observations() {
  for (const auto& group : groups_) {
    group->drop_observations();
  }
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
  out["skipped"] = static_cast<double>(skipped);
  out["misses"] = static_cast<double>(misses);
  if (layers > 0) {
    out["captured_input"] = captured_input / static_cast<double>(layers);
    out["captured_output"] = captured_output / static_cast<double>(layers);
  }
  if (report_->shrink.defined()) {
    out["predicted_kl"] = report_->predicted_kl.item<double>();
    out["kl_radius"] = report_->kl_radius;
    out["kl_shrink"] = report_->shrink.item<double>();
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

std::vector<std::pair<std::string, at::Tensor>> Engine::named_tensors() const {
  join_refreshes();
  std::vector<std::pair<std::string, at::Tensor>> out;
  const auto number = [](int64_t value) { return at::full({1}, value, at::kLong); };
  out.emplace_back("version", number(kStateVersion));
  out.emplace_back("steps", number(steps_));
  for (size_t i = 0; i < groups_.size(); ++i) {
    const std::string prefix = "group" + std::to_string(i) + ".";
    out.emplace_back(prefix + "age", number(groups_[i]->age()));
    for (const auto& [name, tensor] : groups_[i]->named_tensors()) {
      out.emplace_back(prefix + name, tensor);
    }
  }
  if (rank_control_ != nullptr) {
    const auto tensors = rank_control_->named_tensors();
    out.insert(out.end(), tensors.begin(), tensors.end());
  }
  for (size_t i = 0; i < fallbacks_.size(); ++i) {
    const std::string& retired = fallbacks_[i]->retired;
    const std::string prefix =
        retired.empty() ? "fallback" + std::to_string(i) + "." : "retired." + retired + ".";
    for (const auto& [name, tensor] : fallbacks_[i]->named_tensors()) {
      out.emplace_back(prefix + name, tensor);
    }
  }
  return out;
}

namespace {

bool ends_with(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

// What a saved tensor of the right shape must not be: of another kind, not finite, or negative
// where only counts, squares and traces are held. Empty if it can be loaded.
std::string unusable(const std::string& name, const at::Tensor& own, const at::Tensor& given) {
  if (given.layout() != at::kStrided || given.is_meta() || given.is_complex() ||
      given.is_floating_point() != own.is_floating_point()) {
    return c10::str("expected ", own.scalar_type(), "; got ", given.scalar_type(), " (",
                    given.layout(), ")");
  }
  const bool probe =
      ends_with(name, "probe_a") || ends_with(name, "probe_b");  // NaN: not taken yet
  if (!probe && !at::isfinite(given).all().item<bool>()) {
    return "expected finite numbers; got others";
  }
  for (const char* end :
       {"eigenvalues", "trace", "rms_square", "_weight", "age", "steps", "seen"}) {
    if (ends_with(name, end) && given.lt(0).any().item<bool>()) {
      return "expected no negative numbers; got some";
    }
  }
  return "";
}

// Names, shapes and values in which a saved state differs from what this engine can take, one a
// line.
std::string difference(const std::vector<std::pair<std::string, at::Tensor>>& own,
                       const std::map<std::string, at::Tensor>& given,
                       bool with_retired) {
  std::string out;
  std::set<std::string> names;
  for (const auto& [name, tensor] : own) {
    names.insert(name);
    const auto found = given.find(name);
    if (found == given.end()) {
      out += "\n  missing " + name;
    } else if (found->second.sizes() != tensor.sizes()) {
      out += c10::str("\n  ", name, ": expected ", tensor.sizes(), "; got ", found->second.sizes());
    } else if (const std::string why = unusable(name, tensor, found->second); !why.empty()) {
      out += "\n  " + name + ": " + why;
    }
  }
  for (const auto& item : given) {
    const bool of_retired = item.first.rfind("retired.", 0) == 0;
    if (names.count(item.first) == 0 && (with_retired || !of_retired)) {
      out += "\n  unexpected " + item.first;
    }
  }
  return out;
}

}  // namespace

void Engine::load(const std::map<std::string, at::Tensor>& tensors) {
  const detail::NumericsGuard guard;
  constexpr const char* kWhere = "ctrlora::Engine::load";
  const auto version = tensors.find("version");
  const bool one = version != tensors.end() && version->second.numel() == 1 &&
                   version->second.scalar_type() == at::kLong;
  const int64_t got = one ? version->second.item<int64_t>() : 0;
  CTRLORA_CHECK(got == kStateVersion, kWhere, "expected state of format version ", kStateVersion,
                "; got ", one ? std::to_string(got) : std::string("none"),
                ". Remedy: load it with the release that wrote it.");
  const auto check = [&](bool with_retired) {
    const std::string found = difference(named_tensors(), tensors, with_retired);
    CTRLORA_CHECK(
        found.empty(), kWhere,
        "the state is damaged, or belongs to another set of layers or other options:", found);
  };
  check(/*with_retired=*/false);                 // before anything changes
  for (size_t i = 0; i < groups_.size(); ++i) {  // the saved run may have handed layers to AdamW
    const auto active = tensors.find("group" + std::to_string(i) + ".active");
    if (active != tensors.end() && active->second.numel() == groups_[i]->layers()) {
      for (const LoraPair& pair : groups_[i]->take_out(active->second.logical_not())) {
        hand_to_adamw(pair, groups_[i]->group());
      }
    }
  }
  check(/*with_retired=*/true);
  for (const auto& [name, tensor] : named_tensors()) {
    tensor.copy_(tensors.at(name));
  }
  steps_ = tensors.at("steps").item<int64_t>();
  sampler_->set_step(steps_);
  for (size_t i = 0; i < groups_.size(); ++i) {
    groups_[i]->after_load(tensors.at("group" + std::to_string(i) + ".age").item<int64_t>());
  }
}

int64_t Engine::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& item : named_tensors()) {
    bytes += static_cast<int64_t>(item.second.nbytes());
  }
  return bytes;
}

}  // namespace ctrlora
