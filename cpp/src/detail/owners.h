// Refreshes divided between processes that hold the same sums: each decomposes the factors it owns
// and sends the others their maps, k x k numbers for d x k of a basis (cpp/README.md, section 11).
//
// What is sent is all that a process needs to write the bases itself, by the same operations on the
// same numbers as everyone: factors are equal everywhere, and those of an undivided refresh.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "ctrlora/low_rank_eigen.h"
#include "ctrlora/processes.h"
#include "detail/nystrom.h"

namespace ctrlora::detail {

class Owners {
 public:
  /// Memory for what one refresh of these factors sends, before anything can fail: processes that
  /// do not all come to exchange() would wait for each other.
  Owners(std::shared_ptr<const Processes> processes, const std::vector<LowRankEigen>& factors);

  /// Whether a factor's maps are worth sending: at most an eighth of the bytes of its sums.
  static bool divides(const LowRankEigen& factor);
  /// Bytes of a factor's maps and numbers for all its layers; 0 where it is not divided.
  static int64_t bytes(const LowRankEigen& factor);

  /// One batch's layers [begin, end) of this process, and room for the maps of all of them.
  struct Share {
    int64_t begin, end;
    at::Tensor maps;     // (L, 3, k, k): of_basis, of_fresh, map
    at::Tensor numbers;  // (L, k + 1): values, ok

    /// Enters what this process decomposed.
    void put(const Nystrom& own) const;
    /// After the exchange: everybody's.
    [[nodiscard]] Nystrom all() const;
  };

  /// Room for the next batch. Layers are cut at equal shares of the work, the sum of d.
  Share next(const Slabs& bases);

  /// Sends and receives, in one call. Every process calls it once.
  void exchange();
  /// For a process that could not come to exchange(): so that nobody waits for it, and all leave
  /// out the whole refresh. Nothing after it.
  void leave();
  /// After the exchange: () bool: nobody left.
  [[nodiscard]] at::Tensor complete() const;

  /// Layers [begin, end) of a joined batch that are process `rank`'s.
  static std::pair<int64_t, int64_t> owned(const Slabs& bases, int64_t rank, int64_t count);

 private:
  std::shared_ptr<const Processes> processes_;
  at::Tensor maps_, numbers_;  // flat; the last number counts processes that left
  int64_t maps_taken_ = 0, numbers_taken_ = 0;
  bool exchanged_ = false;
};

}  // namespace ctrlora::detail
