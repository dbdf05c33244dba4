#include <pybind11/functional.h>
#include <pybind11/typing.h>
#include "bindings.h"

#include "ctrlora/engine.h"
#include "ctrlora/hutchinson.h"

namespace py = pybind11;

namespace ctrlora {

void bind_engine(py::module_& m) {
  py::enum_<StepVerdict>(m, "StepVerdict", "What a checked step deserves.")
      .value("accept", StepVerdict::kAccept)
      .value("reject", StepVerdict::kReject)
      .value("invalid", StepVerdict::kInvalid);
  py::class_<HutchinsonProbe>(m, "HutchinsonProbe", "Traces of the Hessian's diagonal blocks.")
      .def(py::init<std::vector<LoraPair>, uint64_t, uint64_t>(), py::arg("pairs"), py::arg("seed"),
           py::arg("stream"))
      .def("shift", wrapped(&HutchinsonProbe::shift), py::arg("sign"))
      .def("take", wrapped(&HutchinsonProbe::take))
      .def("differentiate", wrapped(&HutchinsonProbe::differentiate), py::arg("loss"))
      .def("restore", wrapped(&HutchinsonProbe::restore))
      .def("traces", wrapped(&HutchinsonProbe::traces))
      .def("step", &HutchinsonProbe::step)
      .def("direction_a", &HutchinsonProbe::direction_a, py::arg("layer"))
      .def("direction_b", &HutchinsonProbe::direction_b, py::arg("layer"));
  py::class_<Engine>(m, "Engine", "All layers, one step.")
      .def(py::init<const Options&>(), py::arg("options"))
      .def("add_pairs", wrapped(&Engine::add_pairs), py::arg("pairs"), py::arg("group"))
      .def("add_fallback", wrapped(&Engine::add_fallback), py::arg("params"), py::arg("group"))
      .def("step", wrapped(&Engine::step), py::arg("settings"))
      .def("ratio_due", &Engine::ratio_due)
      .def("begin_trial", wrapped(&Engine::begin_trial))
      .def("end_trial", wrapped(&Engine::end_trial), py::arg("before"), py::arg("after"))
      .def("probe_due", &Engine::probe_due)
      .def("enter_traces", wrapped(&Engine::enter_traces), py::arg("traces"))
      .def("curvature", wrapped(&Engine::curvature))
      .def("observe", wrapped(&Engine::observe), py::arg("on"))
      .def("set_loss_scale", wrapped(&Engine::set_loss_scale), py::arg("loss_scale"))
      .def(
          "set_processes",
          wrapped([](Engine& engine, std::function<void(const std::vector<at::Tensor>&)> all_reduce,
                     int64_t rank, int64_t count) {
            engine.set_processes({std::move(all_reduce), rank, count});
          }),
          py::arg("all_reduce"), py::arg("rank"), py::arg("count"))
      .def("drop_observations", wrapped(&Engine::drop_observations))
      .def("steps", &Engine::steps)
      .def("retired", &Engine::retired)
      .def("schedule_ranks", wrapped(&Engine::schedule_ranks), py::arg("ranks"))
      .def("allocate_ranks", wrapped(&Engine::allocate_ranks), py::arg("utilities"))
      .def("ranks", wrapped(&Engine::ranks))
      .def("rank_events", wrapped(&Engine::rank_events))
      .def("rank_history", wrapped(&Engine::rank_history))
      .def("layout", &Engine::layout)
      .def("metrics", wrapped(&Engine::metrics))
      .def("named_tensors",
           [](const Engine& engine) {
             py::typing::Dict<py::str, at::Tensor> tensors;
             for (const auto& [name, tensor] : engine.named_tensors()) {
               tensors[py::str(name)] = tensor;
             }
             return tensors;
           })
      .def("load", wrapped(&Engine::load), py::arg("tensors"))
      .def("state_bytes", wrapped(&Engine::state_bytes));
}

}  // namespace ctrlora
