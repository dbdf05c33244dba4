#include "detail/tall_skinny.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "detail/tensor_math.h"

namespace ctrlora::detail {

at::Tensor tall_gram(const at::Tensor& x, const at::Tensor& y) {
  return at::bmm(x.mT(), y).to(at::kDouble);
}

namespace {

// At B = 0 the coefficients of an exactly zero momentum are 1e60: in range for float64 only.
at::Tensor narrow(const at::Tensor& coefficients, at::ScalarType dtype) {
  return dtype == at::kDouble ? coefficients : coefficients.clamp(-1e30, 1e30).to(dtype);
}

}  // namespace

void tall_combine(const at::Tensor& weight, const at::Tensor& w, const at::Tensor& momentum,
                  const at::Tensor& m, const at::Tensor& basis, const at::Tensor& u) {
  const at::ScalarType dtype = momentum.scalar_type();
  at::Tensor sum = at::bmm(weight.to(dtype), narrow(w, dtype));
  sum.baddbmm_(momentum, narrow(m, dtype));
  sum.baddbmm_(basis, narrow(u, dtype));
  weight.copy_(sum);
}

namespace {

at::Tensor stack_defined(const std::vector<at::Tensor>& grads, const at::Tensor& like) {
  std::vector<at::Tensor> present = grads;
  const auto given = std::find_if(grads.begin(), grads.end(),
                                  [](const at::Tensor& grad) { return grad.defined(); });
  const at::IntArrayRef shape = given != grads.end() ? given->sizes() : like.sizes().slice(1);
  for (at::Tensor& grad : present) {
    grad = grad.defined() ? grad.to(like.scalar_type())
                          : at::zeros(shape, like.options());
  }
  return at::stack(present);
}

// The host loops below need plain memory: one dtype, contiguous, on the CPU.
bool in_plain_memory(const std::vector<at::Tensor>& grads, const at::Tensor& momentum) {
  return momentum.is_cpu() && momentum.is_contiguous() &&
         std::all_of(grads.begin(), grads.end(), [&](const at::Tensor& grad) {
           return !grad.defined() || (grad.is_contiguous() && grad.is_cpu() &&
                                      grad.scalar_type() == momentum.scalar_type());
         });
}

template <typename T>
bool all_finite(const T* values, int64_t count) {
  // x * 0 is 0 for finite x and NaN else: a sum without branches, which the compiler vectorises.
  T sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int j = 0; j < 16; ++j) {
      sums[j] += values[i + j] * T(0);
    }
  }
  T sum = 0;
  for (; i < count; ++i) {
    sum += values[i] * T(0);
  }
  for (const T part : sums) {
    sum += part;
  }
  return sum == T(0);
}

}  // namespace

at::Tensor finite_gradients(const std::vector<at::Tensor>& grads, const at::Tensor& momentum) {
  if (!in_plain_memory(grads, momentum)) {
    return at::isfinite(stack_defined(grads, momentum).flatten(1).abs().amax(-1));
  }
  const auto layers = static_cast<int64_t>(grads.size());
  at::Tensor finite = at::empty({layers}, momentum.options().dtype(at::kBool));
  bool* out = finite.data_ptr<bool>();
  AT_DISPATCH_FLOATING_TYPES(momentum.scalar_type(), "finite_gradients", [&] {
    at::parallel_for(0, layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        const at::Tensor& grad = grads[static_cast<size_t>(l)];
        out[l] = !grad.defined() || all_finite(grad.const_data_ptr<scalar_t>(), grad.numel());
      }
    });
  });
  return finite;
}

void momentum_step(const std::vector<at::Tensor>& grads, const at::Tensor& ok,
                   const at::Tensor& momentum, double beta) {
  if (!in_plain_memory(grads, momentum)) {
    const at::Tensor slab = stack_defined(grads, momentum);
    momentum.lerp_(at::where(as_column(ok), slab, momentum), 1.0 - beta);
    return;
  }
  const bool* wanted = ok.const_data_ptr<bool>();
  AT_DISPATCH_FLOATING_TYPES(momentum.scalar_type(), "momentum_step", [&] {
    const auto step = static_cast<scalar_t>(1.0 - beta);
    auto* slab = momentum.data_ptr<scalar_t>();
    const int64_t size = momentum.stride(0);
    at::parallel_for(0, momentum.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        if (!wanted[l]) {
          continue;
        }
        const auto* grad = grads[static_cast<size_t>(l)].const_data_ptr<scalar_t>();
        auto* row = slab + l * size;
        for (int64_t i = 0; i < size; ++i) {
          row[i] += step * (grad[i] - row[i]);
        }
      }
    });
  });
}

at::Tensor stack_gradients(const std::vector<at::Tensor>& grads, const at::Tensor& ok,
                           const at::Tensor& like) {
  const at::Tensor slab = stack_defined(grads, like);
  return at::where(as_column(ok), slab, at::zeros({}, slab.options()));
}

}  // namespace ctrlora::detail
