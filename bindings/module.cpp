// The module lists its parts; each bind_*.cpp binds one area, a method a statement.
#include "bindings.h"
#include "ctrlora/version.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ engine of pyctrlora. Use the classes of the package instead.";
  m.attr("BUILT_WITH_TORCH") = CTRLORA_TORCH_VERSION;
  m.attr("VERSION") = ctrlora::kVersion;
  m.attr("STATE_VERSION") = ctrlora::kStateVersion;
  ctrlora::bind_options(m);
  ctrlora::bind_pairs(m);
  ctrlora::bind_numerics(m);
  ctrlora::bind_ranks(m);
  ctrlora::bind_engine(m);
  ctrlora::bind_init(m);
}
