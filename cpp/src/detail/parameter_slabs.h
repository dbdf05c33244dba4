// The parameters of a group's layers as views into two slabs, and their float32 masters if wanted.
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
  /// @param masters steps are made on float32 copies of parameters of 16 bits.
  ParameterSlabs(std::vector<LoraPair> pairs, bool masters);

  // What steps are made on: the parameters themselves, or their masters.
  [[nodiscard]] const at::Tensor& a() const { return a_; }  // (L, r, n)
  [[nodiscard]] const at::Tensor& b() const { return b_; }  // (L, m, r)
  [[nodiscard]] bool has_masters() const { return !a_.is_same(param_a_); }
  [[nodiscard]] int64_t parameter_bytes() const {
    return static_cast<int64_t>(param_a_.nbytes() + param_b_.nbytes());
  }

  /// Adopts parameters whose storage was replaced, and into masters what others wrote to the
  /// parameters. @return whether the model was moved or cast.
  /// @throws c10::ValueError if a shape changed or the pairs no longer fit together.
  bool bind();

  /// Rounds the masters into the parameters; nothing where there are none.
  void publish() const;

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
  void follow() const;
  static void rebind(at::Tensor& param,
                     const at::Tensor& slab,
                     int64_t layer,
                     const std::string& name);

  std::vector<LoraPair> pairs_;
  bool masters_;
  at::Tensor param_a_, param_b_;  // behind the parameters
  at::Tensor a_, b_;              // the same tensors, or float32
  at::Tensor probe_a_, probe_b_;
};

}  // namespace ctrlora::detail
