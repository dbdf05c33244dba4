#include "detail/random_state.h"

#include <ATen/Context.h>

#include <mutex>
#include <set>
#include <string>

namespace ctrlora::detail {

RandomState::RandomState(const std::vector<at::Tensor>& params) {
  std::set<std::string> known;
  const auto add = [&](const at::Device& device) {
    if (known.insert(device.str()).second) {
      at::Generator generator = at::globalContext().defaultGenerator(device);
      const std::lock_guard<std::mutex> lock(generator.mutex());
      states_.emplace_back(generator, generator.get_state());
    }
  };
  add(at::kCPU);
  for (const at::Tensor& param : params) {
    add(param.device());
  }
}

void RandomState::set() const {
  for (const auto& [generator, state] : states_) {
    at::Generator target = generator;
    const std::lock_guard<std::mutex> lock(target.mutex());
    target.set_state(state);
  }
}

}  // namespace ctrlora::detail
