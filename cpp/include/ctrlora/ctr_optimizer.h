// The engine as a torch::optim::Optimizer: training programs in C++ without Python.
//
// A header of its own, which engine.h does not include: torch's optimizer costs every source that
// sees it seconds. cpp/README.md, section 11.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/optim/optimizer.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ctrlora/engine.h"
#include "ctrlora/export.h"
#include "ctrlora/options.h"

namespace ctrlora {

namespace detail {
class RandomState;
}  // namespace detail

// A number that a parameter group may leave to the optimizer's defaults.
#define CTRLORA_GROUP_OPTION(type, name, standard) \
 public:                                           \
  CTROptions& name(type value) {                   \
    name##_ = value;                               \
    return *this;                                  \
  }                                                \
  [[nodiscard]] type name() const {                \
    return name##_.value_or(standard);             \
  }                                                \
  [[nodiscard]] bool has_##name() const {          \
    return name##_.has_value();                    \
  }                                                \
                                                   \
 private:                                          \
  std::optional<type> name##_

/// Numbers of the optimizer or of one parameter group. A group takes what it does not set from the
/// optimizer's: torch's own merging knows only torch's six optimizers and would drop ours.
class CTRLORA_API CTROptions : public torch::optim::OptimizerCloneableOptions<CTROptions> {
 public:
  CTROptions() = default;
  explicit CTROptions(double learning_rate) { lr(learning_rate); }

  using Betas = std::tuple<double, double>;
  /// Pairs: the largest relative change of a layer's output in one step, >= 0, whatever rank
  /// and alpha: about ten times AdamW's best for the same adapters. In a fallback group: AdamW's.
  CTRLORA_GROUP_OPTION(double, lr, 0.1);
  /// Decoupled decay of A and B: they shrink by lr * weight_decay a step, >= 0.
  CTRLORA_GROUP_OPTION(double, weight_decay, 0.0);
  /// AdamW's learning rate for what is no pair (heads, biases, norms), >= 0; its usual default. The
  /// weight of a registered head moves its outputs by Options::head_step times it.
  CTRLORA_GROUP_OPTION(double, fallback_lr, 1e-3);
  /// AdamW's, in [0, 1).
  CTRLORA_GROUP_OPTION(Betas, fallback_betas, Betas(0.9, 0.999));
  /// AdamW's, >= 0.
  CTRLORA_GROUP_OPTION(double, fallback_eps, 1e-8);
  /// AdamW's; 0, since heads and norms are rarely decayed.
  CTRLORA_GROUP_OPTION(double, fallback_weight_decay, 0.0);

 public:
  /// Steps of the whole run, >= 0; 0: not known. A rank budget's schedule is in shares of it. Of
  /// the optimizer, not of a group.
  CTROptions& total_steps(int64_t steps) {
    total_steps_ = steps;
    return *this;
  }
  [[nodiscard]] int64_t total_steps() const { return total_steps_; }
  /// Share of the allocated parameters that may be active, in (0, 1], over the pairs that the
  /// optimizer is built with; needs total_steps. 0: every direction stays active. Of the optimizer,
  /// not of a group. Engine::schedule_ranks takes finer settings.
  CTROptions& rank_budget(double share) {
    rank_budget_ = share;
    return *this;
  }
  [[nodiscard]] double rank_budget() const { return rank_budget_; }
  /// Settings of the engine. Of the optimizer, not of a group; its fallback_lr is set from ours.
  CTROptions& engine(Options options) {
    engine_ = std::move(options);
    return *this;
  }
  [[nodiscard]] const Options& engine() const { return engine_; }

  /// "pairs" or "fallback": what a group of a CTROptimizer trains.
  [[nodiscard]] bool is_fallback() const { return is_fallback_; }
  /// What the engine reads of this group at a step. @throws c10::ValueError if out of range.
  [[nodiscard]] GroupSettings settings() const;
  /// These, completed by `defaults`.
  [[nodiscard]] CTROptions completed(const CTROptions& defaults) const;

  /// For torch::optim::LRScheduler.
  [[nodiscard]] double get_lr() const override { return lr(); }
  void set_lr(double learning_rate) override { lr(learning_rate); }

 private:
  friend class CTROptimizer;
  [[nodiscard]] CTROptions as_fallback() const;
  int64_t total_steps_ = 0;
  double rank_budget_ = 0.0;
  Options engine_;
  double first_lr_ = 0.0;  // the first that is not 0: the Fisher ball shrinks relative to it
  bool is_fallback_ = false;
};

#undef CTRLORA_GROUP_OPTION

/// Curvature-whitened, trust-region steps for LoRA pairs; AdamW for everything else.
///
/// Pairs are those that LoRALinear or register_pair() put into the registry. Each parameter group
/// becomes two, its pairs and the rest, in this order; both have an lr, so torch's schedulers work.
/// Frozen parameters are left alone and join AdamW's once they require grad.
///
///     ctrlora::CTROptimizer opt(model->parameters(), ctrlora::CTROptions(0.1).total_steps(1000));
///     loss.backward(); opt.step(); opt.zero_grad();
class CTRLORA_API CTROptimizer : public torch::optim::Optimizer {
 public:
  /// @throws c10::ValueError if a number is out of range, a parameter cannot be trained or comes
  /// twice, there is none, or only half a pair is given.
  explicit CTROptimizer(const std::vector<at::Tensor>& params,
                        const CTROptions& defaults = CTROptions());
  /// Groups without options, or whose options are CTROptions.
  explicit CTROptimizer(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                        const CTROptions& defaults = CTROptions());

  /// At any time. @throws c10::ValueError as the constructor.
  // NOLINTNEXTLINE(bugprone-derived-method-shadowing-base-method): torch's would drop our options
  void add_param_group(const torch::optim::OptimizerParamGroup& group);

  /// One step from the gradients in .grad, which are read and never written.
  /// @param closure runs forward and backward once and returns the loss. Where ratio_every asks for
  /// a check it runs again after the step, on the same random numbers and without a trace.
  /// @return its loss, or an undefined tensor.
  at::Tensor step(LossClosure closure = nullptr) override;

  /// One step like step(), for ratio_every without a closure: where a check is due, `loss` is
  /// evaluated before and after the step, without gradients and without a trace.
  /// @param loss of the batch that the gradients came from. @throws c10::ValueError if empty.
  void step_with_loss(const LossClosure& loss);

  /// Forgets the gradients and what was observed while they were made: the backward of a step that
  /// is skipped leaves nothing behind.
  // NOLINTNEXTLINE(bugprone-derived-method-shadowing-base-method): torch's knows of no observations
  void zero_grad(bool set_to_none = true);

  /// The whole state: plain tensors by the engine's names, and the groups' numbers.
  /// torch::save(opt, path) and torch::load(opt, path) call these.
  void save(torch::serialize::OutputArchive& archive) const override;
  /// Training then goes on bit for bit. @throws c10::ValueError before any change if the state is
  /// of another format, other groups or other layers.
  void load(torch::serialize::InputArchive& archive) override;

  /// Active directions of each pair by its name; reading synchronises.
  [[nodiscard]] std::map<std::string, int64_t> ranks() const;
  /// Flat numbers about the last step; reading synchronises.
  [[nodiscard]] std::map<std::string, double> metrics() const { return engine_->metrics(); }
  [[nodiscard]] Engine& engine() { return *engine_; }

 private:
  struct Frozen {
    int64_t group;
    at::Tensor param;
  };
  void add_part(const std::vector<at::Tensor>& params, const CTROptions& options);
  void check_members(const std::vector<at::Tensor>& params) const;
  [[nodiscard]] std::vector<LoraPair> pairs_among(const std::vector<at::Tensor>& params) const;
  void adopt_thawed();
  void schedule_ranks(const CTROptions& defaults);
  [[nodiscard]] std::vector<at::Tensor> all_params() const;
  [[nodiscard]] std::unique_ptr<detail::RandomState> check_due() const;  // null: it is not
  at::Tensor evaluate(const LossClosure& loss,
                      const detail::RandomState& random,
                      bool with_gradients);
  void check_step(const at::Tensor& before, const at::Tensor& after) {
    engine_->end_trial(before.item<double>(), after.item<double>());
  }
  void advance(const at::Tensor& before,
               const LossClosure& again,
               const detail::RandomState* random,
               bool with_gradients);
  CTROptions& options_of(size_t group);
  [[nodiscard]] const CTROptions& options_of(size_t group) const;

  std::unique_ptr<Engine> engine_;
  std::vector<LoraPair> pairs_;
  std::vector<Frozen> frozen_;
};

/// Writes an archive by way of a temporary file in the same folder, synced before it takes the
/// place of `path`: whenever the process dies, `path` is the old file or the new one, whole.
/// @throws c10::Error if the folder cannot be written.
CTRLORA_API void save_atomically(torch::serialize::OutputArchive& archive, const std::string& path);

}  // namespace ctrlora
