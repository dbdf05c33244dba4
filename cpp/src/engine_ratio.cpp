// The engine's part in the ratio test: cpp/README.md, section 4.
#include <ATen/ops/tensor.h>

#include <limits>

#include "ctrlora/engine.h"
#include "detail/check.h"
#include "detail/fallback.h"
#include "detail/rank_control.h"
#include "detail/tensor_math.h"
#include "detail/trial.h"

namespace ctrlora {

bool Engine::ratio_due() const {
  const int64_t next = steps_ + 1;
  if (options_.ratio_every == 0 || next % options_.ratio_every != 0) {
    return false;
  }
  // A step that ends in a change of ranks moves the loss by more than the step.
  return rank_control_ == nullptr || (next > 1 && !rank_control_->options().schedule.due(next));
}

size_t Engine::paired_parameters() const {
  size_t count = 0;
  for (const auto& group : groups_) {
    count += 2 * group->pairs().size();
  }
  return count;
}

std::vector<at::Tensor> Engine::all_parameters() const {
  std::vector<at::Tensor> out;
  for (const auto& group : groups_) {
    for (const LoraPair& pair : group->pairs()) {
      out.insert(out.end(), {pair.a, pair.b});
    }
  }
  for (const auto& fallback : fallbacks_) {
    out.insert(out.end(), fallback->params().begin(), fallback->params().end());
  }
  return out;
}

void Engine::begin_trial() {
  const detail::NumericsGuard guard;
  for (const auto& group : groups_) {
    group->bind();  // so that parameters are where they will be after the step
  }
  trial_ = std::make_unique<detail::Trial>(all_parameters(), named_tensors());
}

StepVerdict Engine::end_trial(double before, double after) {
  const detail::NumericsGuard guard;
  CTRLORA_CHECK(trial_ != nullptr, "ctrlora::Engine::end_trial",
                "expected a step after begin_trial(); got none. Remedy: begin_trial(), step(), "
                "end_trial().");
  const std::unique_ptr<detail::Trial> trial = std::move(trial_);
  if (processes_ != nullptr) {  // the loss of all is the mean of each one's
    const at::Tensor losses = at::tensor({before, after}, trial->decrease().options());
    processes_->all_reduce({losses});
    const auto count = static_cast<double>(processes_->count);
    before = losses[0].item<double>() / count;
    after = losses[1].item<double>() / count;
  }
  const double sign = options_.maximize ? -1.0 : 1.0;
  const StepVerdict verdict =
      radius_.propose(sign * before, sign * after, sign * trial->decrease().item<double>());
  if (verdict == StepVerdict::kReject) {
    // A layer that was handed to AdamW meanwhile stays there: then nothing can be taken back.
    if (named_tensors().size() != trial->state().size()) {
      return StepVerdict::kInvalid;
    }
    const RadiusControl learned = radius_;
    trial->restore_parameters();
    load(trial->state());
    radius_ = learned;
  }
  return verdict;
}

bool Engine::probe_due() const {
  return options_.hutchinson_every > 0 && steps_ % options_.hutchinson_every == 0;
}

void Engine::enter_traces(const std::map<std::string, double>& traces) {
  const detail::NumericsGuard guard;
  for (const auto& group : groups_) {
    group->bind();
    std::vector<double> own;
    for (const LoraPair& pair : group->pairs()) {
      const auto found = traces.find(pair.name);
      own.push_back(found == traces.end() ? std::numeric_limits<double>::quiet_NaN()
                                          : found->second);
    }
    group->enter_traces(at::tensor(own, at::kDouble));
  }
}

std::map<std::string, std::pair<double, double>> Engine::curvature() const {
  const detail::NumericsGuard guard;
  join_refreshes();
  std::map<std::string, std::pair<double, double>> out;
  for (const auto& group : groups_) {
    const LayerGroup::Curvature own = group->curvature();
    const at::Tensor traces = own.hutchinson.to(at::kCPU), kfac = own.kfac.to(at::kCPU);
    for (int64_t l = 0; l < group->layers(); ++l) {
      out[group->pairs()[static_cast<size_t>(l)].name] = {traces.const_data_ptr<double>()[l],
                                                          kfac.const_data_ptr<double>()[l]};
    }
  }
  return out;
}

void Engine::observe(bool on) {
  for (const auto& group : groups_) {
    group->observe_next(on);
  }
  for (const auto& head : heads_) {
    head->set_wanted(on);
  }
}

}  // namespace ctrlora
