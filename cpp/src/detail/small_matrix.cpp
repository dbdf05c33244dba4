#include "detail/small_matrix.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include <cstring>

#include "detail/instructions.h"

namespace ctrlora::detail {

namespace {

constexpr int kLanes = 8;
// NOLINTNEXTLINE(modernize-use-using): the attribute needs a typedef
typedef double Lane __attribute__((vector_size(kLanes * sizeof(double))));

// A matrix in memory: element (i, j) at data[i * row + j * column].
struct Strided {
  const double* data;
  int64_t row, column;
};

struct Sizes {
  int64_t p, q, s;  // (p, q) x (q, s)
};

// out rows [i, i + Rows), columns [j, j + kLanes).
template <int Rows>
inline __attribute__((always_inline)) void tile(
    const Strided& x, const Strided& y, double* out, int64_t i, int64_t j, const Sizes& sizes) {
  Lane sums[Rows] = {};
  const double* left = x.data + i * x.row;
  const double* right = y.data + j;
  for (int64_t k = 0; k < sizes.q; ++k, left += x.column, right += y.row) {
    Lane row;
    std::memcpy(&row, right, sizeof(Lane));
    for (int r = 0; r < Rows; ++r) {
      sums[r] += left[r * x.row] * row;
    }
  }
  for (int r = 0; r < Rows; ++r) {
    std::memcpy(out + (i + r) * sizes.s + j, &sums[r], sizeof(Lane));
  }
}

// y has unit column stride.
inline __attribute__((always_inline)) void product(const Strided& x,
                                                   const Strided& y,
                                                   double* out,
                                                   const Sizes& sizes) {
  constexpr int kRows = 8;
  const int64_t whole = sizes.s - sizes.s % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    int64_t i = 0;
    for (; i + kRows <= sizes.p; i += kRows) {
      tile<kRows>(x, y, out, i, j, sizes);
    }
    for (; i < sizes.p; ++i) {
      tile<1>(x, y, out, i, j, sizes);
    }
  }
  for (int64_t i = 0; i < sizes.p && whole < sizes.s; ++i) {
    for (int64_t j = whole; j < sizes.s; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < sizes.q; ++k) {
        sum += x.data[i * x.row + k * x.column] * y.data[k * y.row + j];
      }
      out[i * sizes.s + j] = sum;
    }
  }
}

using Product = void (*)(const Strided&, const Strided&, double*, const Sizes&);

void product_default(const Strided& x, const Strided& y, double* out, const Sizes& sizes) {
  product(x, y, out, sizes);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void product_avx2(const Strided& x,
                                                      const Strided& y,
                                                      double* out,
                                                      const Sizes& sizes) {
  product(x, y, out, sizes);
}
__attribute__((target("avx512f,fma"))) void product_avx512(const Strided& x,
                                                           const Strided& y,
                                                           double* out,
                                                           const Sizes& sizes) {
  product(x, y, out, sizes);
}
#endif

Product choose() {
#if defined(__x86_64__)
  if (instructions() == Instructions::kAvx512) {
    return product_avx512;
  }
  if (instructions() == Instructions::kAvx2) {
    return product_avx2;
  }
#endif
  return product_default;
}

}  // namespace

at::Tensor small_bmm(const at::Tensor& x, const at::Tensor& y) {
  if (!x.is_cpu() || x.scalar_type() != at::kDouble) {
    return at::bmm(x, y);
  }
  static const Product multiply = choose();
  const at::Tensor right = y.stride(2) == 1 ? y : y.contiguous();
  const Sizes sizes{x.size(1), x.size(2), y.size(2)};
  at::Tensor out = at::empty({x.size(0), sizes.p, sizes.s}, x.options());
  const auto* from_left = x.const_data_ptr<double>();
  const auto* from_right = right.const_data_ptr<double>();
  auto* to = out.data_ptr<double>();
  for (int64_t l = 0; l < x.size(0); ++l) {
    multiply({from_left + l * x.stride(0), x.stride(1), x.stride(2)},
             {from_right + l * right.stride(0), right.stride(1), 1}, to + l * sizes.p * sizes.s,
             sizes);
  }
  return out;
}

}  // namespace ctrlora::detail
