#include "detail/elementwise_kernels.h"

#include <cstring>

#include "detail/instructions.h"
#include "detail/vector.h"

namespace ctrlora::detail {

namespace {

CTRLORA_INLINE void lerp_body(float* momentum, const float* grad, int64_t count, float step) {
  for (int64_t i = 0; i < count; ++i) {
    momentum[i] += step * (grad[i] - momentum[i]);
  }
}

CTRLORA_INLINE double squares_body(const float* values, int64_t count) {
  using V = Vector<16>::type;
  V sums[4] = {};  // independent chains hide the latency
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int64_t j = 0; j < 4; ++j) {
      V value;
      load(value, values + i + 16 * j);
      sums[j] += value * value;
    }
  }
  float lanes[64];
  std::memcpy(lanes, sums, sizeof(lanes));
  double sum = 0;
  for (const float lane : lanes) {
    sum += static_cast<double>(lane);
  }
  for (; i < count; ++i) {
    sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  }
  return sum;
}

using Lerp = void (*)(float*, const float*, int64_t, float);
using Squares = double (*)(const float*, int64_t);

struct Kernels {
  Lerp lerp;
  Squares squares;
};

void lerp_default(float* momentum, const float* grad, int64_t count, float step) {
  lerp_body(momentum, grad, count, step);
}
double squares_default(const float* values, int64_t count) {
  return squares_body(values, count);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void lerp_avx2(float* momentum,
                                                   const float* grad,
                                                   int64_t count,
                                                   float step) {
  lerp_body(momentum, grad, count, step);
}
__attribute__((target("avx2,fma"))) double squares_avx2(const float* values, int64_t count) {
  return squares_body(values, count);
}
__attribute__((target("avx512f,fma"))) void lerp_avx512(float* momentum,
                                                        const float* grad,
                                                        int64_t count,
                                                        float step) {
  lerp_body(momentum, grad, count, step);
}
__attribute__((target("avx512f,fma"))) double squares_avx512(const float* values, int64_t count) {
  return squares_body(values, count);
}
#endif

Kernels choose() {
#if defined(__x86_64__)
  if (instructions() == Instructions::kAvx512) {
    return {lerp_avx512, squares_avx512};
  }
  if (instructions() == Instructions::kAvx2) {
    return {lerp_avx2, squares_avx2};
  }
#endif
  return {lerp_default, squares_default};
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void lerp_kernel(float* momentum, const float* grad, int64_t count, float step) {
  kernels().lerp(momentum, grad, count, step);
}

double squares_kernel(const float* values, int64_t count) {
  return kernels().squares(values, count);
}

}  // namespace ctrlora::detail
