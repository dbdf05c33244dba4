// All layers, one step: decides when things happen and owns the state. Knows no Python, no
// param_groups.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/head.h"
#include "ctrlora/layer_group.h"
#include "ctrlora/lora_pair.h"
#include "ctrlora/options.h"
#include "ctrlora/processes.h"
#include "ctrlora/radius_control.h"
#include "ctrlora/rank_scheduler.h"
#include "ctrlora/side_stream.h"

namespace ctrlora {

namespace detail {
class AdamW;
class RankControl;
class Trial;
}  // namespace detail

class CTRLORA_API Engine {
 public:
  /// @throws c10::ValueError if an option is out of range.
  explicit Engine(const Options& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Takes over pairs under parameter group `group`: their tensors become views into slabs.
  /// @throws c10::ValueError if a pair is invalid or one of its tensors is here already.
  void add_pairs(const std::vector<LoraPair>& pairs, int64_t group);

  /// Other parameters of group `group`: trained by AdamW (Loshchilov & Hutter 2019). The weight of
  /// a head that register_head() knows bounds the pairs' steps from now on.
  void add_fallback(const std::vector<at::Tensor>& params, int64_t group);

  /// Keeps the pairs that are here now to a budget of parameters: ranks come down to it after the
  /// first step and move between layers on schedule. Pairs added later are left alone. To be called
  /// before the first step or before load().
  /// @throws c10::ValueError as check_budget and RankOptions::validate, or a second time.
  void schedule_ranks(const RankOptions& ranks);
  /// The ranks to start with, by utilities of every layer's directions (by name, in any order), as
  /// an initialisation finds them, within the budget. Only after schedule_ranks and before the
  /// first step.
  void allocate_ranks(const std::map<std::string, std::vector<double>>& utilities);
  /// Active directions of each pair by name. Synchronises.
  [[nodiscard]] std::map<std::string, int64_t> ranks() const;
  /// What rank events have changed so far.
  [[nodiscard]] std::vector<RankEvent> rank_events() const;
  /// The step of each event so far, and the ranks after it in the order of layout().
  [[nodiscard]] std::vector<std::pair<int64_t, std::vector<int64_t>>> rank_history() const;

  /// One step from the gradients in .grad. Groups with lr 0 and all their state stay untouched.
  /// @param settings one per parameter group, by index.
  void step(const std::vector<GroupSettings>& settings);

  // ---- Ratio test (cpp/README.md, section 4): begin_trial(), step(), end_trial() ----
  /// Whether the next step is one to check: every ratio_every-th, unless ranks change after it.
  [[nodiscard]] bool ratio_due() const;
  /// Keeps a copy of parameters and state for the next step.
  void begin_trial();
  /// Adjusts the radii by what that step did to the loss of the batch that its gradients came from;
  /// takes the step back where the verdict is kReject, parameters and state bit for bit.
  /// @param before, after the loss on that batch before and after the step. Synchronises.
  StepVerdict end_trial(double before, double after);

  // ---- Hutchinson's traces (section 2): a HutchinsonProbe over all pairs, then enter_traces()
  // ----

  [[nodiscard]] bool probe_due() const;
  /// c_l of the layers by name; the missing ones are left alone.
  void enter_traces(const std::map<std::string, double>& traces);
  /// Mean curvature c of M = c I by name, from the traces and from the factors. Synchronises.
  [[nodiscard]] std::map<std::string, std::pair<double, double>> curvature() const;
  /// Whether layers ask for observations: off while the loss is evaluated a second time.
  void observe(bool on);

  /// Scale of the loss for the gradients observed from now on (GradScaler).
  void set_loss_scale(double loss_scale);

  /// The same model is trained by several processes with equal gradients (DDP). To be called
  /// before anything is observed; what was observed since the last step is dropped.
  /// @throws c10::ValueError if rank or count make no sense.
  void set_processes(Processes processes);

  /// Forgets what was observed since the last step: gradients that are thrown away take their rows
  /// along.
  void drop_observations();

  [[nodiscard]] int64_t steps() const { return steps_; }
  [[nodiscard]] const Options& options() const { return options_; }
  /// Names of the pairs that were handed to AdamW after repeated failures.
  [[nodiscard]] const std::vector<std::string>& retired() const { return retired_; }

  /// Names of the layers of each group, in the order of its tensors' leading dimension.
  [[nodiscard]] std::vector<std::vector<std::string>> layout() const;

  /// Flat numbers about the last step. Reading synchronises with the device.
  [[nodiscard]] std::map<std::string, double> metrics() const;

  /// The whole state but the parameters, by stable names; live tensors.
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;
  /// Restores it. @throws c10::ValueError printing the names or shapes that differ, before any
  /// change.
  void load(const std::map<std::string, at::Tensor>& tensors);
  /// Bytes of that state.
  [[nodiscard]] int64_t state_bytes() const;

 private:
  struct StepReport;
  [[nodiscard]] std::vector<const GroupSettings*> checked(
      const std::vector<GroupSettings>& settings) const;
  [[nodiscard]] double schedule() const;
  void commit_heads(const std::vector<const GroupSettings*>& by_group);
  void fisher_ball();
  void head_ball();
  void inform_of_processes(size_t first);
  void join_refreshes() const;
  [[nodiscard]] std::vector<at::Tensor> all_parameters() const;
  [[nodiscard]] size_t paired_parameters() const;
  [[nodiscard]] GroupSettings fallback_settings(
      const detail::AdamW& fallback, const std::vector<const GroupSettings*>& by_group) const;
  void retire_failed_layers();
  void hand_to_adamw(const LoraPair& pair, int64_t group);

  Options options_;
  std::shared_ptr<RowSampler> sampler_;
  std::vector<std::shared_ptr<LayerGroup>> groups_;
  std::vector<std::unique_ptr<detail::AdamW>> fallbacks_;
  std::vector<std::shared_ptr<HeadSlot>> heads_;
  std::shared_ptr<HeadMeter> head_meter_;
  std::vector<std::string> retired_;
  std::unique_ptr<StepReport> report_;
  std::shared_ptr<const Processes> processes_;  // null: there is one
  int64_t exchange_every_ = 0;                  // 0: not yet known
  std::unique_ptr<detail::RankControl> rank_control_;
  std::unique_ptr<detail::Trial> trial_;  // null: the step is not checked
  RadiusControl radius_;
  int64_t steps_ = 0;
  mutable SideStream side_stream_;  // last: work under way ends before what it writes to goes
};

}  // namespace ctrlora
