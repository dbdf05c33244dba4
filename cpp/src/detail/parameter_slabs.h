// The parameters of a group's layers as views into two slabs.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "ctrlora/lora_pair.h"

namespace ctrlora::detail {

class ParameterSlabs {
 public:
  /// Copies the pairs' values into slabs and makes their tensors views of them (identity is kept).
  explicit ParameterSlabs(std::vector<LoraPair> pairs);

  [[nodiscard]] const at::Tensor& a() const { return a_; }  // (L, r, n)
  [[nodiscard]] const at::Tensor& b() const { return b_; }  // (L, m, r)

  /// Adopts parameters whose storage was replaced. @return whether the model was moved or cast.
  /// @throws c10::ValueError if a shape changed or the pairs no longer fit together.
  bool bind();

  /// Notes what the parameters are now, by one element for each direction of each matrix.
  void remember();
  /// Whether they still are what was remembered, so that Grams carried over since then hold. Always
  /// false where numbers are rounded to a narrow dtype, and on devices, where asking would
  /// synchronise. A write that misses every probe goes unnoticed for the eight steps a Gram lives.
  [[nodiscard]] bool carried() const;
  [[nodiscard]] const at::Tensor& probe_a() const { return probe_a_; }  // (L, r)
  [[nodiscard]] const at::Tensor& probe_b() const { return probe_b_; }  // (L, r)

  /// Gradients of a and of b of layers [begin, end); both undefined where either is missing: half a
  /// pair has no tangent step.
  [[nodiscard]] std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>> gradients(
      int64_t begin, int64_t end) const;

 private:
  void adopt();
  static void rebind(at::Tensor& param,
                     const at::Tensor& slab,
                     int64_t layer,
                     const std::string& name);

  std::vector<LoraPair> pairs_;
  at::Tensor a_, b_;
  at::Tensor probe_a_, probe_b_;
};

}  // namespace ctrlora::detail
