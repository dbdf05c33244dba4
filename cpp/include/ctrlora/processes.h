// One model trained by several processes (DDP): what they add up, and at which point.
//
// DDP makes the gradients equal everywhere. What a layer observed is local: the processes add up
// their sums where these enter the factors, once per step, and divide the decompositions of what
// these refresh (detail/owners.h). Everything else is computed by each process from equal numbers.
// The core calls a function and knows no c10d (cpp/README.md, 11).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/kronecker_factors.h"

namespace ctrlora {

struct CTRLORA_API Processes {
  /// Sums each tensor in place over all processes. Called at the same points of a step by every
  /// one, with tensors of the same shapes; results must have the same bits everywhere.
  std::function<void(const std::vector<at::Tensor>&)> all_reduce;
  int64_t rank = 0;   ///< of this process, in [0, count)
  int64_t count = 1;  ///< of processes, >= 1

  /// @throws c10::ValueError naming what is wrong.
  void validate() const;

  /// Bytes that a process hands to all_reduce.
  struct Traffic {
    int64_t sketches = 0;   ///< by `sum` and the owners of refreshes, for all layers once
    int64_t gradients = 0;  ///< by DDP, on each step
    int64_t ranks = 0;      ///< by sketches for rank events, on the average step between two
  };

  /// In which dtype products of sampled rows are sent: float32 as bfloat16, others as they are. Its
  /// rounding, 2^-9 of each number, is far below the rows' noise.
  static at::ScalarType sent_dtype(at::ScalarType dtype);

  /// Fewest steps between two exchanges with which both kinds of sketches take at most 1/24 of the
  /// gradients' bytes: 4.2 %, so that with the first steps 5 % are not exceeded. Sketches for rank
  /// events that take more than half of it (a training of few steps) leave the other half.
  static int64_t exchange_every(const Traffic& traffic);

  /// The sums of all processes, by one call with two tensors. A layer keeps its gradient
  /// proxy only if no process ever observed it.
  /// @param mean_loss each process' loss is a mean, and DDP's loss the mean of those: a row's g is
  /// 1/count of what its process saw.
  [[nodiscard]] CurvatureSketch sum(const CurvatureSketch& own, bool mean_loss) const;
};

}  // namespace ctrlora
