// What comes back from a file is checked before anything takes it.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace ctrlora::detail {

/// Why a saved tensor of the right shape cannot take the place of `own`: it is of another kind, not
/// finite, negative where only counts, squares and traces are held, a basis with columns longer
/// than 1, or a number of a layer or step that cannot be. The end of its name tells what it holds.
/// Empty if it can be loaded. Synchronises.
std::string unusable(const std::string& name, const at::Tensor& own, const at::Tensor& given);

/// Why the eigenvalues (L, k) of factors cannot go with these traces (L), both usable: a positive
/// semi-definite matrix has none above its trace, and damping, a share of the trace, relies on it.
/// Synchronises.
std::string unusable_spectrum(const at::Tensor& eigenvalues, const at::Tensor& trace);

}  // namespace ctrlora::detail
