// How far to trust the steps: radii follow the ratio of actual to predicted decrease.
//
// Nocedal & Wright (2006), algorithm 4.1, with both decreases averaged, since a mini-batch's are
// noisy. A value type of plain numbers, usable alone. cpp/README.md, section 4.
#pragma once

#include <cstdint>
#include <limits>

#include "ctrlora/export.h"

namespace ctrlora {

/// What a checked step deserves.
enum class StepVerdict : std::uint8_t {
  kAccept,   ///< it stands
  kReject,   ///< the loss rose: take it back
  kInvalid,  ///< nothing can be told (no decrease was predicted, a number is not finite): it stands
};

struct CTRLORA_API RadiusControl {
  double factor = 1.0;     ///< both balls' radii are multiplied by it; in [kSmallest, kLargest]
  double actual = 0.0;     ///< sum of past actual decreases, weighted by kSmoothing per check
  double predicted = 0.0;  ///< the same of the predicted ones
  double ratio = std::numeric_limits<double>::quiet_NaN();  ///< actual / predicted; NaN: none yet
  int64_t rejected = 0;                                     ///< steps taken back so far

  static constexpr double kSmoothing = 0.5;  ///< weight of the past; a factor is stale soon
  static constexpr double kPoor = 0.25;      ///< below: the radii are halved
  static constexpr double kGood = 0.75;      ///< above: they grow by half
  static constexpr double kSmallest = 1.0 / 64;
  static constexpr double kLargest = 4.0;

  /// Enters one step's decreases of the loss on one and the same batch. At the smallest factor only
  /// a loss that is no longer finite is rejected. A rejection starts the averages anew.
  StepVerdict propose(double before, double after, double predicted_decrease);
};

}  // namespace ctrlora
