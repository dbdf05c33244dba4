#include <pybind11/typing.h>
#include "bindings.h"

#include "ctrlora/cg_init.h"

namespace py = pybind11;

namespace ctrlora {

void bind_init(py::module_& m) {
  py::class_<CgInitOptions>(m, "CgInitOptions", "Settings of one calibration.")
      .def(py::init<>())
      .def_readwrite("batches", &CgInitOptions::batches)
      .def_readwrite("init_radius", &CgInitOptions::init_radius)
      .def_readwrite("zero_b", &CgInitOptions::zero_b)
      .def_readwrite("whitening", &CgInitOptions::whitening)
      .def_readwrite("damping", &CgInitOptions::damping)
      .def_readwrite("sketch_rank", &CgInitOptions::sketch_rank)
      .def_readwrite("probes", &CgInitOptions::probes)
      .def_readwrite("deviations", &CgInitOptions::deviations)
      .def_readwrite("dense_limit", &CgInitOptions::dense_limit)
      .def_readwrite("seed", &CgInitOptions::seed)
      .def("validate", wrapped(&CgInitOptions::validate));
  py::class_<LayerInit>(m, "LayerInit", "Start values of one layer.")
      .def_readonly("name", &LayerInit::name)
      .def_readonly("a", &LayerInit::a, "(r, n)")
      .def_readonly("b", &LayerInit::b, "(m, r)")
      .def_readonly("spectrum", &LayerInit::spectrum)
      .def_readonly("split_half", &LayerInit::split_half)
      .def_readonly("kept", &LayerInit::kept)
      .def_readonly("rows", &LayerInit::rows)
      .def_readonly("energy_kept", &LayerInit::energy_kept)
      .def_readonly("noise_floor", &LayerInit::noise_floor)
      .def_readonly("effective_samples", &LayerInit::effective_samples)
      .def_readonly("radius", &LayerInit::radius);
  py::class_<CgInit>(m, "CgInit", "One calibration pass.")
      .def(py::init([](const std::vector<LoraPair>& pairs, const CgInitOptions& options) {
             return std::make_unique<CgInit>(pairs, options);
           }),
           py::arg("pairs"), py::arg("options"))
      .def("end_batch", wrapped(&CgInit::end_batch))
      .def("finish", wrapped(&CgInit::finish))
      .def("apply", wrapped(&CgInit::apply), py::arg("layers"))
      .def("release", wrapped(&CgInit::release))
      .def("bytes", wrapped(&CgInit::bytes))
      .def("named_tensors",
           [](const CgInit& init) {
             py::typing::Dict<py::str, at::Tensor> tensors;
             for (const auto& [name, tensor] : init.named_tensors()) {
               tensors[py::str(name)] = tensor;
             }
             return tensors;
           })
      .def("load", wrapped(&CgInit::load), py::arg("tensors"));
  m.def("shift_base", wrapped(&shift_base), py::arg("weight"), py::arg("a"), py::arg("b"),
        py::arg("scaling"), py::arg("transposed"));
}

}  // namespace ctrlora
