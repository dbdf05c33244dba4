// What a rank event does to a group: scores, gauge, directions on and off.
#include <utility>

#include "ctrlora/gauge.h"
#include "ctrlora/layer_group.h"
#include "detail/group_ranks.h"
#include "detail/parameter_slabs.h"
#include "detail/pending_observations.h"
#include "detail/tensor_math.h"

namespace ctrlora {

detail::GroupView LayerGroup::view() const {
  return {parameters_->a(),
          parameters_->b(),
          momentum_a_,
          momentum_b_,
          weighted_gram(input_metric_.whiten, input_.uw, input_.ww),
          weighted_gram(output_metric_.whiten, output_.uw, output_.ww),
          scaling_,
          factors_};
}

void LayerGroup::balance_gauge() {
  const detail::GroupView own = view();
  GaugeMap gauge = balance(own.gram_b, own.gram_a);
  gauge.ok = gauge.ok.logical_and(active_).logical_and(momentum_weight_ > 0);
  apply_gauge(gauge, parameters_->a(), parameters_->b(), momentum_a_, momentum_b_);
  parameters_->publish();
  if (ranks_ != nullptr) {
    ranks_->transport(gauge);
  }
  refresh_grams({0, layers()});
}

void LayerGroup::schedule_ranks(int64_t candidates) {
  ranks_ = std::make_unique<detail::GroupRanks>(view(), options_, candidates);
  if (processes_ != nullptr) {
    ranks_->set_processes(processes_);
  }
}

at::Tensor LayerGroup::directions() const {
  const detail::NumericsGuard guard;
  return (parameters_->a() != 0).any(2).logical_or((parameters_->b() != 0).any(1)).to(at::kCPU);
}

void LayerGroup::enter_phase(int64_t phase, uint64_t stream) {
  const auto next = static_cast<detail::SketchPhase>(phase);
  if (ranks_ != nullptr && ranks_->phase() != next) {
    ranks_->begin(next, view(), stream);
    observe_next(true);
  }
}

detail::GroupScores LayerGroup::rank_scores() {
  balance_gauge();
  return ranks_->scores(view());
}

void LayerGroup::change_ranks(const at::Tensor& keep,
                              const at::Tensor& grow,
                              const at::Tensor& rows) {
  ranks_->change(view(), keep, grow, rows);
  parameters_->publish();
  refresh_grams({0, layers()});
  parameters_->remember();
}

}  // namespace ctrlora
