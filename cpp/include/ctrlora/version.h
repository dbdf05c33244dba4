// Version of the library and of the format of its saved state.
#pragma once

#include <cstdint>

namespace ctrlora {

inline constexpr const char* kVersion = "0.1.0";

/// Format of the tensors that Engine::named_tensors() hands out. Raised when their meaning changes.
inline constexpr int64_t kStateVersion = 4;

}  // namespace ctrlora
