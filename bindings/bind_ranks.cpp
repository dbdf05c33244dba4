#include "bindings.h"
#include "ctrlora/rank_scheduler.h"

namespace py = pybind11;

namespace ctrlora {

namespace {

void bind_rank_rules(py::module_& m) {
  const RankRules rules;
  py::class_<RankRules>(m, "RankRules", "What a plan of ranks must keep to.")
      .def(py::init<int64_t, double, double>(), py::arg("min_rank") = rules.min_rank,
           py::arg("hysteresis") = rules.hysteresis, py::arg("max_move") = rules.max_move)
      .def_readonly("min_rank", &RankRules::min_rank)
      .def_readonly("hysteresis", &RankRules::hysteresis)
      .def_readonly("max_move", &RankRules::max_move)
      .def("validate", wrapped(&RankRules::validate));
}

void bind_rank_schedule(py::module_& m) {
  const RankSchedule schedule;
  py::class_<RankSchedule>(m, "RankSchedule", "When ranks change, in fractions of the training.")
      .def(py::init<int64_t, double, double, double, int64_t, bool>(), py::arg("total_steps"),
           py::arg("first") = schedule.first, py::arg("every") = schedule.every,
           py::arg("last") = schedule.last, py::arg("min_steps") = schedule.min_steps,
           py::arg("descend") = schedule.descend)
      .def_readonly("total_steps", &RankSchedule::total_steps)
      .def_readonly("descend", &RankSchedule::descend)
      .def("validate", wrapped(&RankSchedule::validate))
      .def("interval", &RankSchedule::interval)
      .def("first_event", &RankSchedule::first_event)
      .def("last_event", &RankSchedule::last_event)
      .def("due", &RankSchedule::due, py::arg("steps"))
      .def("budget_at", &RankSchedule::budget_at, py::arg("steps"), py::arg("budget"),
           py::arg("allocated"));
}

}  // namespace

void bind_ranks(py::module_& m) {
  bind_rank_rules(m);
  bind_rank_schedule(m);
  py::class_<RankLayer>(m, "RankLayer", "What the rank scheduler knows of one layer.")
      .def(py::init<std::string, int64_t, int64_t, int64_t>(), py::arg("name"),
           py::arg("out_features"), py::arg("in_features"), py::arg("allocated"))
      .def_readonly("name", &RankLayer::name)
      .def_readonly("out_features", &RankLayer::out_features)
      .def_readonly("in_features", &RankLayer::in_features)
      .def_readonly("allocated", &RankLayer::allocated)
      .def("cost", &RankLayer::cost);
  py::class_<RankOptions>(m, "RankOptions", "A budget and how an engine keeps to it.")
      .def(py::init<int64_t, RankSchedule, RankRules, int64_t, int64_t>(), py::arg("budget"),
           py::arg("schedule"), py::arg("rules"), py::arg("window") = RankOptions().window,
           py::arg("candidates") = RankOptions().candidates)
      .def_readonly("budget", &RankOptions::budget)
      .def_readonly("schedule", &RankOptions::schedule)
      .def_readonly("rules", &RankOptions::rules)
      .def("validate", wrapped(&RankOptions::validate));
  py::class_<RankUtilities>(m, "RankUtilities", "Utilities of one layer, in units of the loss.")
      .def(py::init<std::vector<double>, std::vector<double>>(), py::arg("existing"),
           py::arg("fresh"))
      .def_readonly("existing", &RankUtilities::existing)
      .def_readonly("fresh", &RankUtilities::fresh);
  py::class_<LayerPlan>(m, "LayerPlan", "What an event does to one layer.")
      .def_readonly("from_rank", &LayerPlan::from)
      .def_readonly("to_rank", &LayerPlan::to)
      .def_readonly("dropped", &LayerPlan::dropped)
      .def_readonly("grown", &LayerPlan::grown)
      .def_readonly("utility", &LayerPlan::utility);
  py::class_<RankEvent>(m, "RankEvent", "A layer whose directions change.")
      .def_readonly("step", &RankEvent::step)
      .def_readonly("layer", &RankEvent::layer)
      .def_readonly("from_rank", &RankEvent::from)
      .def_readonly("to_rank", &RankEvent::to)
      .def_readonly("utility", &RankEvent::utility);
  m.def("allocated_parameters", wrapped(&allocated_parameters), py::arg("layers"));
  m.def("used_parameters", wrapped(&used_parameters), py::arg("layers"), py::arg("ranks"));
  m.def("budget_from_fraction", wrapped(&budget_from_fraction), py::arg("layers"),
        py::arg("fraction"), py::arg("rules"));
  m.def("check_budget", wrapped(&check_budget), py::arg("layers"), py::arg("budget"),
        py::arg("rules"));
  m.def("allocate_ranks", wrapped(&allocate_ranks), py::arg("layers"), py::arg("utilities"),
        py::arg("budget"), py::arg("rules"));
  m.def("plan_ranks", wrapped(&plan_ranks), py::arg("layers"), py::arg("utilities"),
        py::arg("budget"), py::arg("rules"));
}

}  // namespace ctrlora
