// LoRALinear as a torch::nn module, around the fused node of lora_linear.h.
//
// A header of its own: torch's module costs every source that sees it seconds. Parameters have the
// names of Python's pyctrlora.LoRALinear (base.weight, base.bias, lora_a, lora_b).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <optional>
#include <ostream>
#include <string>

#include "ctrlora/export.h"
#include "ctrlora/observation.h"

namespace ctrlora {

/// y = base(x) + scaling (x A^T) B^T with a frozen base; observed by any CTROptimizer or Engine
/// that trains its pair.
class CTRLORA_API LoRALinearImpl : public torch::nn::Cloneable<LoRALinearImpl> {
 public:
  /// @param base the layer to adapt; its parameters are frozen.
  /// @param rank width of the adapter, >= 1; 16 is the most common choice.
  /// @param alpha scaling is alpha / rank; the step does not depend on it; twice the default rank.
  /// @param name of the layer in messages, ranks() and saved state.
  /// @throws c10::ValueError if rank or alpha are out of range.
  explicit LoRALinearImpl(const torch::nn::Linear& base,
                          int64_t rank = 16,
                          double alpha = 32.0,
                          std::string name = "");
  /// Draws base and adapter anew, as torch's own layers do.
  void reset() override;
  /// A copy with its own pair; its base is frozen too, which torch's own clone forgets.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  /// (..., n) to (..., m).
  at::Tensor forward(const at::Tensor& inputs);
  void pretty_print(std::ostream& stream) const override;

  torch::nn::Linear base;
  at::Tensor lora_a;  ///< (r, n), Kaiming-uniform as in PEFT; float64 for a float64 base or float32
  at::Tensor lora_b;  ///< (m, r), zero: the layer starts as its base
  int64_t rank;
  double scaling;
  std::string layer_name;

 private:
  void adapt();
  void freeze_base();
  std::shared_ptr<ObservationSlot> slot_;
};

TORCH_MODULE(LoRALinear);

}  // namespace ctrlora
