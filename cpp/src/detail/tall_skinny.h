// The d-wide passes of a step: Grams of tall slabs and linear combinations of them. These touch
// every parameter-sized array, so they are the step's cost; everything else is (r, r) or smaller.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace ctrlora::detail {

/// Several left sides against one right side: every slab is (L, d, .) of any strides.
struct GramJob {
  std::vector<at::Tensor> left;  // (L, d, p_i)
  at::Tensor right;              // (L, d, q)
};

/// left_i^T right for all jobs in one pass over d: per job (L, sum of p_i, q) float64. The sums run
/// in chunks of fixed size, so the result does not depend on the number of threads.
std::vector<at::Tensor> tall_grams(const std::vector<GramJob>& jobs);

/// x^T y for x (L, d, p), y (L, d, q) of any strides: (L, p, q) float64.
at::Tensor tall_gram(const at::Tensor& x, const at::Tensor& y);

/// Squared norms of rows (..., d): (...) float64; inf or NaN where a row holds one, or overflows.
at::Tensor row_squares(const at::Tensor& rows);

/// The same of the rows `index` (R) int64 of `rows` (N, d) alone.
at::Tensor row_squares(const at::Tensor& rows, const at::Tensor& index);

/// At most 256 of the rows (N, ...), evenly spaced, without a copy.
at::Tensor some_rows(const at::Tensor& rows);

/// A slab (L, d, p) and its coefficients (L, p, r) float64.
struct Term {
  at::Tensor slab;
  at::Tensor coefficients;
};

/// First slab <- sum of slab @ coefficients over the terms, in place, at most three of them. Its
/// dtype may be narrower than the others'; sums run in the second one's.
void tall_combine(const std::vector<Term>& terms);

/// momentum <- beta momentum + (1 - beta) grads of both sides, for the layers that are in `wanted`
/// (L) bool and whose two gradients are finite and not so large that their Grams overflow; other
/// layers stay bit for bit.
/// @return (L) bool: both gradients are finite and in range; undefined ones count as such.
at::Tensor momentum_step(const std::vector<at::Tensor>& grads_a,
                         const at::Tensor& momentum_a,
                         const std::vector<at::Tensor>& grads_b,
                         const at::Tensor& momentum_b,
                         const at::Tensor& wanted,
                         double beta);

/// Gradients as one slab like `like`; layers that are not ok, or have none, are zero.
at::Tensor stack_gradients(const std::vector<at::Tensor>& grads,
                           const at::Tensor& ok,
                           const at::Tensor& like);

}  // namespace ctrlora::detail
