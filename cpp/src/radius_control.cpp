#include "ctrlora/radius_control.h"

#include <algorithm>
#include <cmath>

namespace ctrlora {

StepVerdict RadiusControl::propose(double before, double after, double predicted_decrease) {
  if (!std::isfinite(before) || !std::isfinite(predicted_decrease)) {
    return StepVerdict::kInvalid;
  }
  const auto scale = [&](double by) { factor = std::clamp(factor * by, kSmallest, kLargest); };
  const auto reject = [&] {
    scale(0.5);
    actual = predicted = 0.0;
    ++rejected;
    return StepVerdict::kReject;
  };
  if (!std::isfinite(after)) {
    return reject();
  }
  actual = kSmoothing * actual + (before - after);
  predicted = kSmoothing * predicted + predicted_decrease;
  if (!(predicted > 0.0)) {
    return StepVerdict::kInvalid;
  }
  ratio = actual / predicted;
  if (ratio < 0.0 && factor > kSmallest) {
    return reject();
  }
  if (ratio < kPoor) {
    scale(0.5);
  } else if (ratio > kGood) {
    scale(1.5);
  }
  return StepVerdict::kAccept;
}

}  // namespace ctrlora
