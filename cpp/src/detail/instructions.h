// Which vector instructions our own kernels use.
#pragma once

namespace ctrlora::detail {

enum class Instructions { kBaseline, kAvx2, kAvx512 };

/// The widest that this CPU has; no wider than torch's ATEN_CPU_CAPABILITY (default, avx2, avx512)
/// allows, read once.
Instructions instructions();

}  // namespace ctrlora::detail
