#include "detail/saved_tensor.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <initializer_list>

namespace ctrlora::detail {

namespace {

constexpr double kRounding = 1.02;  // twice what a refresh lets pass, and far above bfloat16's

bool ends_with(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

bool ends_with_any(const std::string& name, std::initializer_list<const char*> ends) {
  return std::any_of(ends.begin(), ends.end(),
                     [&](const char* end) { return ends_with(name, end); });
}

}  // namespace

std::string unusable(const std::string& name, const at::Tensor& own, const at::Tensor& given) {
  constexpr int64_t kMost = int64_t{1} << 53;  // steps: arithmetic on them must not overflow
  if (given.layout() != at::kStrided || given.is_meta() || given.is_complex() ||
      given.is_floating_point() != own.is_floating_point()) {
    return c10::str("expected ", own.scalar_type(), "; got ", given.scalar_type(), " (",
                    given.layout(), ")");
  }
  const bool probe = ends_with_any(name, {"probe_a", "probe_b"});  // NaN: not taken yet
  if (!probe && !at::isfinite(given.to(own.scalar_type())).all().item<bool>()) {
    return "expected finite numbers; got others";
  }
  const bool counts = ends_with_any(
      name, {"eigenvalues", "trace", "_square", "_sq", "_weight", "age", "step", "steps", "seen",
             "misses", "skipped", "phase", "first", "rows", "batches"});
  if (counts && given.lt(0).any().item<bool>()) {
    return "expected no negative numbers; got some";
  }
  if (ends_with(name, ".basis") &&  // zero before anything was observed
      given.to(at::kDouble).norm(2, {1}).gt(kRounding).any().item<bool>()) {
    return "expected columns of norm 1 or 0; got longer ones";
  }
  if (own.scalar_type() == at::kLong || ends_with_any(name, {"rows", "batches"})) {
    const int64_t most = ends_with(name, "share_set") ? own.numel() - 1 : kMost;
    if (given.lt(-1).logical_or(given.gt(most)).any().item<bool>()) {
      return c10::str("expected whole numbers from -1 to ", most, "; got others");
    }
  }
  return "";
}

std::string unusable_spectrum(const at::Tensor& eigenvalues, const at::Tensor& trace) {
  return eigenvalues.sum(-1).gt(trace * kRounding).any().item<bool>()
             ? "expected eigenvalues that add up to the trace at most; got larger ones"
             : "";
}

}  // namespace ctrlora::detail
