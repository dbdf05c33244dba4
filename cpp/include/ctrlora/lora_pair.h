// One adapter pair and the process-wide registry that lets CTROptimizer(params) find pairs.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>

#include "ctrlora/export.h"

namespace ctrlora {

class ObservationSlot;

/// The adapter of one layer: W = W0 + scaling * b @ a.
struct CTRLORA_API LoraPair {
  at::Tensor a;         ///< (r, n) leaf parameter
  at::Tensor b;         ///< (m, r) leaf parameter
  double scaling = 1.;  ///< PEFT's alpha / r, finite and not 0
  std::string name;     ///< the layer's name, for messages and saved state

  [[nodiscard]] int64_t in_features() const { return a.size(1); }
  [[nodiscard]] int64_t out_features() const { return b.size(0); }
  [[nodiscard]] int64_t rank() const { return a.size(0); }

  /// Checks that shapes fit, both are real dense floating tensors of one dtype on one device.
  /// @throws c10::ValueError naming both tensors, their shapes and the remedy.
  void validate() const;
};

/// Puts a pair into the registry and returns the slot through which its layer is observed. The
/// registry holds weak references: an entry dies with its tensors. Registering the same a and b
/// again returns the existing slot (and takes over a new scaling or name).
/// Thread-safe. @throws c10::ValueError if either tensor is already paired with another one.
CTRLORA_API std::shared_ptr<ObservationSlot> register_pair(const LoraPair& pair);

/// Takes the pair that contains `a` or `b` out of the registry; unknown tensors are ignored.
CTRLORA_API void unregister_pair(const at::Tensor& tensor);

/// The pair that contains `tensor` (as a or b), if one is registered and alive.
CTRLORA_API std::optional<LoraPair> find_pair(const at::Tensor& tensor);

/// The slot of that pair, or null.
CTRLORA_API std::shared_ptr<ObservationSlot> find_slot(const at::Tensor& tensor);

}  // namespace ctrlora
