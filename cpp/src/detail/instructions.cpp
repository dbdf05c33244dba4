#include "detail/instructions.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace ctrlora::detail {

namespace {

Instructions of_cpu() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    return Instructions::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Instructions::kAvx2;
  }
#endif
  return Instructions::kBaseline;
}

Instructions allowed() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view name = capability == nullptr ? "" : capability;
  if (name == "default") {
    return Instructions::kBaseline;
  }
  return name == "avx2" ? Instructions::kAvx2 : Instructions::kAvx512;
}

}  // namespace

Instructions instructions() {
  static const Instructions chosen = std::min(of_cpu(), allowed());
  return chosen;
}

}  // namespace ctrlora::detail
