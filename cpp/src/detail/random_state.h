// torch's random generators as they were, to draw the same numbers again.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

namespace ctrlora::detail {

class RandomState {
 public:
  /// Of the CPU and of the parameters' devices, as they are now.
  explicit RandomState(const std::vector<at::Tensor>& params);
  /// Sets the generators back to it.
  void set() const;

 private:
  std::vector<std::pair<at::Generator, at::Tensor>> states_;
};

}  // namespace ctrlora::detail
