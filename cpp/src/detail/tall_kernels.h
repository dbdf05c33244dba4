// float32 kernels for CPUs: the d-wide passes of a step, register-tiled for 4-, 8- and 16-lane
// vectors.
//
// MKL's GEMM reaches a tenth of the machine's speed on (16, d) x (d, 16) products; these reach a
// third and read every slab once. Two layouts: "tall" (d, p) rows contiguous, as B is; "wide" (p,
// d), as A is.
#pragma once

#include <cstdint>

namespace ctrlora::detail {

/// One matrix of p vectors of length d. Tall: element (i, j) at data[i * stride + j], i < d.
/// Wide: element (i, j) at data[j * stride + i].
struct TallMatrix {
  float* data = nullptr;
  int64_t columns = 0;  // p
  int64_t stride = 0;
};

/// Whether the kernels take r columns on the vector side: a multiple of 4.
constexpr bool kernel_takes(int64_t columns) {
  return columns > 0 && columns % 4 == 0;
}

/// Most columns that combine_kernel takes of one term, and of all together: they wait on the stack.
inline constexpr int64_t kMaxCombineColumns = 256;
inline constexpr int64_t kMaxCombineRows = 3 * kMaxCombineColumns;

/// Most rows of d that gram_kernel takes at a time: they are packed on the stack.
inline constexpr int64_t kGramRows = 1024;

/// out (sum of left columns, right.columns) += left_t^T right, one left below the other, over rows
/// [begin, end).
void gram_kernel(const TallMatrix* left,
                 int count,
                 const TallMatrix& right,
                 bool wide,
                 int64_t begin,
                 int64_t end,
                 float* out);

/// terms[0] <- sum over t of terms[t] @ coefficients_t over rows [begin, end); the coefficients of
/// all terms lie below each other, (sum of columns, r).
void combine_kernel(const TallMatrix* terms,
                    int count,
                    bool wide,
                    const float* coefficients,
                    int64_t begin,
                    int64_t end);

}  // namespace ctrlora::detail
