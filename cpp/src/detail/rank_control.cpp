#include "detail/rank_control.h"

#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "detail/check.h"
#include "detail/group_ranks.h"
#include "detail/tensor_math.h"

namespace ctrlora::detail {

namespace {

constexpr const char* kWhere = "ctrlora::Engine::schedule_ranks";

// Places of the directions that are on.
std::vector<int64_t> on(const at::Tensor& mask) {
  std::vector<int64_t> out;
  for (int64_t i = 0; i < mask.numel(); ++i) {
    if (mask.const_data_ptr<bool>()[i]) {
      out.push_back(i);
    }
  }
  return out;
}

std::vector<double> values(const at::Tensor& row) {
  const at::Tensor own = row.contiguous();
  return {own.const_data_ptr<double>(), own.const_data_ptr<double>() + own.numel()};
}

}  // namespace

RankControl::RankControl(const RankOptions& options, const Groups& groups) : options_(options) {
  options_.validate();
  for (size_t g = 0; g < groups.size(); ++g) {
    for (int64_t l = 0; l < groups[g]->layers(); ++l) {
      const LoraPair& pair = groups[g]->pairs()[static_cast<size_t>(l)];
      layers_.push_back({pair.name, pair.out_features(), pair.in_features(), pair.rank()});
      places_.push_back({g, l});
    }
  }
  check_budget(layers_, options_.budget, options_.rules);
  event_steps_.push_back(1);
  const RankSchedule& schedule = options_.schedule;
  for (int64_t t = schedule.first_event(); t <= schedule.last_event(); t += schedule.interval()) {
    event_steps_.push_back(t);
  }
  const std::vector<int64_t> size = {static_cast<int64_t>(event_steps_.size()),
                                     static_cast<int64_t>(layers_.size())};
  ranks_ = at::full(size, -1, at::kLong);
  before_ = at::full(size, -1, at::kLong);
  moved_ = at::zeros(size, at::kLong);
  utility_ = at::zeros(size, at::kDouble);
  const std::vector<std::vector<double>> equal(layers_.size());
  first_ranks_ =
      at::tensor(allocate_ranks(layers_, equal, schedule.descend ? allocated() : options_.budget,
                                options_.rules),
                 at::kLong);
}

void RankControl::allocate(const std::map<std::string, std::vector<double>>& utilities) {
  CTRLORA_CHECK(ranks_.const_data_ptr<int64_t>()[0] < 0, kWhere,
                "expected an allocation before the first step; ranks are already changing.");
  std::vector<std::vector<double>> lists;
  std::string missing;
  for (const RankLayer& layer : layers_) {
    const auto found = utilities.find(layer.name);
    missing += found == utilities.end() ? "\n  " + layer.name : "";
    lists.push_back(found == utilities.end() ? std::vector<double>() : found->second);
  }
  CTRLORA_CHECK(missing.empty(), kWhere, "expected utilities of every layer; missing:", missing);
  first_ranks_.copy_(
      at::tensor(allocate_ranks(layers_, lists, options_.budget, options_.rules), at::kLong));
}

// Half of the window finds the range, half judges it; nothing outside.
int64_t RankControl::phase_before(int64_t steps) const {
  const auto next = std::upper_bound(event_steps_.begin() + 1, event_steps_.end(), steps);
  if (next == event_steps_.end()) {
    return static_cast<int64_t>(SketchPhase::kNone);
  }
  const int64_t previous = next == event_steps_.begin() + 1 ? 0 : *(next - 1);
  const int64_t span = std::min(options_.window, *next - previous);
  const int64_t begin = *next - span;
  if (steps < begin) {
    return static_cast<int64_t>(SketchPhase::kNone);
  }
  return static_cast<int64_t>(steps < begin + (span + 1) / 2 ? SketchPhase::kRange
                                                             : SketchPhase::kSplit);
}

// Parameters from which a descent comes down; the budget where ranks were allocated within it.
int64_t RankControl::started_with() const {
  const int64_t* first = first_ranks_.const_data_ptr<int64_t>();
  return std::max(options_.budget, used_parameters(layers_, {first, first + first_ranks_.numel()}));
}

void RankControl::after_step(const Groups& groups, int64_t steps) {
  if (steps > 0 && ranks_.const_data_ptr<int64_t>()[0] < 0) {
    start(groups);
  }
  if (options_.schedule.due(steps)) {
    event(groups, steps);
  }
  for (size_t g = 0; g < groups.size() && !places_.empty() && g <= places_.back().group; ++g) {
    groups[g]->enter_phase(phase_before(steps), static_cast<uint64_t>(steps) << 20U | g);
  }
}

std::vector<RankControl::Change> RankControl::no_change(const Groups& groups) const {
  std::vector<Change> out;
  for (size_t g = 0; g <= places_.back().group; ++g) {
    const at::Tensor keep = groups[g]->directions();
    out.push_back({keep, at::full(keep.sizes(), -1, at::kLong)});
  }
  return out;
}

// Uniform or allocated ranks: the first directions, which are the largest after the first step's
// balancing.
void RankControl::start(const Groups& groups) {
  std::vector<Change> changes = no_change(groups);
  std::vector<LayerPlan> plans(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    const at::Tensor keep = changes[places_[i].group].keep[places_[i].layer];
    const std::vector<int64_t> active = on(keep);
    const int64_t wanted = first_ranks_.const_data_ptr<int64_t>()[i];
    plans[i].from = static_cast<int64_t>(active.size());
    plans[i].to = std::min(plans[i].from, wanted);
    for (auto j = static_cast<size_t>(plans[i].to); j < active.size(); ++j) {
      keep[active[j]].fill_(false);
      plans[i].dropped.push_back(active[j]);
    }
  }
  for (size_t g = 0; g < changes.size(); ++g) {
    const at::Tensor none = at::zeros({groups[g]->layers(), 1, groups[g]->pairs()[0].in_features()},
                                      groups[g]->factors().input.options());
    groups[g]->change_ranks(changes[g].keep, changes[g].grow, none);
  }
  note(0, plans);
}

void RankControl::event(const Groups& groups, int64_t steps) {
  std::vector<GroupScores> scores;
  std::vector<at::Tensor> live;
  for (size_t g = 0; g <= places_.back().group; ++g) {
    scores.push_back(groups[g]->rank_scores());
    live.push_back(groups[g]->active().to(at::kCPU));
  }
  std::vector<Change> changes = no_change(groups);
  std::vector<LayerPlan> plans(layers_.size());
  int64_t budget = options_.schedule.budget_at(steps, options_.budget, started_with());
  int64_t least = 0;
  std::vector<RankLayer> taking;
  std::vector<RankUtilities> utilities;
  std::vector<size_t> numbers;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto [g, l] = places_[i];
    const std::vector<int64_t> active = on(changes[g].keep[l]);
    plans[i].from = plans[i].to = static_cast<int64_t>(active.size());
    if (!live[g].const_data_ptr<bool>()[l]) {  // AdamW's layers keep all they have
      budget -= layers_[i].cost() * plans[i].from;
      continue;
    }
    const std::vector<double> all = values(scores[g].existing[l]);
    RankUtilities own{{}, values(scores[g].fresh[l])};
    for (const int64_t j : active) {
      own.existing.push_back(all[static_cast<size_t>(j)]);
    }
    least += layers_[i].cost() * options_.rules.min_rank;
    taking.push_back(layers_[i]);
    utilities.push_back(std::move(own));
    numbers.push_back(i);
  }
  if (!taking.empty() && budget >= std::max<int64_t>(1, least)) {
    const std::vector<LayerPlan> plan = plan_ranks(
        taking, utilities, std::min(budget, allocated_parameters(taking)), options_.rules);
    for (size_t k = 0; k < plan.size(); ++k) {
      plans[numbers[k]] = plan[k];
    }
    apply(groups, scores, plans, changes);
  }
  const auto row = std::find(event_steps_.begin() + 1, event_steps_.end(), steps);
  note(row - event_steps_.begin(), plans);
}

void RankControl::apply(const Groups& groups,
                        const std::vector<GroupScores>& scores,
                        const std::vector<LayerPlan>& plans,
                        const std::vector<Change>& changes) const {
  for (size_t i = 0; i < plans.size(); ++i) {
    const auto [g, l] = places_[i];
    const at::Tensor keep = changes[g].keep[l];
    const std::vector<int64_t> active = on(keep);
    for (const int64_t j : plans[i].dropped) {
      keep[active[static_cast<size_t>(j)]].fill_(false);
    }
    const std::vector<int64_t> free = on(keep.logical_not());
    for (size_t j = 0; j < plans[i].grown.size(); ++j) {
      changes[g].grow[l][free[j]].fill_(plans[i].grown[j]);
    }
  }
  for (size_t g = 0; g < changes.size(); ++g) {
    groups[g]->change_ranks(changes[g].keep, changes[g].grow, scores[g].rows);
  }
}

void RankControl::note(int64_t row, const std::vector<LayerPlan>& plans) {
  for (size_t i = 0; i < plans.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    ranks_[row][at].fill_(plans[i].to);
    before_[row][at].fill_(plans[i].from);
    moved_[row][at].fill_(static_cast<int64_t>(plans[i].dropped.size() + plans[i].grown.size()));
    // A direction whose utility was not known counts as irreplaceable: the log stays finite.
    constexpr double kMost = std::numeric_limits<double>::max();
    utility_[row][at].fill_(std::clamp(plans[i].utility, -kMost, kMost));
  }
}

std::vector<RankEvent> RankControl::events() const {
  std::vector<RankEvent> out;
  const auto columns = static_cast<int64_t>(layers_.size());
  for (int64_t row = 0; row < ranks_.size(0); ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t at = row * columns + i;
      if (moved_.const_data_ptr<int64_t>()[at] > 0) {
        out.push_back({event_steps_[static_cast<size_t>(row)], layers_[static_cast<size_t>(i)].name,
                       before_.const_data_ptr<int64_t>()[at], ranks_.const_data_ptr<int64_t>()[at],
                       utility_.const_data_ptr<double>()[at]});
      }
    }
  }
  return out;
}

std::vector<std::pair<int64_t, std::vector<int64_t>>> RankControl::history() const {
  std::vector<std::pair<int64_t, std::vector<int64_t>>> out;
  const int64_t columns = ranks_.size(1);
  for (size_t row = 0; row < event_steps_.size(); ++row) {
    const int64_t* first = ranks_.const_data_ptr<int64_t>() + static_cast<int64_t>(row) * columns;
    if (*first >= 0) {
      out.emplace_back(event_steps_[row], std::vector<int64_t>(first, first + columns));
    }
  }
  return out;
}

std::vector<std::pair<std::string, at::Tensor>> RankControl::named_tensors() const {
  return {{"ranks.first", first_ranks_},
          {"ranks.history", ranks_},
          {"ranks.before", before_},
          {"ranks.moved", moved_},
          {"ranks.utility", utility_}};
}

}  // namespace ctrlora::detail
