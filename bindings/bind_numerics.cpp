#include "bindings.h"
#include "ctrlora/gauge.h"
#include "ctrlora/low_rank_eigen.h"
#include "ctrlora/trust_region.h"

namespace py = pybind11;

namespace ctrlora {

namespace {

void bind_low_rank_eigen(py::module_& m) {
  py::class_<FactorSketch>(m, "FactorSketch", "Sums over rows that one batch adds to a factor.")
      .def_readonly("product", &FactorSketch::product, "(L, d, k)")
      .def_readonly("trace", &FactorSketch::trace, "(L)")
      .def_readonly("weight", &FactorSketch::weight, "(L)");
  py::class_<LowRankEigen>(m, "LowRankEigen", "U diag(e) U^T + rho (I - U U^T) per layer.")
      .def(py::init([](int64_t layers, int64_t size, int64_t sketch_rank, const at::Tensor& like) {
             return LowRankEigen(layers, size, sketch_rank, like.options());
           }),
           py::arg("layers"), py::arg("size"), py::arg("sketch_rank"), py::arg("like"))
      .def_property_readonly("basis", &LowRankEigen::basis)
      .def_property_readonly("eigenvalues", &LowRankEigen::eigenvalues)
      .def_property_readonly("trace", &LowRankEigen::trace)
      .def("start_basis", wrapped(&LowRankEigen::start_basis), py::arg("rows"), py::arg("where"),
           py::arg("seed"))
      .def(
          "sketch",
          [](const LowRankEigen& factor, const at::Tensor& rows, const at::Tensor& row_weights) {
            return factor.sketch(rows, row_weights);
          },
          py::arg("rows"), py::arg("row_weights"), ReleaseGil())
      .def("update", wrapped(&LowRankEigen::update), py::arg("sketch"), py::arg("keep"),
           py::arg("scale"))
      .def("tail", wrapped(&LowRankEigen::tail))
      .def("apply_power", wrapped(&LowRankEigen::apply_power), py::arg("v"), py::arg("exponent"),
           py::arg("damping"))
      .def("captured_share", wrapped(&LowRankEigen::captured_share))
      .def("to_dense", wrapped(&LowRankEigen::to_dense));
}

void bind_subproblem(py::module_& m) {
  using Solution = TrustRegionSubproblem::Solution;
  py::class_<Solution>(m, "TrustRegionSolution")
      .def_readonly("step", &Solution::step, "(L, m, n)")
      .def_readonly("multiplier", &Solution::multiplier, "(L)")
      .def_readonly("model_decrease", &Solution::model_decrease, "(L)")
      .def_readonly("iterations", &Solution::iterations, "(L)");
  py::class_<TrustRegionSubproblem>(m, "TrustRegionSubproblem",
                                    "min <G, D> + 1/2 <D, S D Omega> s.t. |D|_F <= radius")
      .def(py::init<at::Tensor, at::Tensor, at::Tensor>(), py::arg("gradient"),
           py::arg("output_eigenvalues"), py::arg("input_eigenvalues"))
      .def("solve", wrapped(&TrustRegionSubproblem::solve), py::arg("radius"),
           py::arg("tolerance") = 1e-12, py::arg("max_iterations") = 50);
}

void bind_gauge(py::module_& m) {
  py::class_<GaugeMap>(m, "GaugeMap", "A <- map A, B <- B inverse.")
      .def_readonly("map", &GaugeMap::map, "(L, r, r)")
      .def_readonly("inverse", &GaugeMap::inverse, "(L, r, r)")
      .def_readonly("sigma", &GaugeMap::sigma, "(L, r)")
      .def_readonly("ok", &GaugeMap::ok, "(L)");
  m.def("balance", wrapped(&balance), py::arg("gram_b"), py::arg("gram_a"));
}

}  // namespace

void bind_numerics(py::module_& m) {
  bind_low_rank_eigen(m);
  bind_subproblem(m);
  bind_gauge(m);
}

}  // namespace ctrlora
