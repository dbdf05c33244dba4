// One step that may be taken back: what it started from and the decrease that its gradients
// predicted.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace ctrlora::detail {

class Trial {
 public:
  /// Copies parameters and state as they are.
  Trial(std::vector<at::Tensor> params,
        const std::vector<std::pair<std::string, at::Tensor>>& state);

  /// Adds the first-order decrease of how far parameters [begin, end) have moved by now.
  void add_decrease(size_t begin, size_t end);
  [[nodiscard]] const at::Tensor& decrease() const { return decrease_; }  // (1) float64

  /// Parameters as they were; the state as a map for Engine::load.
  void restore_parameters() const;
  [[nodiscard]] const std::map<std::string, at::Tensor>& state() const { return state_; }

 private:
  std::vector<at::Tensor> params_, before_;
  std::map<std::string, at::Tensor> state_;
  at::Tensor decrease_;
};

}  // namespace ctrlora::detail
