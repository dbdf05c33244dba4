#include "detail/tall_kernels.h"

#include <algorithm>
#include <cstring>

#include "detail/instructions.h"
#include "detail/vector.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC would make `rep movsq` of the register tiles' loads: a third of the kernels' time.
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

namespace ctrlora::detail {

namespace {

// ---- terms[0] <- sum of terms @ coefficients ----

constexpr int64_t kCombineBlock = 128;  // columns whose rows of all terms stay in the first cache

// Rows rows from `row` on, into `result` (Rows, r). Stride: that of all terms if known (0: not), so
// that rows need no pointers of their own.
template <int Lanes, int Rows, int Stride>
CTRLORA_INLINE void combine_tall_rows(
    const TallMatrix* terms, int count, const float* coefficients, int64_t row, float* result) {
  using V = typename Vector<Lanes>::type;
  const int64_t r = Stride > 0 ? Stride : terms[0].columns;
  for (int64_t c = 0; c < r; c += Lanes) {
    V sums[Rows] = {};
    const float* weights = coefficients + c;
    for (int t = 0; t < count; ++t) {
      const int64_t stride = Stride > 0 ? Stride : terms[t].stride;
      const float* base = terms[t].data + row * stride;
      for (int64_t s = 0; s < terms[t].columns; ++s, weights += r) {
        V weight;
        load(weight, weights);
        __builtin_prefetch(base + (Rows + s % Rows) * stride);  // the next rows
        for (int i = 0; i < Rows; ++i) {
          sums[i] += base[i * stride + s] * weight;
        }
      }
    }
    for (int i = 0; i < Rows; ++i) {
      store(result + i * r + c, sums[i]);
    }
  }
}

template <int Lanes, int Rows, int Stride>
CTRLORA_INLINE void combine_tall(
    const TallMatrix* terms, int count, const float* coefficients, int64_t begin, int64_t end) {
  const int64_t r = terms[0].columns;
  float result[Rows * kMaxCombineColumns];
  const auto write = [&](int64_t row, int64_t rows) {  // only when all of a row's inputs were read
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(terms[0].data + (row + i) * terms[0].stride, result + i * r,
                  static_cast<size_t>(r) * sizeof(float));
    }
  };
  int64_t row = begin;
  for (; row + Rows <= end; row += Rows) {
    combine_tall_rows<Lanes, Rows, Stride>(terms, count, coefficients, row, result);
    write(row, Rows);
  }
  for (; row < end; ++row) {
    combine_tall_rows<Lanes, 1, Stride>(terms, count, coefficients, row, result);
    write(row, 1);
  }
}

// Group rows of the result from rows of `block`, whose columns are `Columns` apart.
template <int Lanes, int Group>
CTRLORA_INLINE void combine_wide_group(const float* block,
                                       int64_t rows,
                                       const float* weights,
                                       int64_t r,
                                       float* result,
                                       int64_t result_stride) {
  using V = typename Vector<Lanes>::type;
  V sums[Group] = {};
  for (int64_t s = 0; s < rows; ++s, weights += r, block += kCombineBlock) {
    V value;
    load(value, block);
    for (int i = 0; i < Group; ++i) {
      sums[i] += weights[i] * value;
    }
  }
  for (int i = 0; i < Group; ++i) {
    store(result + i * result_stride, sums[i]);
  }
}

// All terms' rows of columns [column, column + size) below each other, see pack_wide.
CTRLORA_INLINE int64_t
gather_rows(const TallMatrix* terms, int count, int64_t column, int64_t size, float* block) {
  int64_t rows = 0;
  for (int t = 0; t < count; ++t) {
    for (int64_t s = 0; s < terms[t].columns; ++s, ++rows) {
      const float* from = terms[t].data + s * terms[t].stride + column;
      float* to = block + rows * kCombineBlock;
      for (int64_t i = 0; i < size; ++i) {
        to[i] = from[i];
      }
      for (int64_t i = 0; i < kCombineBlock; i += 16) {
        __builtin_prefetch(from + kCombineBlock + i, 0, 2);
      }
    }
  }
  return rows;
}

template <int Lanes>
CTRLORA_INLINE void combine_wide(
    const TallMatrix* terms, int count, const float* coefficients, int64_t begin, int64_t end) {
  constexpr int kGroup = Lanes == 16 ? 16 : 8;
  const int64_t r = terms[0].columns;
  alignas(64) float block[kMaxCombineRows * kCombineBlock];
  for (int64_t column = begin; column < end; column += kCombineBlock) {
    const int64_t size = std::min(kCombineBlock, end - column);
    const int64_t rows = gather_rows(terms, count, column, size, block);
    const int64_t whole = size - size % Lanes;
    float* out = terms[0].data + column;  // read already
    int64_t first = 0;
    for (; first + kGroup <= r; first += kGroup) {
      for (int64_t c = 0; c < whole; c += Lanes) {
        combine_wide_group<Lanes, kGroup>(block + c, rows, coefficients + first, r,
                                          out + first * terms[0].stride + c, terms[0].stride);
      }
    }
    for (; first < r; first += 4) {
      for (int64_t c = 0; c < whole; c += Lanes) {
        combine_wide_group<Lanes, 4>(block + c, rows, coefficients + first, r,
                                     out + first * terms[0].stride + c, terms[0].stride);
      }
    }
    for (int64_t c = whole; c < size; ++c) {
      for (first = 0; first < r; first += 4) {
        combine_wide_group<1, 4>(block + c, rows, coefficients + first, r,
                                 out + first * terms[0].stride + c, terms[0].stride);
      }
    }
  }
}

// ---- one body per instruction set, chosen once ----

template <int Lanes>
CTRLORA_INLINE void combine_body(const TallMatrix* terms,
                                 int count,
                                 bool wide,
                                 const float* coefficients,
                                 int64_t begin,
                                 int64_t end) {
  if (wide) {
    combine_wide<Lanes>(terms, count, coefficients, begin, end);
  } else {
    const bool known = std::all_of(terms, terms + count, [](const TallMatrix& term) {
      return term.stride == Lanes && term.columns == Lanes;
    });
    if (known) {
      combine_tall<Lanes, Lanes == 16 ? 16 : 8, Lanes>(terms, count, coefficients, begin, end);
    } else {
      combine_tall<Lanes, 6, 0>(terms, count, coefficients, begin, end);
    }
  }
}

using Combine = void (*)(const TallMatrix*, int, bool, const float*, int64_t, int64_t);

// NOLINTBEGIN(bugprone-macro-parentheses): an attribute cannot stand in parentheses
#define CTRLORA_COMBINE(suffix, lanes, attribute)                                          \
  attribute void combine_##suffix(const TallMatrix* terms, int count, bool wide,           \
                                  const float* coefficients, int64_t begin, int64_t end) { \
    combine_body<lanes>(terms, count, wide, coefficients, begin, end);                     \
  }

// NOLINTEND(bugprone-macro-parentheses)

CTRLORA_COMBINE(lanes4, 4, )
#if defined(__x86_64__)
CTRLORA_COMBINE(lanes4_avx2, 4, __attribute__((target("avx2,fma"))))
CTRLORA_COMBINE(lanes8_avx2, 8, __attribute__((target("avx2,fma"))))
CTRLORA_COMBINE(lanes16_avx512, 16, __attribute__((target("avx512f,fma"))))
#endif

// `wide` vectors run along d, so any number of columns takes the widest ones.
Combine choose(int64_t columns, bool wide) {
#if defined(__x86_64__)
  if (instructions() == Instructions::kAvx512 && (wide || columns % 16 == 0)) {
    return combine_lanes16_avx512;
  }
  if (instructions() != Instructions::kBaseline) {
    return wide || columns % 8 == 0 ? combine_lanes8_avx2 : combine_lanes4_avx2;
  }
#endif
  return combine_lanes4;
}

}  // namespace

void combine_kernel(const TallMatrix* terms,
                    int count,
                    bool wide,
                    const float* coefficients,
                    int64_t begin,
                    int64_t end) {
  choose(terms[0].columns, wide)(terms, count, wide, coefficients, begin, end);
}

}  // namespace ctrlora::detail
