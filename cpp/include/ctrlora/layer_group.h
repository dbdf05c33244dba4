// Layers of one shape, dtype and device in slabs with a leading dimension L: what a step works on.
//
// Parameters are views into the slabs. Every method is a handful of batched operations, whatever L
// is.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/kronecker_factors.h"
#include "ctrlora/lora_pair.h"
#include "ctrlora/observation.h"
#include "ctrlora/options.h"
#include "ctrlora/processes.h"
#include "ctrlora/proposal.h"
#include "ctrlora/side_stream.h"

namespace ctrlora {

namespace detail {
class GroupRanks;
struct GroupScores;
struct GroupView;
class ParameterSlabs;
class PendingObservations;
}  // namespace detail

class CTRLORA_API LayerGroup : public ObservationSink {
 public:
  /// @param pairs same shapes, dtype and device (the engine sorts them). @param group index of the
  /// parameter group whose settings apply. Their tensors become views into slabs.
  LayerGroup(std::vector<LoraPair> pairs,
             int64_t group,
             Options options,
             std::shared_ptr<RowSampler> sampler);
  ~LayerGroup() override;
  LayerGroup(const LayerGroup&) = delete;
  LayerGroup& operator=(const LayerGroup&) = delete;

  [[nodiscard]] int64_t layers() const { return static_cast<int64_t>(pairs_.size()); }
  [[nodiscard]] int64_t group() const { return group_; }
  [[nodiscard]] int64_t rank() const { return pairs_.front().rank(); }
  [[nodiscard]] int64_t age() const { return age_; }
  [[nodiscard]] const std::vector<LoraPair>& pairs() const { return pairs_; }
  [[nodiscard]] const KroneckerFactors& factors() const { return factors_; }
  [[nodiscard]] const at::Tensor& skipped() const { return skipped_; }  ///< (L) steps left out
  [[nodiscard]] const at::Tensor& misses() const { return misses_; }    ///< (L) failures in a row

  // ---- Observation (called from backward) ----
  /// Plugs the layers' slots into `self` and asks for the first observations.
  static void connect(const std::shared_ptr<LayerGroup>& self);
  RowSampler& sampler() override { return *sampler_; }
  [[nodiscard]] int64_t micro_batch(int64_t layer) const override;
  void observe(int64_t layer, const Observation& observation) override;
  void drop_observations();
  /// @param exchange_every steps between two observations of a layer from now on.
  void set_processes(const std::shared_ptr<const Processes>& processes, int64_t exchange_every);
  /// What several processes send when all layers are observed, for their gradients on each step,
  /// and (ranks) for one rank event.
  [[nodiscard]] Processes::Traffic traffic() const;
  /// Whether layers ask for observations on this step; off until turned on again or the next step.
  void observe_next(bool on);
  /// Enters traces c_l (L) of one Hutchinson probe; NaN where there is none.
  void enter_traces(const at::Tensor& traces);
  struct Curvature {
    at::Tensor hutchinson;  ///< (L) c of M = c I, mean of the probes; NaN: no probe yet
    at::Tensor kfac;        ///< (L) the same of the factors
  };
  [[nodiscard]] Curvature curvature() const;
  void set_loss_scale(double loss_scale) { options_.loss_scale = loss_scale; }

  // ---- One step, in this order (engine.cpp) ----
  /// Adopts parameters whose storage was replaced; follows a change of dtype or device.
  /// @throws c10::ValueError if a parameter's shape changed or the pairs no longer fit together.
  void bind();
  /// M <- beta1 M + (1 - beta1) grad where the gradient exists and is finite.
  void update_momentum();
  /// Enters what the groups of one engine observed since the last step into their factors, beside
  /// training if `side` works there; then it counts from the next step on. All earlier work must
  /// have been joined.
  static void commit_observations(const std::vector<LayerGroup*>& groups, SideStream& side);
  /// The d-wide products of the observed layers with their raw gradients in place of the momenta;
  /// nothing if no layer is due.
  [[nodiscard]] std::optional<Measurement> measure_gradients() const;
  /// How many layers these are.
  [[nodiscard]] int64_t measured_layers() const;
  /// Enters the squared size of those layers' directions into rms.
  void update_rms(const DirectionSquare& direction);
  /// (L) float64: root of the mean squared size so far; 0: not known yet.
  [[nodiscard]] at::Tensor direction_rms() const;
  /// The d-wide products of all layers, and what else the step is decided from.
  [[nodiscard]] Measurement measure(const GroupSettings& settings) const;
  /// W <- (1 - lr weight_decay) W + f delta with f = length * shrink, shrink a float64 scalar.
  void apply(const Proposal& proposal, const at::Tensor& shrink, const GroupSettings& settings);
  /// Counts the step, balances the gauge when due, asks for the next observations.
  void finish();

  /// Takes out the layers that failed `max_misses` times in a row. Synchronises: not for every
  /// step.
  std::vector<LoraPair> take_failed();
  /// The pairs marked in `layers` (L) bool that are still active. Synchronises.
  [[nodiscard]] std::vector<LoraPair> active_pairs(const at::Tensor& layers) const;
  /// Takes out the layers marked in `layers` (L) bool that are still active; they stay in the
  /// slabs.
  std::vector<LoraPair> take_out(const at::Tensor& layers);

  // ---- Ranks (cpp/README.md, section 10) ----
  /// Keeps statistics for rank events from now on. @param candidates new directions to choose from.
  void schedule_ranks(int64_t candidates);
  /// (L, r) bool on the host: directions of which the A row or the B column is not zero.
  [[nodiscard]] at::Tensor directions() const;
  /// (L) bool: not handed to AdamW.
  [[nodiscard]] const at::Tensor& active() const { return active_; }
  /// Starts a phase of the statistics (detail::SketchPhase) where it differs from the present one.
  void enter_phase(int64_t phase, uint64_t stream);
  /// Utilities in the balanced gauge, to which this moves.
  [[nodiscard]] detail::GroupScores rank_scores();
  /// Zeroes the directions not in `keep`, grows `rows` by index (see detail::GroupRanks::change).
  void change_ranks(const at::Tensor& keep, const at::Tensor& grow, const at::Tensor& rows);

  /// State by name, without the parameters; live tensors.
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;
  /// To be called when those were overwritten.
  /// @param observe_every of the run that saved it.
  void after_load(int64_t age, int64_t observe_every);
  /// Steps between two observations of a layer that enter its factors: factor_every of one process,
  /// exchange_every of several.
  [[nodiscard]] int64_t observe_every() const { return observe_every_; }

 private:
  struct Range {
    int64_t begin, end;
    [[nodiscard]] bool has(int64_t layer) const { return begin <= layer && layer < end; }
  };
  [[nodiscard]] Range due(int64_t step, int64_t every) const;
  [[nodiscard]] Range observed() const;
  [[nodiscard]] Range sketched() const;
  [[nodiscard]] Range measured() const;
  [[nodiscard]] std::pair<at::Tensor, at::Tensor> raw_gradients(Range range) const;
  [[nodiscard]] Measurement measurement(Range range,
                                        const at::Tensor& momentum_a,
                                        const at::Tensor& momentum_b) const;
  [[nodiscard]] std::optional<KroneckerFactors::Commit> collect_observations();
  void adopt_factors();
  void refresh_grams(Range range);
  [[nodiscard]] bool lags(int64_t step) const;
  void publish();
  void refresh_metrics();
  void move_state(const at::TensorOptions& options);
  void balance_gauge();
  [[nodiscard]] detail::GroupView view() const;
  [[nodiscard]] double rounding() const;

  std::vector<LoraPair> pairs_;
  std::vector<std::shared_ptr<ObservationSlot>> slots_;  // null: nothing observes this layer
  int64_t group_;
  Options options_;
  int64_t observe_every_;
  std::shared_ptr<RowSampler> sampler_;
  std::unique_ptr<detail::ParameterSlabs> parameters_;
  std::unique_ptr<detail::PendingObservations> observations_;
  std::unique_ptr<detail::GroupRanks> ranks_;   // null: no schedule
  std::shared_ptr<const Processes> processes_;  // null: there is one

  at::Tensor momentum_a_, momentum_b_;   // (L, r, n), (L, m, r), statistics' dtype
  at::Tensor momentum_weight_;           // (L) float64: 1 - beta1^t of the steps taken
  at::Tensor rms_square_, rms_weight_;   // (L) float64 EMA and its weight
  at::Tensor trace_sum_, trace_weight_;  // (L) float64: EMA of c and its weight
  at::Tensor scaling_;                   // (L) float64
  at::Tensor active_;                    // (L) bool: not handed to AdamW
  at::Tensor grad_ok_;                   // (L) bool: this step's gradient exists and is finite
  at::Tensor misses_;                    // (L) int64 failed steps in a row
  at::Tensor skipped_;                   // (L) int64 steps left out for non-finite gradients
  KroneckerFactors factors_;
  KroneckerFactors back_;  // refreshed beside training; used only where refreshes may lag
  bool may_lag_ = false;
  Range refreshing_ = {0, 0};                // layers whose refresh is to be published
  Range changed_ = {0, 0};                   // layers whose factors are new in this step
  SideProducts input_, output_;              // W^T W and U^T W, carried from step to step
  SideMetric input_metric_, output_metric_;  // of the factors as they are
  int64_t age_ = 0;                          // steps taken
};

}  // namespace ctrlora
