// Declarations of the module's parts. torch's casters of at::Tensor come with pybind.h.
#pragma once

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

namespace ctrlora {

void bind_options(pybind11::module_& m);
void bind_pairs(pybind11::module_& m);
void bind_numerics(pybind11::module_& m);
void bind_ranks(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_init(pybind11::module_& m);

/// Long calls run without the GIL: autograd hooks on other threads may need it.
using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;

/// A bound function whose c10 errors arrive as their Python types and that runs without the GIL.
template <typename Function>
auto wrapped(Function&& function) {
  return torch::wrap_pybind_function_no_gil(std::forward<Function>(function));
}

}  // namespace ctrlora
