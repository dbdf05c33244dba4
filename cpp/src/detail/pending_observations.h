// What a group's backwards reported since the last step: sums per layer, linear in the rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/kronecker_factors.h"
#include "ctrlora/observation.h"
#include "ctrlora/options.h"
#include "ctrlora/processes.h"

namespace ctrlora::detail {

/// Thread-safe: backwards may run on several autograd threads.
class PendingObservations {
 public:
  /// Rows of one layer as one batch: all tensors (1, R) or (1, R, d).
  struct Rows {
    at::Tensor values;   // zero where a row held a non-finite number
    at::Tensor squares;  // of their norms, float64; zero there, too
    at::Tensor finite;   // bool
    at::Tensor weights;  // rows each one stands for, float64; 0: does not count
  };

  PendingObservations(int64_t layers, const Options& options);

  [[nodiscard]] int64_t micro_batch(int64_t layer) const;

  /// Adds one backward of one layer, sketched in the layer's present bases; the rows are freed.
  void add(int64_t layer, const Observation& observation, KroneckerFactors& factors);

  /// Rows for the gradient proxy: gradA (L, r, n), gradB^T (L, r, m), zero where a layer has none.
  using GradientRows = std::function<std::pair<at::Tensor, at::Tensor>()>;

  /// The sums of layers [begin, end) as one batch. Layers that were never observed contribute their
  /// gradients (gradient proxy) where `grad_ok` (L) holds. @param factors the same layers' factors.
  /// @param age steps taken so far.
  [[nodiscard]] CurvatureSketch collect(int64_t begin,
                                        int64_t end,
                                        int64_t age,
                                        KroneckerFactors& factors,
                                        const GradientRows& gradient_rows,
                                        const at::Tensor& grad_ok);

  /// Forgets the sums (a step was taken, or the rows belong to a step that will not be).
  void clear();

  /// What must be saved for a run to go on bit for bit, live: "share_set" (L) int64, layers with
  /// one number receive one input tensor, -1: not known yet; "started" (L) bool, has a basis from
  /// rows; "observed" (L) bool, got rows at least once. All on the host: backward asks for them.
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;
  [[nodiscard]] int64_t share_set(int64_t layer) const {
    return share_set_.const_data_ptr<int64_t>()[layer];
  }
  /// From now on sums are those of all processes. Bases that rows have not started yet are started
  /// from random numbers, the same in every process. What is pending is dropped.
  /// @param observe_every steps between two observations of a layer from now on.
  void set_processes(std::shared_ptr<const Processes> processes,
                     int64_t observe_every,
                     KroneckerFactors& factors);
  /// After these and the factors were loaded.
  void resume(KroneckerFactors& factors);

 private:
  struct Sums {
    int64_t count = 0;
    FactorSketch input, output;
    at::Tensor input_memory, output_memory;  // their products as they lie in memory
    at::Tensor base_square, sequences;
  };
  struct Shared {  // the last input that was sketched
    at::Tensor inputs;
    Rows rows;
    int64_t set = -1;
    FactorSketch sketch;
  };
  [[nodiscard]] FactorSketch input_sketch(int64_t layer,
                                          const Observation& observation,
                                          const Rows& rows,
                                          KroneckerFactors& factors);
  [[nodiscard]] static bool is(const at::Tensor& flags, int64_t layer);
  static void set(const at::Tensor& flags, int64_t layer);
  [[nodiscard]] bool together(int64_t layer, int64_t other) const;
  void separate();
  void start_all(KroneckerFactors& factors);

  mutable std::mutex mutex_;
  uint64_t seed_;
  int64_t observe_every_;
  bool mean_loss_;
  std::shared_ptr<const Processes> processes_;  // null: there is one
  std::vector<Sums> sums_;
  at::Tensor share_set_, started_, observed_;  // see named_tensors()
  Shared last_;
  // Where the sums of a CPU's layers are put together: memory that is touched for the first time
  // costs there more than what is computed on it. Devices' allocators give the same back.
  at::Tensor input_rows_, output_rows_;
};

}  // namespace ctrlora::detail
