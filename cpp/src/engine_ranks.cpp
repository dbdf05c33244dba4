// The engine's part in rank schedules.
#include "ctrlora/engine.h"
#include "detail/check.h"
#include "detail/fallback.h"
#include "detail/rank_control.h"
#include "detail/rank_space.h"

namespace ctrlora {

void Engine::schedule_ranks(const RankOptions& ranks) {
  constexpr const char* kWhere = "ctrlora::Engine::schedule_ranks";
  CTRLORA_CHECK(rank_control_ == nullptr && steps_ == 0, kWhere,
                "expected one schedule, before the first step; got ",
                rank_control_ == nullptr ? "one after it" : "a second one",
                ". Remedy: build a new optimizer.");
  CTRLORA_CHECK(!groups_.empty(), kWhere, "expected LoRA pairs; got none. Remedy: no rank_budget.");
  rank_control_ = std::make_unique<detail::RankControl>(ranks, groups_);
  for (const auto& group : groups_) {
    group->schedule_ranks(ranks.candidates);
  }
  rank_control_->after_step(groups_, 0);
  if (processes_ != nullptr) {  // what is sent for events leaves less to the factors
    exchange_every_ = 0;
    inform_of_processes(0);
  }
}

void Engine::allocate_ranks(const std::map<std::string, std::vector<double>>& utilities) {
  CTRLORA_CHECK(rank_control_ != nullptr, "ctrlora::Engine::allocate_ranks",
                "expected an engine with a budget; got one without. Remedy: schedule_ranks "
                "(rank_budget=...).");
  rank_control_->allocate(utilities);
}

std::map<std::string, int64_t> Engine::ranks() const {
  std::map<std::string, int64_t> out;
  for (const auto& group : groups_) {
    const at::Tensor counts = group->directions().sum(-1);
    for (int64_t l = 0; l < group->layers(); ++l) {
      out[group->pairs()[static_cast<size_t>(l)].name] = counts.const_data_ptr<int64_t>()[l];
    }
  }
  return out;
}

std::vector<RankEvent> Engine::rank_events() const {
  return rank_control_ == nullptr ? std::vector<RankEvent>() : rank_control_->events();
}

std::vector<std::pair<int64_t, std::vector<int64_t>>> Engine::rank_history() const {
  return rank_control_ == nullptr ? std::vector<std::pair<int64_t, std::vector<int64_t>>>()
                                  : rank_control_->history();
}

std::vector<std::vector<std::string>> Engine::layout() const {
  std::vector<std::vector<std::string>> out;
  for (const auto& group : groups_) {
    out.emplace_back();
    for (const LoraPair& pair : group->pairs()) {
      out.back().push_back(pair.name);
    }
  }
  return out;
}

}  // namespace ctrlora
