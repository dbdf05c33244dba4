// AdamW for parameters without a pair: ATen's fused kernel over lists, state owned here.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "ctrlora/options.h"

namespace ctrlora::detail {

/// Loshchilov & Hutter (2019). A step whose gradients hold a NaN or inf is skipped for the whole
/// list.
class AdamW {
 public:
  AdamW(std::vector<at::Tensor> params, int64_t group);

  [[nodiscard]] int64_t group() const { return group_; }
  [[nodiscard]] const std::vector<at::Tensor>& params() const { return params_; }
  void step(const GroupSettings& settings, bool maximize);
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;

  at::Tensor skipped;   ///< (1) int64 steps skipped
  std::string retired;  ///< name of the pair that was handed over (its settings are a pair group's)

 private:
  std::vector<at::Tensor> params_, exp_avg_, exp_avg_sq_, steps_;
  int64_t group_;
};

}  // namespace ctrlora::detail
