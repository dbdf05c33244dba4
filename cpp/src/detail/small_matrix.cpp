#include "detail/small_matrix.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

namespace ctrlora::detail {

namespace {

constexpr int kLanes = 8;
// NOLINTNEXTLINE(modernize-use-using): the attribute needs a typedef
typedef double Lane __attribute__((vector_size(kLanes * sizeof(double))));

// out rows [i, i + Rows), columns [j, j + kLanes).
template <int Rows>
inline __attribute__((always_inline)) void tile(
    const double* x, const double* y, double* out, int64_t q, int64_t s) {
  Lane sums[Rows] = {};
  for (int64_t k = 0; k < q; ++k) {
    Lane right;
    std::memcpy(&right, y + k * s, sizeof(Lane));
    for (int i = 0; i < Rows; ++i) {
      sums[i] += x[i * q + k] * right;
    }
  }
  for (int i = 0; i < Rows; ++i) {
    std::memcpy(out + i * s, &sums[i], sizeof(Lane));
  }
}

inline __attribute__((always_inline)) void product(
    const double* x, const double* y, double* out, int64_t p, int64_t q, int64_t s) {
  constexpr int kRows = 4;
  const int64_t whole = s - s % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    int64_t i = 0;
    for (; i + kRows <= p; i += kRows) {
      tile<kRows>(x + i * q, y + j, out + i * s + j, q, s);
    }
    for (; i < p; ++i) {
      tile<1>(x + i * q, y + j, out + i * s + j, q, s);
    }
  }
  for (int64_t i = 0; i < p && whole < s; ++i) {
    for (int64_t j = whole; j < s; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < q; ++k) {
        sum += x[i * q + k] * y[k * s + j];
      }
      out[i * s + j] = sum;
    }
  }
}

using Product = void (*)(const double*, const double*, double*, int64_t, int64_t, int64_t);

void product_default(
    const double* x, const double* y, double* out, int64_t p, int64_t q, int64_t s) {
  product(x, y, out, p, q, s);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void product_avx2(
    const double* x, const double* y, double* out, int64_t p, int64_t q, int64_t s) {
  product(x, y, out, p, q, s);
}
__attribute__((target("avx512f,fma"))) void product_avx512(
    const double* x, const double* y, double* out, int64_t p, int64_t q, int64_t s) {
  product(x, y, out, p, q, s);
}
#endif

Product choose() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    return product_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
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
  const at::Tensor left = x.contiguous();
  const at::Tensor right = y.contiguous();
  const int64_t p = x.size(1);
  const int64_t q = x.size(2);
  const int64_t s = y.size(2);
  at::Tensor out = at::empty({x.size(0), p, s}, left.options());
  const auto* from_left = left.const_data_ptr<double>();
  const auto* from_right = right.const_data_ptr<double>();
  auto* to = out.data_ptr<double>();
  for (int64_t l = 0; l < x.size(0); ++l) {
    multiply(from_left + l * p * q, from_right + l * q * s, to + l * p * s, p, q, s);
  }
  return out;
}

}  // namespace ctrlora::detail
