#include "bindings.h"
#include "ctrlora/options.h"

namespace py = pybind11;

namespace ctrlora {

void bind_options(py::module_& m) {
  py::class_<Options>(m, "Options", "Settings shared by all layers of one engine.")
      .def(py::init<>())
      .def_readwrite("sketch_rank", &Options::sketch_rank)
      .def_readwrite("basis_dtype", &Options::basis_dtype)
      .def_readwrite("sample_rows", &Options::sample_rows)
      .def_readwrite("factor_every", &Options::factor_every)
      .def_readwrite("exchange_every", &Options::exchange_every)
      .def_readwrite("factor_warmup_steps", &Options::factor_warmup_steps)
      .def_readwrite("factor_beta", &Options::factor_beta)
      .def_readwrite("damping", &Options::damping)
      .def_readwrite("whitening", &Options::whitening)
      .def_readwrite("dense_limit", &Options::dense_limit)
      .def_readwrite("loss_terms", &Options::loss_terms)
      .def_readwrite("loss_reduction", &Options::loss_reduction)
      .def_readwrite("loss_scale", &Options::loss_scale)
      .def_readwrite("beta1", &Options::beta1)
      .def_readwrite("gram_floor", &Options::gram_floor)
      .def_readwrite("maximize", &Options::maximize)
      .def_readwrite("master_weights", &Options::master_weights)
      .def_readwrite("kl_radius", &Options::kl_radius)
      .def_readwrite("head_radius", &Options::head_radius)
      .def_readwrite("head_step", &Options::head_step)
      .def_readwrite("rms_beta", &Options::rms_beta)
      .def_readwrite("step_length", &Options::step_length)
      .def_readwrite("curvature_decay", &Options::curvature_decay)
      .def_readwrite("ratio_every", &Options::ratio_every)
      .def_readwrite("curvature", &Options::curvature)
      .def_readwrite("hutchinson_every", &Options::hutchinson_every)
      .def_readwrite("overlap", &Options::overlap)
      .def_readwrite("max_staleness", &Options::max_staleness)
      .def_readwrite("balance_every", &Options::balance_every)
      .def_readwrite("max_misses", &Options::max_misses)
      .def_readwrite("fallback_lr", &Options::fallback_lr)
      .def_readwrite("seed", &Options::seed)
      .def("validate", wrapped(&Options::validate));
  py::class_<GroupSettings>(m, "GroupSettings", "Settings of one parameter group at one step.")
      .def(py::init<double, double, double, double, double, double>(), py::arg("lr"),
           py::arg("initial_lr"), py::arg("weight_decay") = 0.0, py::arg("beta1") = 0.9,
           py::arg("beta2") = 0.999, py::arg("eps") = 1e-8)
      .def_readwrite("lr", &GroupSettings::lr)
      .def_readwrite("initial_lr", &GroupSettings::initial_lr)
      .def_readwrite("weight_decay", &GroupSettings::weight_decay)
      .def_readwrite("beta1", &GroupSettings::beta1)
      .def_readwrite("beta2", &GroupSettings::beta2)
      .def_readwrite("eps", &GroupSettings::eps);
}

}  // namespace ctrlora
