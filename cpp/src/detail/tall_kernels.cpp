#include "detail/tall_kernels.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "detail/vector.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC would make `rep movsq` of the register tiles' loads: a third of the kernels' time.
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

namespace ctrlora::detail {

namespace {

// ---- x^T y, tall: one vector of y against Group scalars of x per row ----

template <int Lanes, int Group>
CTRLORA_INLINE void gram_tall_group(const float* x,
                                    int64_t x_stride,
                                    const float* y,
                                    int64_t y_stride,
                                    int64_t rows,
                                    float* out,
                                    int64_t out_stride) {
  using V = typename Vector<Lanes>::type;
  V sums[Group];
  for (int j = 0; j < Group; ++j) {
    load(sums[j], out + j * out_stride);
  }
  for (int64_t i = 0; i < rows; ++i, x += x_stride, y += y_stride) {
    V row;
    load(row, y);
    for (int j = 0; j < Group; ++j) {
      sums[j] += x[j] * row;
    }
  }
  for (int j = 0; j < Group; ++j) {
    store(out + j * out_stride, sums[j]);
  }
}

template <int Lanes, int Group>
CTRLORA_INLINE void gram_tall(
    const TallMatrix& x, const TallMatrix& y, int64_t begin, int64_t end, float* out) {
  const int64_t r = y.columns;
  constexpr int64_t kBlock = 128;  // rows that stay in the first cache
  for (int64_t row = begin; row < end; row += kBlock) {
    const int64_t rows = std::min(kBlock, end - row);
    for (int64_t c = 0; c < r; c += Lanes) {
      const float* y_block = y.data + row * y.stride + c;
      int64_t j = 0;
      for (; j + Group <= x.columns; j += Group) {
        gram_tall_group<Lanes, Group>(x.data + row * x.stride + j, x.stride, y_block, y.stride,
                                      rows, out + j * r + c, r);
      }
      for (; j < x.columns; ++j) {
        gram_tall_group<Lanes, 1>(x.data + row * x.stride + j, x.stride, y_block, y.stride, rows,
                                  out + j * r + c, r);
      }
    }
  }
}

// ---- x^T y, wide: a tile of rows of x against a tile of rows of y ----

constexpr int64_t kWideBlock = 128;  // columns of a packed block
constexpr int64_t kWideRows =
    16;  // rows of a packed block: 8 KB, so that two and their sums stay in cache

// Rows of A lie a power of two apart, where they evict each other: a block is copied together
// first. Rows and columns past the end are zero.
template <int Lanes>
CTRLORA_INLINE void pack_wide(
    const TallMatrix& matrix, int64_t row, int64_t column, int64_t end, float* block) {
  using V = typename Vector<Lanes>::type;
  const int64_t size = std::min(kWideBlock, end - column);
  const int64_t whole = size - size % Lanes;
  for (int64_t j = 0; j < kWideRows; ++j, block += kWideBlock) {
    const bool valid = row + j < matrix.columns;
    const float* from = matrix.data + (valid ? row + j : row) * matrix.stride + column;
    int64_t i = 0;
    for (; valid && i < whole; i += Lanes) {
      V vector;
      load(vector, from + i);
      store(block + i, vector);
    }
    for (; i < kWideBlock; ++i) {
      block[i] = valid && i < size ? from[i] : 0.0F;
    }
  }
}

// Adds the products of two packed blocks to (kWideRows, kWideRows) sums of vectors.
template <int Lanes, int Tile>
CTRLORA_INLINE void gram_packed(const float* x, const float* y, float* sums) {
  using V = typename Vector<Lanes>::type;
  for (int64_t p = 0; p < kWideRows; p += Tile) {
    for (int64_t q = 0; q < kWideRows; q += Tile) {
      V tile[Tile][Tile];
      for (int i = 0; i < Tile; ++i) {
        for (int j = 0; j < Tile; ++j) {
          load(tile[i][j], sums + ((p + i) * kWideRows + q + j) * Lanes);
        }
      }
      for (int64_t c = 0; c < kWideBlock; c += Lanes) {
        V right[Tile];
        for (int j = 0; j < Tile; ++j) {
          load(right[j], y + (q + j) * kWideBlock + c);
        }
        for (int i = 0; i < Tile; ++i) {
          V left;
          load(left, x + (p + i) * kWideBlock + c);
          for (int j = 0; j < Tile; ++j) {
            tile[i][j] += left * right[j];
          }
        }
      }
      for (int i = 0; i < Tile; ++i) {
        for (int j = 0; j < Tile; ++j) {
          store(sums + ((p + i) * kWideRows + q + j) * Lanes, tile[i][j]);
        }
      }
    }
  }
}

template <int Lanes>
CTRLORA_INLINE void gram_wide(
    const TallMatrix& x, const TallMatrix& y, int64_t begin, int64_t end, float* out) {
  constexpr int kTile = Lanes == 16 ? 4 : 2;  // sums that fit the registers
  alignas(64) float x_block[kWideRows * kWideBlock];
  alignas(64) float y_block[kWideRows * kWideBlock];
  alignas(64) float sums[kWideRows * kWideRows * Lanes];
  for (int64_t p = 0; p < x.columns; p += kWideRows) {
    for (int64_t q = 0; q < y.columns; q += kWideRows) {
      std::fill(std::begin(sums), std::end(sums), 0.0F);
      for (int64_t column = begin; column < end; column += kWideBlock) {
        pack_wide<Lanes>(x, p, column, end, x_block);
        pack_wide<Lanes>(y, q, column, end, y_block);
        gram_packed<Lanes, kTile>(x_block, y_block, sums);
      }
      for (int64_t i = 0; i < std::min(kWideRows, x.columns - p); ++i) {
        for (int64_t j = 0; j < std::min(kWideRows, y.columns - q); ++j) {
          const float* lanes = sums + (i * kWideRows + j) * Lanes;
          float sum = 0;
          for (int lane = 0; lane < Lanes; ++lane) {
            sum += lanes[lane];
          }
          out[(p + i) * y.columns + q + j] += sum;
        }
      }
    }
  }
}

// ---- terms[0] <- sum of terms @ coefficients ----

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

template <int Lanes, int Group>
CTRLORA_INLINE void combine_wide_columns(
    const TallMatrix* terms, int count, const float* coefficients, int64_t column, float* result) {
  using V = typename Vector<Lanes>::type;
  const int64_t r = terms[0].columns;
  for (int64_t first = 0; first < r; first += Group) {
    V sums[Group] = {};
    const float* weights = coefficients + first;
    for (int t = 0; t < count; ++t) {
      const float* base = terms[t].data + column;
      for (int64_t s = 0; s < terms[t].columns; ++s, weights += r) {
        V value;
        load(value, base + s * terms[t].stride);
        // Too many rows for the hardware's own prefetching.
        __builtin_prefetch(base + s * terms[t].stride + int64_t{4} * Lanes);
        for (int i = 0; i < Group; ++i) {
          sums[i] += weights[i] * value;
        }
      }
    }
    for (int i = 0; i < Group; ++i) {
      store(result + (first + i) * Lanes, sums[i]);
    }
  }
}

template <int Lanes>
CTRLORA_INLINE void combine_wide(
    const TallMatrix* terms, int count, const float* coefficients, int64_t begin, int64_t end) {
  const int64_t r = terms[0].columns;
  float result[kMaxCombineColumns * Lanes];
  int64_t column = begin;
  for (; column + Lanes <= end; column += Lanes) {
    if (r % 16 == 0) {
      combine_wide_columns<Lanes, Lanes == 16 ? 16 : 8>(terms, count, coefficients, column, result);
    } else {
      combine_wide_columns<Lanes, 4>(terms, count, coefficients, column, result);
    }
    for (int64_t i = 0; i < r; ++i) {
      std::memcpy(terms[0].data + i * terms[0].stride + column, result + i * Lanes,
                  Lanes * sizeof(float));
    }
  }
  for (; column < end; ++column) {
    combine_wide_columns<1, 4>(terms, count, coefficients, column, result);
    for (int64_t i = 0; i < r; ++i) {
      terms[0].data[i * terms[0].stride + column] = result[i];
    }
  }
}

// ---- one body per instruction set, chosen once ----

template <int Lanes>
CTRLORA_INLINE void gram_body(
    const TallMatrix& x, const TallMatrix& y, bool wide, int64_t begin, int64_t end, float* out) {
  if (wide) {
    gram_wide<Lanes>(x, y, begin, end, out);
  } else {
    gram_tall<Lanes, Lanes == 16 ? 16 : 8>(x, y, begin, end, out);
  }
}

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

using Gram = void (*)(const TallMatrix&, const TallMatrix&, bool, int64_t, int64_t, float*);
using Combine = void (*)(const TallMatrix*, int, bool, const float*, int64_t, int64_t);

// NOLINTBEGIN(bugprone-macro-parentheses): an attribute cannot stand in parentheses
#define CTRLORA_KERNELS(suffix, lanes, attribute)                                                  \
  attribute void gram_##suffix(const TallMatrix& x, const TallMatrix& y, bool wide, int64_t begin, \
                               int64_t end, float* out) {                                          \
    gram_body<lanes>(x, y, wide, begin, end, out);                                                 \
  }                                                                                                \
  attribute void combine_##suffix(const TallMatrix* terms, int count, bool wide,                   \
                                  const float* coefficients, int64_t begin, int64_t end) {         \
    combine_body<lanes>(terms, count, wide, coefficients, begin, end);                             \
  }

// NOLINTEND(bugprone-macro-parentheses)

CTRLORA_KERNELS(lanes4, 4, )
#if defined(__x86_64__)
CTRLORA_KERNELS(lanes4_avx2, 4, __attribute__((target("avx2,fma"))))
CTRLORA_KERNELS(lanes8_avx2, 8, __attribute__((target("avx2,fma"))))
CTRLORA_KERNELS(lanes16_avx512, 16, __attribute__((target("avx512f,fma"))))
#endif

struct Kernels {
  Gram gram;
  Combine combine;
};

// `wide` vectors run along d, so any number of columns takes the widest ones.
Kernels choose(int64_t columns, bool wide) {
#if defined(__x86_64__)
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && (wide || columns % 16 == 0)) {
    return {gram_lanes16_avx512, combine_lanes16_avx512};
  }
  if (has_avx2 && (wide || columns % 8 == 0)) {
    return {gram_lanes8_avx2, combine_lanes8_avx2};
  }
  if (has_avx2) {
    return {gram_lanes4_avx2, combine_lanes4_avx2};
  }
#endif
  return {gram_lanes4, combine_lanes4};
}

}  // namespace

void gram_kernel(
    const TallMatrix& x, const TallMatrix& y, bool wide, int64_t begin, int64_t end, float* out) {
  choose(y.columns, wide).gram(x, y, wide, begin, end, out);
}

void combine_kernel(const TallMatrix* terms,
                    int count,
                    bool wide,
                    const float* coefficients,
                    int64_t begin,
                    int64_t end) {
  choose(terms[0].columns, wide).combine(terms, count, wide, coefficients, begin, end);
}

}  // namespace ctrlora::detail
