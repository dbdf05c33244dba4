// AdamW for parameters without a pair: ATen's fused kernel over lists, state owned here.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/head.h"
#include "ctrlora/options.h"

namespace ctrlora::detail {

/// Loshchilov & Hutter (2019). A step whose gradients hold a NaN or inf is skipped for the whole
/// list.
class AdamW {
 public:
  AdamW(std::vector<at::Tensor> params, int64_t group);

  [[nodiscard]] int64_t group() const { return group_; }
  [[nodiscard]] const std::vector<at::Tensor>& params() const { return params_; }
  /// @param meter knows how long the steps of `heads` are: `head_step` (Options); 0: as the
  /// others'.
  void step(const GroupSettings& settings, bool maximize, const HeadMeter& meter, double head_step);
  /// g / (sqrt(v) + eps) of this step's gradient g alone, v as this step will make it: at most 256
  /// rows, evenly spaced, of a weight (m, n). Undefined without a gradient.
  [[nodiscard]] at::Tensor raw_direction(size_t index, const GroupSettings& settings);
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;

  std::map<size_t, int64_t> heads;  ///< parameters that are heads, by their number in the meter
  at::Tensor skipped;               ///< (1) int64 steps skipped
  std::string retired;  ///< name of the pair that was handed over (its settings are a pair group's)

 private:
  void follow(size_t index);

  std::vector<at::Tensor> params_, exp_avg_, exp_avg_sq_, steps_;
  int64_t group_;
};

}  // namespace ctrlora::detail
