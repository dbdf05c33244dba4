// An engine's state by name: what is saved, and what a saved one must be to be taken.
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include <set>

#include "ctrlora/engine.h"
#include "ctrlora/version.h"
#include "detail/check.h"
#include "detail/fallback.h"
#include "detail/rank_control.h"
#include "detail/saved_tensor.h"
#include "detail/tensor_math.h"

namespace ctrlora {

std::vector<std::pair<std::string, at::Tensor>> Engine::named_tensors() const {
  join_refreshes();
  std::vector<std::pair<std::string, at::Tensor>> out;
  const auto number = [](int64_t value) { return at::full({1}, value, at::kLong); };
  out.emplace_back("version", number(kStateVersion));
  out.emplace_back("steps", number(steps_));
  out.emplace_back("observe_every",
                   number(groups_.empty() ? options_.factor_every : groups_[0]->observe_every()));
  out.emplace_back("radius", at::tensor({radius_.factor, radius_.actual, radius_.predicted,
                                         static_cast<double>(radius_.rejected)},
                                        at::kDouble));
  for (const auto& item : head_meter_->named_tensors()) {
    out.push_back(item);
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    const std::string prefix = "group" + std::to_string(i) + ".";
    out.emplace_back(prefix + "age", number(groups_[i]->age()));
    for (const auto& [name, tensor] : groups_[i]->named_tensors()) {
      out.emplace_back(prefix + name, tensor);
    }
  }
  if (rank_control_ != nullptr) {
    const auto tensors = rank_control_->named_tensors();
    out.insert(out.end(), tensors.begin(), tensors.end());
  }
  for (size_t i = 0; i < fallbacks_.size(); ++i) {
    const std::string& retired = fallbacks_[i]->retired;
    const std::string prefix =
        retired.empty() ? "fallback" + std::to_string(i) + "." : "retired." + retired + ".";
    for (const auto& [name, tensor] : fallbacks_[i]->named_tensors()) {
      out.emplace_back(prefix + name, tensor);
    }
  }
  return out;
}

namespace {

// Of tensors that can each be taken: factors whose eigenvalues and trace do not go together.
std::string impossible_factors(const std::vector<std::pair<std::string, at::Tensor>>& own,
                               const std::map<std::string, at::Tensor>& given) {
  std::string out;
  for (const auto& item : own) {
    const size_t end = item.first.rfind(".eigenvalues");
    if (end != std::string::npos) {
      const std::string why = detail::unusable_spectrum(
          given.at(item.first), given.at(item.first.substr(0, end) + ".trace"));
      out += why.empty() ? "" : c10::str("\n  ", item.first, ": ", why);
    }
  }
  return out;
}

at::Tensor radius_numbers(const std::map<std::string, at::Tensor>& given) {
  return given.at("radius").to(at::kCPU, at::kDouble).contiguous();
}

// A factor that no run can have come to; steps are multiplied by it.
std::string impossible_radius(const std::map<std::string, at::Tensor>& given) {
  const double factor = radius_numbers(given).const_data_ptr<double>()[0];
  if (factor >= RadiusControl::kSmallest && factor <= RadiusControl::kLargest) {
    return "";
  }
  return c10::str("\n  radius: expected a factor in [", RadiusControl::kSmallest, ", ",
                  RadiusControl::kLargest, "]; got ", factor);
}

// Names, shapes and values in which a saved state differs from what this engine can take, one a
// line.
std::string difference(const std::vector<std::pair<std::string, at::Tensor>>& own,
                       const std::map<std::string, at::Tensor>& given,
                       bool with_retired) {
  std::string out;
  std::set<std::string> names;
  for (const auto& [name, tensor] : own) {
    names.insert(name);
    const auto found = given.find(name);
    if (found == given.end()) {
      out += "\n  missing " + name;
    } else if (found->second.sizes() != tensor.sizes()) {
      out += c10::str("\n  ", name, ": expected ", tensor.sizes(), "; got ", found->second.sizes());
    } else if (const std::string why = detail::unusable(name, tensor, found->second);
               !why.empty()) {
      out += c10::str("\n  ", name, ": ", why);
    }
  }
  for (const auto& item : given) {
    const bool of_retired = item.first.rfind("retired.", 0) == 0;
    if (names.count(item.first) == 0 && (with_retired || !of_retired)) {
      out += "\n  unexpected " + item.first;
    }
  }
  return out.empty() ? impossible_factors(own, given) + impossible_radius(given) : out;
}

}  // namespace

void Engine::load(const std::map<std::string, at::Tensor>& tensors) {
  const detail::NumericsGuard guard;
  constexpr const char* kWhere = "ctrlora::Engine::load";
  const auto version = tensors.find("version");
  const bool one = version != tensors.end() && version->second.numel() == 1 &&
                   version->second.scalar_type() == at::kLong && !version->second.is_meta() &&
                   version->second.layout() == at::kStrided;
  const int64_t got = one ? version->second.item<int64_t>() : 0;
  CTRLORA_CHECK(got == kStateVersion, kWhere, "expected state of format version ", kStateVersion,
                "; got ", one ? std::to_string(got) : std::string("none"),
                ". Remedy: load it with the release that wrote it.");
  // All before anything changes: first what is here now, which tells which layers the saved run had
  // handed to AdamW, then their AdamW's state.
  auto expected = named_tensors();
  const auto check = [&](bool with_retired) {
    const std::string found = difference(expected, tensors, with_retired);
    CTRLORA_CHECK(
        found.empty(), kWhere,
        "the state is damaged, or belongs to another set of layers or other options:", found);
  };
  const auto saved_as_retired = [&](size_t i) {
    return tensors.at("group" + std::to_string(i) + ".active").logical_not();
  };
  check(/*with_retired=*/false);
  for (size_t i = 0; i < groups_.size(); ++i) {
    for (const LoraPair& pair : groups_[i]->active_pairs(saved_as_retired(i))) {
      const detail::AdamW blank({pair.a, pair.b}, groups_[i]->group());
      for (const auto& [name, tensor] : blank.named_tensors()) {
        expected.emplace_back("retired." + pair.name + "." + name, tensor);
      }
    }
  }
  check(/*with_retired=*/true);
  for (size_t i = 0; i < groups_.size(); ++i) {
    for (const LoraPair& pair : groups_[i]->take_out(saved_as_retired(i))) {
      hand_to_adamw(pair, groups_[i]->group());
    }
  }
  for (const auto& [name, tensor] : named_tensors()) {
    tensor.copy_(tensors.at(name));
  }
  steps_ = tensors.at("steps").item<int64_t>();
  const at::Tensor radius = radius_numbers(tensors);
  const double* numbers = radius.const_data_ptr<double>();
  radius_ = RadiusControl();
  radius_.factor = numbers[0];
  radius_.actual = numbers[1];
  radius_.predicted = numbers[2];
  radius_.ratio = radius_.predicted > 0.0 ? radius_.actual / radius_.predicted : radius_.ratio;
  radius_.rejected = static_cast<int64_t>(numbers[3]);
  sampler_->set_step(steps_);
  for (size_t i = 0; i < groups_.size(); ++i) {
    groups_[i]->after_load(tensors.at("group" + std::to_string(i) + ".age").item<int64_t>(),
                           tensors.at("observe_every").item<int64_t>());
  }
}

int64_t Engine::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& item : named_tensors()) {
    bytes += static_cast<int64_t>(item.second.nbytes());
  }
  return bytes;
}

}  // namespace ctrlora
