#include "detail/tall_kernels.h"

#include <algorithm>
#include <cstring>

namespace ctrlora::detail {

namespace {

#define CTRLORA_INLINE inline __attribute__((always_inline))

template <int Lanes>
struct Vector {
  // NOLINTNEXTLINE(modernize-use-using): the attribute needs a typedef
  typedef float type __attribute__((vector_size(Lanes * sizeof(float))));
};

template <typename V>
CTRLORA_INLINE void load(V& vector, const float* from) {
  std::memcpy(&vector, from, sizeof(V));
}

template <typename V>
CTRLORA_INLINE void store(float* to, const V& vector) {
  std::memcpy(to, &vector, sizeof(V));
}

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

template <int Lanes, int Tile>
CTRLORA_INLINE void gram_wide_tile(const float* x,
                                   int64_t x_stride,
                                   const float* y,
                                   int64_t y_stride,
                                   int64_t size,
                                   float* out,
                                   int64_t out_stride,
                                   int x_count,
                                   int y_count) {
  using V = typename Vector<Lanes>::type;
  const float* x_rows[Tile];
  const float* y_rows[Tile];
  for (int j = 0; j < Tile; ++j) {  // rows past the end repeat the last one; their sums are dropped
    x_rows[j] = x + std::min(j, x_count - 1) * x_stride;
    y_rows[j] = y + std::min(j, y_count - 1) * y_stride;
  }
  V sums[Tile][Tile] = {};
  const int64_t whole = size - size % Lanes;
  for (int64_t i = 0; i < whole; i += Lanes) {
    V right[Tile];
    for (int q = 0; q < Tile; ++q) {
      load(right[q], y_rows[q] + i);
    }
    for (int p = 0; p < Tile; ++p) {
      V left;
      load(left, x_rows[p] + i);
      for (int q = 0; q < Tile; ++q) {
        sums[p][q] += left * right[q];
      }
    }
  }
  for (int p = 0; p < x_count; ++p) {
    for (int q = 0; q < y_count; ++q) {
      float lanes[Lanes];
      store(lanes, sums[p][q]);
      for (int half = Lanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
          lanes[lane] += lanes[lane + half];
        }
      }
      for (int64_t i = whole; i < size; ++i) {
        lanes[0] += x_rows[p][i] * y_rows[q][i];
      }
      out[p * out_stride + q] += lanes[0];
    }
  }
}

template <int Lanes>
CTRLORA_INLINE void gram_wide(
    const TallMatrix& x, const TallMatrix& y, int64_t begin, int64_t end, float* out) {
  constexpr int kTile = Lanes == 16 ? 4 : 3;  // sums that fit the registers
  constexpr int64_t kBlock = 512;             // 16 rows of it stay in the first cache
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t size = std::min(kBlock, end - i);
    for (int64_t p = 0; p < x.columns; p += kTile) {
      for (int64_t q = 0; q < y.columns; q += kTile) {
        gram_wide_tile<Lanes, kTile>(x.data + p * x.stride + i, x.stride, y.data + q * y.stride + i,
                                     y.stride, size, out + p * y.columns + q, y.columns,
                                     static_cast<int>(std::min<int64_t>(kTile, x.columns - p)),
                                     static_cast<int>(std::min<int64_t>(kTile, y.columns - q)));
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

#define CTRLORA_KERNELS(suffix, lanes, attribute)                                                  \
  attribute void gram_##suffix(const TallMatrix& x, const TallMatrix& y, bool wide, int64_t begin, \
                               int64_t end, float* out) {                                          \
    gram_body<lanes>(x, y, wide, begin, end, out);                                                 \
  }                                                                                                \
  attribute void combine_##suffix(const TallMatrix* terms, int count, bool wide,                   \
                                  const float* coefficients, int64_t begin, int64_t end) {         \
    combine_body<lanes>(terms, count, wide, coefficients, begin, end);                             \
  }

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
