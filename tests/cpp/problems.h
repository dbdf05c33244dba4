// Random problems and dense float64 references for the tests: plain ATen, never the code under
// test.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "ctrlora/lora_pair.h"
#include "ctrlora/low_rank_eigen.h"

namespace problems {

/// Standard normal float64 tensor; at::manual_seed at the start of a test fixes it.
inline at::Tensor randn(at::IntArrayRef sizes, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, at::kDouble).to(dtype);
}

inline at::Tensor numbers(std::initializer_list<double> values) {
  return at::tensor(at::ArrayRef<double>(values), at::kDouble);
}

/// Largest absolute difference, relative to the largest entry of `expected` (or to 1 if that is 0).
inline double error(const at::Tensor& got, const at::Tensor& expected) {
  REQUIRE(got.sizes() == expected.sizes());
  const at::Tensor truth = expected.to(at::kDouble);
  const double scale = truth.abs().max().item<double>();
  return (got.to(at::kDouble) - truth).abs().max().item<double>() / (scale > 0.0 ? scale : 1.0);
}

/// Equal bits; NaNs at the same places count as equal.
inline bool same_bits(const at::Tensor& x, const at::Tensor& y) {
  return x.scalar_type() == y.scalar_type() && x.sizes() == y.sizes() &&
         at::allclose(x.to(at::kDouble), y.to(at::kDouble), 0.0, 0.0, /*equal_nan=*/true);
}

/// The message of the c10::ValueError that `call` throws; "" if it throws nothing.
template <typename Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const c10::ValueError& thrown) {
    return thrown.what_without_backtrace();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) {
    MESSAGE("expected '" << part << "' in '" << text << "'");
  }
  return found;
}

/// (L, d, d) positive definite with eigenvalues 1, 1/2^decay, 1/3^decay, ... in a random basis.
inline at::Tensor positive(int64_t layers, int64_t size, double decay = 1.0) {
  const at::Tensor basis = std::get<0>(at::linalg_qr(randn({layers, size, size})));
  const at::Tensor spectrum = at::arange(1, size + 1, at::kDouble).pow(-decay);
  return at::matmul(basis * spectrum, basis.mT());
}

/// (F + damping tr F / d I)^exponent by eigh, for (L, d, d).
inline at::Tensor dense_power(const at::Tensor& factor, double exponent, double damping) {
  const at::Tensor lambda = factor.diagonal(0, -2, -1).mean(-1, /*keepdim=*/true) * damping;
  const auto [values, vectors] = at::linalg_eigh(factor);
  return at::matmul(vectors * (values + lambda).pow(exponent).unsqueeze(-2), vectors.mT());
}

/// U diag(e) U^T + rho (I - U U^T), assembled from the parts.
inline at::Tensor dense(const ctrlora::LowRankEigen& factor) {
  const at::Tensor u = factor.basis().to(at::kDouble);
  const at::Tensor e = factor.eigenvalues();
  const int64_t rest = factor.size() - factor.sketch_rank();
  const at::Tensor rho = rest == 0 ? at::zeros_like(factor.trace())
                                   : (factor.trace() - e.sum(-1)) / static_cast<double>(rest);
  const at::Tensor outside = at::eye(factor.size(), at::kDouble) - at::matmul(u, u.mT());
  return at::matmul(u * e.unsqueeze(-2), u.mT()) + rho.view({-1, 1, 1}) * outside;
}

/// Rows (L, R, d) with mean outer product close to `covariance` (L, d, d).
inline at::Tensor rows_of(const at::Tensor& covariance, int64_t rows) {
  const at::Tensor root = at::linalg_cholesky(covariance);
  return at::matmul(randn({covariance.size(0), rows, covariance.size(-1)}), root.mT());
}

/// A leaf pair; b = 0 as LoRA starts, unless `trained`.
inline ctrlora::LoraPair make_pair(
    int64_t m, int64_t n, int64_t r, bool trained = true, at::ScalarType dtype = at::kDouble) {
  const at::Tensor b = trained ? randn({m, r}, dtype) * 0.3 : at::zeros({m, r}, dtype);
  return {(randn({r, n}, dtype) * 0.5).requires_grad_(), b.clone().requires_grad_(), 1.5, "layer"};
}

/// Watches c10's CPU allocator while it lives: the largest block that anything asked for.
class LargestAllocation : private c10::Allocator {
 public:
  LargestAllocation() : plain_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this, 100); }
  ~LargestAllocation() override { c10::SetCPUAllocator(plain_, 100); }
  [[nodiscard]] int64_t bytes() const { return largest_.load(); }

 private:
  c10::DataPtr allocate(size_t count) override {
    largest_.store(std::max(largest_.load(), static_cast<int64_t>(count)));
    return plain_->allocate(count);
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
  c10::Allocator* plain_;
  std::atomic<int64_t> largest_{0};
};

}  // namespace problems
