// Refresh of several factors at once, as one batch of small tensors. In three parts, so that
// processes with equal sums can divide the middle one, the decompositions (detail/owners.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "ctrlora/low_rank_eigen.h"
#include "detail/nystrom.h"

namespace ctrlora::detail {

class FactorRefresh {
 public:
  /// Shares of what is there and what enters; writes nothing but disposable products.
  /// @param parts factors that update together (LowRankEigen::updates_with).
  explicit FactorRefresh(std::vector<LowRankEigen::Update> parts);

  [[nodiscard]] const Slabs& bases() const { return bases_; }
  /// Decomposes all layers.
  void decompose();
  /// Decomposes layers [begin, end) of the batch, which is not of complete bases.
  /// The batch is as before.
  [[nodiscard]] Nystrom decompose(int64_t begin, int64_t end) const;
  /// Takes decompositions of all layers that somebody made.
  void adopt(const Nystrom& all);

  /// Writes the factors.
  /// @param wanted () bool: whether at all; undefined for yes.
  /// @return (L) bool: layers whose decomposition failed (they kept their old state).
  at::Tensor finish(const at::Tensor& wanted = {});

 private:
  void take(const Nystrom& next);

  std::vector<LowRankEigen::Update> parts_;
  Slabs bases_, rows_;         // U; scaled Y, then the range of F U
  at::Tensor live_;            // (L) bool: something enters; then: and its decomposition is sound
  at::Tensor enters_;          // (L) bool: the former
  at::Tensor mean_, size_;     // (L): of the next eigenvalues; d
  at::Tensor kept_;            // (L, k): what is kept of the eigenvalues, in units of the mean
  at::Tensor present_, next_;  // traces
  at::Tensor eigenvalues_;     // (L, k): present ones
  at::Tensor of_basis_, of_rows_;  // (L, k, k): the next basis; of_rows_ undefined if complete
  at::Tensor values_;              // (L, k): in units of the mean
};

}  // namespace ctrlora::detail
