// What one group of layers knows for rank events: scores of its directions and a thin sketch of the
// whitened gradient outside them (cpp/README.md, section 10).
//
// Leading dimension L throughout. The sketch has two phases. First Y = G V from random probes V
// gives the range U of the residual; then Z = U^T G is summed over two halves of the rows, so that
// each half can judge the directions of the other. Several processes add up their sums when a phase
// ends, not on every step; until then each one's sums are its own.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/gauge.h"
#include "ctrlora/kronecker_factors.h"
#include "ctrlora/observation.h"
#include "ctrlora/options.h"
#include "ctrlora/processes.h"

namespace ctrlora::detail {

/// The group's own tensors, live.
struct GroupView {
  at::Tensor a, b;                    // (L, r, n), (L, m, r)
  at::Tensor momentum_a, momentum_b;  // statistics' dtype
  at::Tensor gram_a, gram_b;          // Q, P (L, r, r) float64
  at::Tensor scaling;                 // (L) float64
  const KroneckerFactors& factors;
};

enum class SketchPhase : int64_t { kNone = 0, kRange = 1, kSplit = 2 };

/// Utilities on the host, and the A rows of new directions.
struct GroupScores {
  at::Tensor existing;  // (L, r) float64 CPU; of inactive directions meaningless
  at::Tensor fresh;     // (L, q) float64 CPU, descending
  at::Tensor active;    // (L, r) bool CPU
  at::Tensor rows;      // (L, q, n): unit size in the metric, outside the present rows
};

class GroupRanks {
 public:
  GroupRanks(const GroupView& view, const Options& options, int64_t sketch_columns);

  /// Enters a phase: clears the sums and draws or orthonormalises its probes.
  void begin(SketchPhase phase, const GroupView& view, uint64_t stream);
  /// Adds the rows of one backward of one layer to what is pending. Thread-safe.
  void add(int64_t layer, const Observation& rows);
  /// Backwards of this layer that are pending.
  [[nodiscard]] int64_t micro_batch(int64_t layer) const;
  /// From now on a phase ends with the sums of all processes.
  void set_processes(std::shared_ptr<const Processes> processes);
  /// Bytes that a process sends for one event.
  [[nodiscard]] int64_t event_bytes() const;
  /// After named_tensors() were loaded: sums of another process are forgotten here, since that one
  /// will send them.
  void resume();
  /// Enters what is pending into the sums: a step is being taken, and its loss scale is known.
  void commit(double loss_scale);
  /// Forgets it: the step is not taken.
  void drop();
  /// Enters <A_i, gradA_j> of one step, whatever its scale: (L, r, r), for the layers in `live`.
  void score(const at::Tensor& a_grad_a, const at::Tensor& live);
  /// Follows the parameters through a change of gauge.
  void transport(const GaugeMap& gauge);

  /// Ends the second phase. Called by all processes at the same step.
  [[nodiscard]] GroupScores scores(const GroupView& view);
  /// Zeroes what is not in `keep` (L, r) bool, writes rows grow (L, r) int64 (index into
  /// GroupScores::rows, -1: none) as new A rows of the present rows' size; momenta are zeroed.
  void change(const GroupView& view,
              const at::Tensor& keep,
              const at::Tensor& grow,
              const at::Tensor& rows) const;

  [[nodiscard]] SketchPhase phase() const;
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;
  void to(const at::TensorOptions& statistics);

 private:
  [[nodiscard]] at::Tensor whiten(const LowRankEigen& factor,
                                  const at::Tensor& columns,
                                  double sign) const;
  void begin_range(const GroupView& view, uint64_t stream);
  void add_up(const at::Tensor& sums);
  void begin_split(const GroupView& view);

  double exponent_, damping_;
  uint64_t seed_;
  std::shared_ptr<const Processes> processes_;  // null: there is one
  mutable std::mutex mutex_;
  at::Tensor phase_;              // (L) int64, all equal
  at::Tensor probe_a_, probe_b_;  // (L, n, q), (L, m, q): V and U, unwhitened
  at::Tensor sum_b_;              // (L, m, q): G V
  at::Tensor sum_a_;              // (L, 2, q, n): U^T G of both halves
  at::Tensor steps_;              // (L) float64 CPU: steps in the sums, each process' counted
  at::Tensor process_;            // (L) int64 CPU, all equal: whose sums these are
  // The same since the last step; zero, and not added, while nothing is pending.
  at::Tensor pending_b_, pending_a_;
  at::Tensor pending_backwards_;  // (L) float64 CPU
  bool any_pending_ = false;
  at::Tensor score_;        // (L, r, r) float64 sum of A gradA^T
  at::Tensor score_steps_;  // (L) float64
};

}  // namespace ctrlora::detail
