#include "bindings.h"
#include "ctrlora/head.h"
#include "ctrlora/lora_linear.h"
#include "ctrlora/lora_pair.h"
#include "ctrlora/observation.h"

namespace py = pybind11;

namespace ctrlora {

void bind_pairs(py::module_& m) {
  py::class_<LoraPair>(m, "LoraPair", "One adapter: W = W0 + scaling * b @ a.")
      .def(py::init<at::Tensor, at::Tensor, double, std::string>(), py::arg("a"), py::arg("b"),
           py::arg("scaling"), py::arg("name"))
      .def_readonly("a", &LoraPair::a, "(r, n)")
      .def_readonly("b", &LoraPair::b, "(m, r)")
      .def_readonly("scaling", &LoraPair::scaling)
      .def_readonly("name", &LoraPair::name)
      .def("validate", wrapped(&LoraPair::validate));

  py::class_<Capture, std::shared_ptr<Capture>>(m, "Capture", "A forward waiting for its backward.")
      .def(
          "complete",
          [](Capture& capture, const at::Tensor& output_grad) { capture.complete(output_grad); },
          py::arg("output_grad"), ReleaseGil());
  py::class_<ObservationSlot, std::shared_ptr<ObservationSlot>>(
      m, "ObservationSlot", "One layer's channel to the engine.")
      .def_property_readonly("wanted", &ObservationSlot::wanted)
      .def_property_readonly("observations", &ObservationSlot::observations)
      .def_property_readonly("handle", &ObservationSlot::handle)
      .def(
          "capture",
          [](ObservationSlot& slot, const at::Tensor& inputs,
             const std::optional<at::Tensor>& base_output) {
            return slot.capture(inputs, base_output.value_or(at::Tensor()));
          },
          py::arg("inputs"), py::arg("base_output"), ReleaseGil());

  py::class_<HeadCapture, std::shared_ptr<HeadCapture>>(m, "HeadCapture",
                                                        "A forward of a head, before its backward.")
      .def("complete", &HeadCapture::complete, py::arg("output_grad"), ReleaseGil());
  py::class_<HeadSlot, std::shared_ptr<HeadSlot>>(m, "HeadSlot", "A head's channel to the engine.")
      .def_property_readonly("wanted", &HeadSlot::wanted)
      .def_property_readonly("handle", &HeadSlot::handle)
      .def("capture", &HeadSlot::capture, py::arg("inputs"), py::arg("outputs"), ReleaseGil());
  m.def("register_head", wrapped(&register_head), py::arg("weight"));
  m.def("find_head", wrapped(&find_head), py::arg("weight"));
  m.def("unregister_head", wrapped(&unregister_head), py::arg("weight"));

  m.def("register_pair", wrapped(&register_pair), py::arg("pair"));
  m.def("unregister_pair", wrapped(&unregister_pair), py::arg("tensor"));
  m.def("find_pair", wrapped(&find_pair), py::arg("tensor"));
  m.def("find_slot", wrapped(&find_slot), py::arg("tensor"));
  m.def("lora_linear", wrapped(&lora_linear), py::arg("inputs"), py::arg("weight"), py::arg("bias"),
        py::arg("a"), py::arg("b"), py::arg("scaling"), py::arg("slot"), py::arg("transposed"));
  m.def("lora_delta", wrapped(&lora_delta), py::arg("inputs"), py::arg("base_output"), py::arg("a"),
        py::arg("b"), py::arg("scaling"), py::arg("slot"));
}

}  // namespace ctrlora
