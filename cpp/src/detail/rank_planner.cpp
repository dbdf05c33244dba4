#include "detail/rank_planner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

namespace ctrlora::detail {

namespace {

constexpr double kIrreplaceable = std::numeric_limits<double>::infinity();

std::vector<int64_t> by_utility(
    const std::vector<double>& utility) {  // descending, first ones first
  std::vector<int64_t> order(utility.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    const double first = utility[static_cast<size_t>(x)];
    const double second = utility[static_cast<size_t>(y)];
    return first != second ? first > second : x < y;
  });
  return order;
}

}  // namespace

std::vector<double> without_nan(std::vector<double> utility, double instead) {
  std::replace_if(utility.begin(), utility.end(), [](double u) { return std::isnan(u); }, instead);
  return utility;
}

std::vector<int64_t> keep_best(const std::vector<RankLayer>& layers,
                               const std::vector<std::vector<double>>& sorted,
                               int64_t budget,
                               const RankRules& rules) {
  struct Item {
    double density;
    size_t position, layer;
  };
  std::vector<int64_t> ranks;
  std::vector<Item> items;
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto least = static_cast<size_t>(rules.min_rank);
    ranks.push_back(static_cast<int64_t>(std::min(least, sorted[l].size())));
    for (size_t i = least; i < sorted[l].size(); ++i) {
      items.push_back({sorted[l][i] / static_cast<double>(layers[l].cost()), i, l});
    }
  }
  std::sort(items.begin(), items.end(), [](const Item& x, const Item& y) {
    return std::make_tuple(-x.density, x.position, x.layer) <
           std::make_tuple(-y.density, y.position, y.layer);
  });
  int64_t left = budget - used_parameters(layers, ranks);
  for (const Item& item : items) {
    if (layers[item.layer].cost() <= left) {
      left -= layers[item.layer].cost();
      ++ranks[item.layer];
    }
  }
  return ranks;
}

RankPlanner::RankPlanner(const std::vector<RankLayer>& layers,
                         const std::vector<RankUtilities>& utilities,
                         int64_t budget,
                         const RankRules& rules)
    : layers_(layers), rules_(rules), budget_(budget), left_(budget) {
  int64_t active = 0;
  for (size_t l = 0; l < layers_.size(); ++l) {
    Layer own;
    own.existing = without_nan(utilities[l].existing, kIrreplaceable);
    own.fresh = without_nan(utilities[l].fresh, 0.0);
    own.kept = by_utility(own.existing);
    own.candidates = by_utility(own.fresh);
    left_ -= layers_[l].cost() * own.rank();
    active += own.rank();
    state_.push_back(std::move(own));
  }
  const double allowed = rules_.max_move * static_cast<double>(active);
  moves_ = std::max<int64_t>(1, std::llround(std::floor(allowed + 1e-9)));  // 0.1 * 30 is 3
}

void RankPlanner::shrink() {
  if (left_ >= 0) {
    return;
  }
  std::vector<std::vector<double>> sorted;
  for (const Layer& own : state_) {
    std::vector<double> utility;
    utility.reserve(own.kept.size());
    for (const int64_t i : own.kept) {
      utility.push_back(own.existing[static_cast<size_t>(i)]);
    }
    sorted.push_back(std::move(utility));
  }
  const std::vector<int64_t> ranks = keep_best(layers_, sorted, budget_, rules_);
  for (size_t l = 0; l < layers_.size(); ++l) {
    state_[l].kept.resize(static_cast<size_t>(ranks[l]));
  }
  left_ = budget_ - used_parameters(layers_, ranks);
}

void RankPlanner::grow() {
  bool moved = true;
  while (moves_ > 0 && moved) {
    moved = false;
    for (const size_t l : candidates()) {
      if (add(l)) {
        moved = true;
        --moves_;
        break;
      }
    }
  }
}

std::vector<LayerPlan> RankPlanner::plan() const {
  std::vector<LayerPlan> out;
  for (const Layer& own : state_) {
    LayerPlan layer;
    layer.from = static_cast<int64_t>(own.existing.size());
    layer.to = own.rank();
    std::vector<bool> stays(own.existing.size(), false);
    for (const int64_t i : own.kept) {
      stays[static_cast<size_t>(i)] = true;
    }
    for (size_t i = 0; i < stays.size(); ++i) {
      if (!stays[i]) {
        layer.dropped.push_back(static_cast<int64_t>(i));
        layer.utility -= own.existing[i];
      }
    }
    for (size_t i = 0; i < own.grown; ++i) {
      layer.grown.push_back(own.candidates[i]);
      layer.utility += own.fresh[static_cast<size_t>(own.candidates[i])];
    }
    out.push_back(std::move(layer));
  }
  return out;
}

// Layers with a useful new direction, the largest utility per parameter first.
std::vector<size_t> RankPlanner::candidates() const {
  std::vector<size_t> order;
  for (size_t l = 0; l < state_.size(); ++l) {
    if (next(l) > 0) {
      order.push_back(l);
    }
  }
  const auto density = [&](size_t l) { return next(l) / static_cast<double>(layers_[l].cost()); };
  std::sort(order.begin(), order.end(), [&](size_t x, size_t y) {
    return density(x) != density(y) ? density(x) > density(y) : x < y;
  });
  return order;
}

// Utility of layer l's best candidate that is not yet in.
double RankPlanner::next(size_t l) const {
  const Layer& own = state_[l];
  return own.grown < own.candidates.size()
             ? own.fresh[static_cast<size_t>(own.candidates[own.grown])]
             : 0.0;
}

double RankPlanner::last_kept(size_t l) const {
  return state_[l].existing[static_cast<size_t>(state_[l].kept.back())];
}

// Adds layer l's next direction, in place of the least useful ones where there is no room.
bool RankPlanner::add(size_t l) {
  const double gain = next(l);
  double lost = 0.0;
  std::vector<std::pair<size_t, int64_t>> removed;
  ++state_[l].grown;
  left_ -= layers_[l].cost();
  while (left_ < 0 || state_[l].rank() > layers_[l].allocated) {
    const bool full = state_[l].rank() > layers_[l].allocated;
    const std::optional<size_t> from = weakest(full ? std::optional<size_t>(l) : std::nullopt);
    if (!from.has_value()) {
      lost = kIrreplaceable;
      break;
    }
    lost += std::max(0.0, last_kept(*from));
    removed.emplace_back(*from, state_[*from].kept.back());
    state_[*from].kept.pop_back();
    left_ += layers_[*from].cost();
  }
  if (gain > rules_.hysteresis * lost) {
    return true;
  }
  for (auto item = removed.rbegin(); item != removed.rend(); ++item) {
    state_[item->first].kept.push_back(item->second);
    left_ -= layers_[item->first].cost();
  }
  --state_[l].grown;
  left_ += layers_[l].cost();
  return false;
}

// The layer that loses least per parameter by dropping a direction, or only `only`.
std::optional<size_t> RankPlanner::weakest(std::optional<size_t> only) const {
  std::optional<size_t> best;
  double least = kIrreplaceable;
  for (size_t l = 0; l < state_.size(); ++l) {
    if ((only.has_value() && *only != l) || state_[l].kept.empty() ||
        state_[l].rank() <= rules_.min_rank) {
      continue;
    }
    const double density = last_kept(l) / static_cast<double>(layers_[l].cost());
    const bool tie = best.has_value() && density == least;
    if (density < least || (tie && state_[l].kept.size() >= state_[*best].kept.size())) {
      best = l;
      least = density;
    }
  }
  return best;
}

}  // namespace ctrlora::detail
