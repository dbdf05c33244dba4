// Which layer gets how many directions under a budget of parameters, and when: utilities in, plan
// out. Plain numbers; touches no parameter (cpp/README.md, section 10).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ctrlora/export.h"

namespace ctrlora {

/// What the scheduler knows of one layer. A direction costs out_features + in_features parameters.
struct CTRLORA_API RankLayer {
  std::string name;
  int64_t out_features = 0;
  int64_t in_features = 0;
  int64_t allocated = 0;  ///< rank of the layer's tensors: the most that can be active, >= 1

  [[nodiscard]] int64_t cost() const { return out_features + in_features; }
};

struct CTRLORA_API RankRules {
  /// Every layer keeps at least this many directions, >= 0. 1: a layer that is off can be found
  /// useful again, and PEFT knows no rank 0.
  int64_t min_rank = 1;

  /// A new direction replaces old ones when its utility is more than this many times theirs, >= 1.
  /// 1.25: utilities are noisy, and a replaced direction loses what it has learnt.
  double hysteresis = 1.25;

  /// Share of the active directions that one event may add, in (0, 1]; one is always allowed. 0.3
  /// leaves most of a layer as it was: the momenta of a new direction start at zero.
  double max_move = 0.3;

  /// @throws c10::ValueError naming the rule that is violated.
  void validate() const;
};

/// When ranks change, in fractions of the training: utilities need a warm-up, and the last
/// directions need time to learn.
struct CTRLORA_API RankSchedule {
  int64_t total_steps = 0;  ///< length of the training, >= 1
  double first = 0.05;      ///< first event: right after the usual warm-up, in [0, 1]
  double every = 0.02;      ///< between events, but at least `min_steps`
  double last = 0.9;        ///< no event after this share, in [first, 1]
  int64_t min_steps = 8;    ///< >= 1: every layer is seen in each half of a window
  bool descend = false;     ///< start with every allocated direction and come down cubically

  /// @throws c10::ValueError if a number is out of range, or a descent has no event.
  void validate() const;
  [[nodiscard]] int64_t interval() const;     ///< steps between two events
  [[nodiscard]] int64_t first_event() const;  ///< steps taken before it; may lie past last_event()
  [[nodiscard]] int64_t last_event() const;   ///< 0 if there is none
  /// Whether ranks change after `steps` steps were taken.
  [[nodiscard]] bool due(int64_t steps) const;
  /// Parameters allowed after `steps` steps: `budget`, or during a descent, which takes the first
  /// quarter of the events, budget + (allocated - budget) (1 - progress)^3 (AdaLoRA, arXiv
  /// 2303.10512, equation 12).
  [[nodiscard]] int64_t budget_at(int64_t steps, int64_t budget, int64_t allocated) const;
};

/// A budget and how an engine keeps to it.
struct CTRLORA_API RankOptions {
  int64_t budget = 0;  ///< parameters, see check_budget
  RankSchedule schedule;
  RankRules rules;
  /// Steps before an event over which utilities are averaged, >= 2. 40: each layer is observed on a
  /// third of them.
  int64_t window = 40;
  /// New directions that an event can choose from in each layer, >= 1: columns of the sketch.
  int64_t candidates = 8;

  /// @throws c10::ValueError naming what is out of range.
  void validate() const;
};

/// Utilities of one layer, in units of the loss. A NaN counts as 0 for a new direction and as
/// irreplaceable for an existing one.
struct CTRLORA_API RankUtilities {
  std::vector<double> existing;  ///< loss increase if removed; one per active direction
  std::vector<double> fresh;     ///< loss decrease if added; any number
};

struct CTRLORA_API LayerPlan {
  int64_t from = 0;              ///< rank before
  int64_t to = 0;                ///< rank after
  std::vector<int64_t> dropped;  ///< indices into RankUtilities::existing, ascending
  std::vector<int64_t> grown;    ///< indices into RankUtilities::fresh, best first
  double utility = 0.0;          ///< of what is grown less what is dropped
};

/// A layer whose directions change.
struct CTRLORA_API RankEvent {
  int64_t step = 0;  ///< steps taken before it
  std::string layer;
  int64_t from = 0;
  int64_t to = 0;
  double utility = 0.0;
};

/// Parameters of all allocated directions.
CTRLORA_API int64_t allocated_parameters(const std::vector<RankLayer>& layers);

/// Parameters of `ranks`, one per layer.
CTRLORA_API int64_t used_parameters(const std::vector<RankLayer>& layers,
                                    const std::vector<int64_t>& ranks);

/// floor(fraction * allocated parameters). @throws c10::ValueError as check_budget, or if the
/// fraction is not in (0, 1].
CTRLORA_API int64_t budget_from_fraction(const std::vector<RankLayer>& layers,
                                         double fraction,
                                         const RankRules& rules);

/// @throws c10::ValueError if `budget` parameters are fewer than min_rank costs or more than are
/// allocated, or if a layer is no layer.
CTRLORA_API void check_budget(const std::vector<RankLayer>& layers,
                              int64_t budget,
                              const RankRules& rules);

/// Ranks from nothing: min_rank everywhere, then the direction with the largest utility per
/// parameter that still fits. Equal ones go to the layer with fewer so far, then to the first
/// layer; so empty utilities give a uniform allocation.
/// @param utilities of each layer's directions, in any order; missing ones count as 0.
/// @throws c10::ValueError as check_budget.
CTRLORA_API std::vector<int64_t> allocate_ranks(const std::vector<RankLayer>& layers,
                                                const std::vector<std::vector<double>>& utilities,
                                                int64_t budget,
                                                const RankRules& rules);

/// One event: what does not fit the budget goes (least utility per parameter first), free room is
/// filled, then new directions replace old ones while that pays by `hysteresis`. Deterministic; the
/// sum of the utilities never falls except by what the budget forces out.
/// @throws c10::ValueError as check_budget, or if a layer has more directions than allocated.
CTRLORA_API std::vector<LayerPlan> plan_ranks(const std::vector<RankLayer>& layers,
                                              const std::vector<RankUtilities>& utilities,
                                              int64_t budget,
                                              const RankRules& rules);

}  // namespace ctrlora
