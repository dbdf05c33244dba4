#include "detail/tall_kernels.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "detail/instructions.h"
#include "detail/vector.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC would make `rep movsq` of the register tiles' loads: a third of the kernels' time.
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

namespace ctrlora::detail {

namespace {

// ---- x^T y, tall: one vector of y against Group scalars of x per row ----

constexpr int64_t kTallBlock = 128;  // rows that stay in the first cache

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
    __builtin_prefetch(x + kTallBlock * x_stride);  // the next block
    for (int j = 0; j < Group; ++j) {
      sums[j] += x[j] * row;
    }
  }
  for (int j = 0; j < Group; ++j) {
    store(out + j * out_stride, sums[j]);
  }
}

template <int Lanes, int Group>
CTRLORA_INLINE void gram_tall_block(
    const TallMatrix& x, const TallMatrix& y, int64_t row, int64_t rows, float* out) {
  const int64_t r = y.columns;
  for (int64_t c = 0; c < r; c += Lanes) {
    const float* y_block = y.data + row * y.stride + c;
    int64_t j = 0;
    for (; j + Group <= x.columns; j += Group) {
      gram_tall_group<Lanes, Group>(x.data + row * x.stride + j, x.stride, y_block, y.stride, rows,
                                    out + j * r + c, r);
    }
    for (; j < x.columns; ++j) {
      gram_tall_group<Lanes, 1>(x.data + row * x.stride + j, x.stride, y_block, y.stride, rows,
                                out + j * r + c, r);
    }
  }
}

template <int Lanes, int Group>
CTRLORA_INLINE void gram_tall(const TallMatrix* left,
                              int count,
                              const TallMatrix& y,
                              int64_t begin,
                              int64_t end,
                              float* out) {
  for (int64_t row = begin; row < end; row += kTallBlock) {
    float* sums = out;
    for (int t = 0; t < count; sums += left[t].columns * y.columns, ++t) {
      gram_tall_block<Lanes, Group>(left[t], y, row, std::min(kTallBlock, end - row), sums);
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
      __builtin_prefetch(from + i + kWideBlock, 0, 2);
      store(block + i, vector);
    }
    for (; i < kWideBlock; ++i) {
      block[i] = valid && i < size ? from[i] : 0.0F;
    }
  }
}

// Adds the products of two packed blocks to (kWideRows, kWideRows) sums of vectors; of a symmetric
// product the tiles on and above the diagonal.
template <int Lanes, int Tile>
CTRLORA_INLINE void gram_packed(const float* x, const float* y, bool symmetric, float* sums) {
  using V = typename Vector<Lanes>::type;
  for (int64_t p = 0; p < kWideRows; p += Tile) {
    for (int64_t q = symmetric ? p : 0; q < kWideRows; q += Tile) {
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
CTRLORA_INLINE float sum_of_lanes(const float* lanes) {
  float sum = 0;
  for (int lane = 0; lane < Lanes; ++lane) {
    sum += lanes[lane];
  }
  return sum;
}

// Rows [p, p + kWideRows) of x against the packed rows [q, q + kWideRows) of y.
template <int Lanes>
CTRLORA_INLINE void gram_wide_tile(const TallMatrix& x,
                                   const TallMatrix& y,
                                   int64_t p,
                                   int64_t q,
                                   const float* y_blocks,
                                   int64_t begin,
                                   int64_t end,
                                   float* out) {
  constexpr int kTile = Lanes == 16 ? 4 : 2;  // sums that fit the registers
  alignas(64) float x_block[kWideRows * kWideBlock];
  alignas(64) float sums[kWideRows * kWideRows * Lanes];
  const bool symmetric = x.data == y.data && p == q;
  std::fill(std::begin(sums), std::end(sums), 0.0F);
  const float* y_block = y_blocks;
  for (int64_t column = begin; column < end; column += kWideBlock) {
    if (!symmetric) {
      pack_wide<Lanes>(x, p, column, end, x_block);
    }
    gram_packed<Lanes, kTile>(symmetric ? y_block : x_block, y_block, symmetric, sums);
    y_block += kWideRows * kWideBlock;
  }
  for (int64_t i = 0; i < std::min(kWideRows, x.columns - p); ++i) {
    for (int64_t j = 0; j < std::min(kWideRows, y.columns - q); ++j) {
      const bool mirrored = symmetric && j < i;
      const int64_t place = mirrored ? j * kWideRows + i : i * kWideRows + j;
      out[(p + i) * y.columns + q + j] += sum_of_lanes<Lanes>(sums + place * Lanes);
    }
  }
}

template <int Lanes>
CTRLORA_INLINE void gram_wide(const TallMatrix* left,
                              int count,
                              const TallMatrix& y,
                              int64_t begin,
                              int64_t end,
                              float* out) {
  alignas(64) float y_blocks[kWideRows * kGramRows];
  for (int64_t q = 0; q < y.columns; q += kWideRows) {
    for (int64_t column = begin; column < end; column += kWideBlock) {
      pack_wide<Lanes>(y, q, column, end, y_blocks + (column - begin) * kWideRows);
    }
    float* sums = out;
    for (int t = 0; t < count; sums += left[t].columns * y.columns, ++t) {
      for (int64_t p = 0; p < left[t].columns; p += kWideRows) {
        gram_wide_tile<Lanes>(left[t], y, p, q, y_blocks, begin, end, sums);
      }
    }
  }
}

// ---- one body per instruction set, chosen once ----

template <int Lanes>
CTRLORA_INLINE void gram_body(const TallMatrix* left,
                              int count,
                              const TallMatrix& y,
                              bool wide,
                              int64_t begin,
                              int64_t end,
                              float* out) {
  if (wide) {
    gram_wide<Lanes>(left, count, y, begin, end, out);
  } else {
    gram_tall<Lanes, Lanes == 16 ? 16 : 8>(left, count, y, begin, end, out);
  }
}

using Gram = void (*)(const TallMatrix*, int, const TallMatrix&, bool, int64_t, int64_t, float*);

// NOLINTBEGIN(bugprone-macro-parentheses): an attribute cannot stand in parentheses
#define CTRLORA_GRAM(suffix, lanes, attribute)                                                    \
  attribute void gram_##suffix(const TallMatrix* left, int count, const TallMatrix& y, bool wide, \
                               int64_t begin, int64_t end, float* out) {                          \
    gram_body<lanes>(left, count, y, wide, begin, end, out);                                      \
  }

// NOLINTEND(bugprone-macro-parentheses)

CTRLORA_GRAM(lanes4, 4, )
#if defined(__x86_64__)
CTRLORA_GRAM(lanes4_avx2, 4, __attribute__((target("avx2,fma"))))
CTRLORA_GRAM(lanes8_avx2, 8, __attribute__((target("avx2,fma"))))
CTRLORA_GRAM(lanes16_avx512, 16, __attribute__((target("avx512f,fma"))))
#endif

// `wide` vectors run along d, so any number of columns takes the widest ones.
Gram choose(int64_t columns, bool wide) {
#if defined(__x86_64__)
  if (instructions() == Instructions::kAvx512 && (wide || columns % 16 == 0)) {
    return gram_lanes16_avx512;
  }
  if (instructions() != Instructions::kBaseline) {
    return wide || columns % 8 == 0 ? gram_lanes8_avx2 : gram_lanes4_avx2;
  }
#endif
  return gram_lanes4;
}

}  // namespace

void gram_kernel(const TallMatrix* left,
                 int count,
                 const TallMatrix& right,
                 bool wide,
                 int64_t begin,
                 int64_t end,
                 float* out) {
  choose(right.columns, wide)(left, count, right, wide, begin, end, out);
}

}  // namespace ctrlora::detail
