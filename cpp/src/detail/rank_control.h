// Rank events of an engine: when, over which layers, and what they have been.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/layer_group.h"
#include "ctrlora/rank_scheduler.h"

namespace ctrlora::detail {

class RankControl {
 public:
  using Groups = std::vector<std::shared_ptr<LayerGroup>>;

  /// For the layers that `groups` have now. @throws c10::ValueError as check_budget.
  RankControl(const RankOptions& options, const Groups& groups);

  /// Ranks of the start, in place of uniform ones: by utilities of each layer's directions, in the
  /// order of the layers. Only before the first step.
  void allocate(const std::map<std::string, std::vector<double>>& utilities);
  /// After `steps` steps were taken: comes down to the budget after the first one, holds an event
  /// when one is due, starts the statistics' phases.
  void after_step(const Groups& groups, int64_t steps);

  [[nodiscard]] const RankOptions& options() const { return options_; }
  [[nodiscard]] int64_t allocated() const { return allocated_parameters(layers_); }
  /// What has changed so far, the start included.
  [[nodiscard]] std::vector<RankEvent> events() const;
  /// The step of the start and of each event so far, and all layers' ranks after it.
  [[nodiscard]] std::vector<std::pair<int64_t, std::vector<int64_t>>> history() const;
  [[nodiscard]] const std::vector<RankLayer>& layers() const { return layers_; }
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;

 private:
  struct Place {
    size_t group;
    int64_t layer;
  };
  struct Change {
    at::Tensor keep, grow;  // (L, r) bool, int64
  };
  [[nodiscard]] int64_t phase_before(int64_t steps) const;
  [[nodiscard]] int64_t started_with() const;
  [[nodiscard]] std::vector<Change> no_change(const Groups& groups) const;
  void start(const Groups& groups);
  void event(const Groups& groups, int64_t steps);
  void apply(const Groups& groups,
             const std::vector<GroupScores>& scores,
             const std::vector<LayerPlan>& plans,
             const std::vector<Change>& changes) const;
  void note(int64_t row, const std::vector<LayerPlan>& plans);

  RankOptions options_;
  std::vector<RankLayer> layers_;
  std::vector<Place> places_;
  std::vector<int64_t> event_steps_;  // 1 for the start, then the schedule's
  // (events, layers): rank after it, -1 not yet; rank before it; utility
  at::Tensor ranks_, before_, moved_, utility_;
  at::Tensor first_ranks_;  // (layers) int64: of the start
};

}  // namespace ctrlora::detail
