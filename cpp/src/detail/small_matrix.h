// Batched products of (r, r)- and (k, r)-sized float64 matrices: the step's rank-space algebra.
//
// A step has a hundred of them. BLAS would open a parallel region for each, which costs more than
// the product and stalls when cores are shared; on a CPU these run on the calling thread.
#pragma once

#include <ATen/core/Tensor.h>

namespace ctrlora::detail {

/// x @ y for x (L, p, q), y (L, q, s), float64, any strides.
at::Tensor small_bmm(const at::Tensor& x, const at::Tensor& y);

}  // namespace ctrlora::detail
