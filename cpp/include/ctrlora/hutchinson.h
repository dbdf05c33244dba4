// Traces of the Hessian's diagonal blocks, one per layer, from gradients alone (Hutchinson 1990).
//
// c_l = v_l^T (H v)_l with random signs v over the adapters' parameters: E c_l = tr H_ll, all
// layers in one probe. H v by central differences of the gradient, or by double backward. A value
// type, usable alone. cpp/README.md, section 2.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/lora_pair.h"

namespace ctrlora {

class CTRLORA_API HutchinsonProbe {
 public:
  /// Draws v by (seed, stream) and keeps a copy of the pairs' parameters; their gradients in .grad
  /// are set aside. The step h is cbrt(eps) times the parameters' root mean square (at least 1e-3),
  /// where truncation and rounding of a central difference balance. Synchronises.
  HutchinsonProbe(const std::vector<LoraPair>& pairs, uint64_t seed, uint64_t stream);
  /// Restores.
  ~HutchinsonProbe();
  HutchinsonProbe(const HutchinsonProbe&) = delete;
  HutchinsonProbe& operator=(const HutchinsonProbe&) = delete;

  /// Moves the parameters to theta + sign h v, with empty .grad. Then the caller runs forward and
  /// backward, and take() enters the gradients. Once with each sign. @param sign 1 or -1.
  void shift(int64_t sign);
  void take();
  /// The same by double backward, at the parameters themselves, in place of both shifts.
  /// @param loss with a graph whose operators can be differentiated twice.
  void differentiate(const at::Tensor& loss);
  /// Parameters and gradients as they were, bit for bit.
  void restore();

  /// c_l in the order of the pairs, (L) float64 on the CPU; NaN where a layer got no gradient.
  [[nodiscard]] at::Tensor traces() const;
  [[nodiscard]] double step() const { return step_; }
  /// v of one layer: of a (r, n) and of b (m, r).
  [[nodiscard]] const at::Tensor& direction_a(int64_t layer) const;
  [[nodiscard]] const at::Tensor& direction_b(int64_t layer) const;

 private:
  std::vector<at::Tensor> params_;  // a and b of each pair in turn
  std::vector<at::Tensor> before_, grads_, directions_;
  std::vector<at::Tensor> sums_;  // v . H v of each parameter; undefined: none
  double step_ = 0.0;
  int64_t sign_ = 0;
  bool restored_ = false;
};

}  // namespace ctrlora
