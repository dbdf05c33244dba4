// Greedy choice of directions under a budget: the inner part of plan_ranks.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "ctrlora/rank_scheduler.h"

namespace ctrlora::detail {

/// The utilities with every NaN replaced.
std::vector<double> without_nan(std::vector<double> utility, double instead);

/// How many of each layer's directions fit into the budget, greedy by utility per parameter.
/// @param sorted utilities of each layer, descending.
std::vector<int64_t> keep_best(const std::vector<RankLayer>& layers,
                               const std::vector<std::vector<double>>& sorted,
                               int64_t budget,
                               const RankRules& rules);

/// One event: which directions are kept and grown so far.
class RankPlanner {
 public:
  RankPlanner(const std::vector<RankLayer>& layers,
              const std::vector<RankUtilities>& utilities,
              int64_t budget,
              const RankRules& rules);

  void shrink();  ///< drops what the budget does not hold
  void grow();    ///< fills free room, then exchanges while it pays
  [[nodiscard]] std::vector<LayerPlan> plan() const;

 private:
  struct Layer {
    std::vector<double> existing, fresh;
    std::vector<int64_t> kept;        // of existing, best first
    std::vector<int64_t> candidates;  // of fresh, best first
    size_t grown = 0;                 // so many of them are in
    [[nodiscard]] int64_t rank() const { return static_cast<int64_t>(kept.size() + grown); }
  };
  [[nodiscard]] std::vector<size_t> candidates() const;
  [[nodiscard]] double next(size_t l) const;
  [[nodiscard]] double last_kept(size_t l) const;
  [[nodiscard]] std::optional<size_t> weakest(std::optional<size_t> only) const;
  bool add(size_t l);

  const std::vector<RankLayer>& layers_;
  const RankRules& rules_;
  int64_t budget_;
  int64_t left_;
  int64_t moves_ = 1;
  std::vector<Layer> state_;
};

}  // namespace ctrlora::detail
