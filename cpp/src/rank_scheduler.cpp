#include "ctrlora/rank_scheduler.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "detail/check.h"
#include "detail/rank_planner.h"

namespace ctrlora {

namespace {

constexpr const char* kWhere = "ctrlora::rank_scheduler";

// Share of the events over which a descent comes down. Later ones take directions that have learnt
// much from others that could have learnt it instead: over all events the demo's job ends 0.004
// nats higher, and linearly over all 0.02 (cpp/README.md, section 12).
constexpr double kDescent = 0.25;

// A share of a whole number, rounded; 0.07 * 100 is 7, whatever the last bit says.
int64_t share_up(double share, int64_t of) {
  return std::llround(std::ceil(share * static_cast<double>(of) - 1e-9));
}

int64_t share_down(double share, int64_t of) {
  return std::llround(std::floor(share * static_cast<double>(of) + 1e-9));
}

}  // namespace

void RankRules::validate() const {
  CTRLORA_CHECK(min_rank >= 0, kWhere, "min_rank = ", min_rank,
                ". Violated constraint: min_rank >= 0.");
  CTRLORA_CHECK(std::isfinite(hysteresis) && hysteresis >= 1, kWhere, "hysteresis = ", hysteresis,
                ". Violated constraint: hysteresis >= 1.");
  CTRLORA_CHECK(max_move > 0 && max_move <= 1, kWhere, "max_move = ", max_move,
                ". Violated constraint: 0 < max_move <= 1.");
}

void RankOptions::validate() const {
  rules.validate();
  schedule.validate();
  CTRLORA_CHECK(window >= 2, kWhere, "window = ", window, ". Violated constraint: window >= 2.");
  CTRLORA_CHECK(candidates >= 1, kWhere, "candidates = ", candidates,
                ". Violated constraint: candidates >= 1.");
}

// ---- When ----

void RankSchedule::validate() const {
  CTRLORA_CHECK(total_steps >= 1, kWhere, "total_steps = ", total_steps,
                ". Violated constraint: total_steps >= 1: a rank schedule is in fractions of the "
                "training. Remedy: pass total_steps, or no rank_budget.");
  CTRLORA_CHECK(first >= 0 && first <= last && last <= 1, kWhere, "first = ", first,
                ", last = ", last, ". Violated constraint: 0 <= first <= last <= 1.");
  CTRLORA_CHECK(every >= 0 && every <= 1, kWhere, "every = ", every,
                ". Violated constraint: 0 <= every <= 1.");
  CTRLORA_CHECK(min_steps >= 1, kWhere, "min_steps = ", min_steps,
                ". Violated constraint: min_steps >= 1.");
  CTRLORA_CHECK(!descend || last_event() > 0, kWhere, "a training of ", total_steps,
                " steps has no rank event between ", first, " and ", last,
                " of it, so a descent never reaches its budget. Remedy: train longer, or start at "
                "the budget.");
}

int64_t RankSchedule::interval() const {
  return std::max(min_steps, share_up(every, total_steps));
}

int64_t RankSchedule::first_event() const {
  return std::max<int64_t>(1, share_up(first, total_steps));
}

int64_t RankSchedule::last_event() const {
  const int64_t end = share_down(last, total_steps);
  return end < first_event() ? 0 : first_event() + (end - first_event()) / interval() * interval();
}

bool RankSchedule::due(int64_t steps) const {
  return steps >= first_event() && steps <= last_event() &&
         (steps - first_event()) % interval() == 0;
}

int64_t RankSchedule::budget_at(int64_t steps, int64_t budget, int64_t allocated) const {
  if (!descend || steps >= last_event()) {
    return budget;
  }
  if (steps < first_event()) {
    return allocated;
  }
  const auto span = static_cast<double>(last_event() - first_event() + interval());
  const auto past = static_cast<double>(steps - first_event() + interval());
  const double rest = std::pow(1.0 - std::clamp(past / (kDescent * span), 0.0, 1.0), 3.0);
  return budget + share_down(rest, allocated - budget);
}

// ---- How many ----

int64_t allocated_parameters(const std::vector<RankLayer>& layers) {
  int64_t sum = 0;
  for (const RankLayer& layer : layers) {
    sum += layer.cost() * layer.allocated;
  }
  return sum;
}

int64_t used_parameters(const std::vector<RankLayer>& layers, const std::vector<int64_t>& ranks) {
  CTRLORA_CHECK(layers.size() == ranks.size(), kWhere, "expected a rank for each of ",
                layers.size(), " layers; got ", ranks.size(), ".");
  int64_t sum = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    sum += layers[l].cost() * ranks[l];
  }
  return sum;
}

void check_budget(const std::vector<RankLayer>& layers, int64_t budget, const RankRules& rules) {
  rules.validate();
  CTRLORA_CHECK(!layers.empty(), kWhere, "expected layers; got none.");
  int64_t least = 0;
  for (const RankLayer& layer : layers) {
    CTRLORA_CHECK(layer.out_features >= 1 && layer.in_features >= 1, kWhere, "layer '", layer.name,
                  "' has sizes (", layer.out_features, ", ", layer.in_features,
                  "). Violated constraint: both >= 1.");
    CTRLORA_CHECK(layer.allocated >= 1 && layer.allocated >= rules.min_rank, kWhere, "layer '",
                  layer.name, "' has rank ", layer.allocated, ", min_rank = ", rules.min_rank,
                  ". Violated constraint: rank >= 1 and >= min_rank.");
    least += layer.cost() * rules.min_rank;
  }
  const int64_t most = allocated_parameters(layers);
  CTRLORA_CHECK(budget >= std::max<int64_t>(1, least), kWhere, "rank_budget = ", budget,
                " parameters. Violated constraint: rank ", rules.min_rank, " in each of ",
                layers.size(), " layers takes ", least,
                ". Remedy: a larger budget, or a smaller min_rank.");
  CTRLORA_CHECK(budget <= most, kWhere, "rank_budget = ", budget,
                " parameters. Violated constraint: only ", most,
                " are allocated. Remedy: a larger rank in LoraConfig, or a smaller budget.");
}

int64_t budget_from_fraction(const std::vector<RankLayer>& layers,
                             double fraction,
                             const RankRules& rules) {
  CTRLORA_CHECK(fraction > 0 && fraction <= 1, kWhere, "rank_budget = ", fraction,
                ". Violated constraint: a fraction in (0, 1], or a whole number of parameters.");
  const int64_t budget = share_down(fraction, allocated_parameters(layers));
  check_budget(layers, budget, rules);
  return budget;
}

std::vector<int64_t> allocate_ranks(const std::vector<RankLayer>& layers,
                                    const std::vector<std::vector<double>>& utilities,
                                    int64_t budget,
                                    const RankRules& rules) {
  check_budget(layers, budget, rules);
  CTRLORA_CHECK(utilities.size() == layers.size(), kWhere, "expected utilities for each of ",
                layers.size(), " layers; got ", utilities.size(), ".");
  std::vector<std::vector<double>> sorted;
  for (size_t l = 0; l < layers.size(); ++l) {
    std::vector<double> own = detail::without_nan(utilities[l], 0.0);
    own.resize(std::max(own.size(), static_cast<size_t>(layers[l].allocated)), 0.0);
    std::sort(own.begin(), own.end(), std::greater<>());
    own.resize(static_cast<size_t>(layers[l].allocated));
    sorted.push_back(std::move(own));
  }
  return detail::keep_best(layers, sorted, budget, rules);
}

std::vector<LayerPlan> plan_ranks(const std::vector<RankLayer>& layers,
                                  const std::vector<RankUtilities>& utilities,
                                  int64_t budget,
                                  const RankRules& rules) {
  check_budget(layers, budget, rules);
  CTRLORA_CHECK(utilities.size() == layers.size(), kWhere, "expected utilities for each of ",
                layers.size(), " layers; got ", utilities.size(), ".");
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto active = static_cast<int64_t>(utilities[l].existing.size());
    CTRLORA_CHECK(active <= layers[l].allocated, kWhere, "layer '", layers[l].name, "' has ",
                  active, " utilities of existing directions; expected at most its rank ",
                  layers[l].allocated, ".");
  }
  detail::RankPlanner planner(layers, utilities, budget, rules);
  planner.shrink();
  planner.grow();
  return planner.plan();
}

}  // namespace ctrlora
