#include "ctrlora/lora_pair.h"

#include <c10/core/TensorImpl.h>

#include <cmath>
#include <mutex>
#include <unordered_map>

#include "ctrlora/observation.h"
#include "detail/check.h"

namespace ctrlora {

namespace {

using WeakImpl = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

struct Entry {
  WeakImpl a, b;
  double scaling;
  std::string name;
  std::shared_ptr<ObservationSlot> slot;
};

// Keyed by both tensors' addresses. The weak pointers keep the address from being used again, so a
// look-up never finds a stranger; dead entries are swept at the next registration.
class Registry {
 public:
  static Registry& instance() {
    static Registry registry;
    return registry;
  }

  std::shared_ptr<ObservationSlot> add(const LoraPair& pair) {
    const std::lock_guard<std::mutex> lock(mutex_);
    sweep();
    const auto with_a = alive(pair.a);
    const auto with_b = alive(pair.b);
    constexpr const char* kWhere = "ctrlora::register_pair";
    CTRLORA_CHECK(with_a == with_b, kWhere, "pair '", pair.name,
                  "': one of its tensors is already ", "paired with another tensor in '",
                  (with_a != nullptr ? with_a : with_b)->name,
                  "'. Tied adapters are not supported. Remedy: unregister that pair first.");
    if (with_a != nullptr) {
      with_a->scaling = pair.scaling;
      with_a->name = pair.name;
      return with_a->slot;
    }
    const auto entry = std::make_shared<Entry>(
        Entry{weak(pair.a), weak(pair.b), pair.scaling, pair.name, ObservationSlot::make()});
    entries_[pair.a.unsafeGetTensorImpl()] = entry;
    entries_[pair.b.unsafeGetTensorImpl()] = entry;
    return entry->slot;
  }

  void remove(const at::Tensor& tensor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto entry = alive(tensor)) {
      entries_.erase(entry->a._unsafe_get_target());
      entries_.erase(entry->b._unsafe_get_target());
    }
  }

  std::shared_ptr<Entry> find(const at::Tensor& tensor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return tensor.defined() ? alive(tensor) : nullptr;
  }

 private:
  static WeakImpl weak(const at::Tensor& tensor) { return WeakImpl(tensor.getIntrusivePtr()); }

  std::shared_ptr<Entry> alive(const at::Tensor& tensor) {
    const auto found = entries_.find(tensor.unsafeGetTensorImpl());
    if (found == entries_.end() || found->second->a.expired() || found->second->b.expired()) {
      return nullptr;
    }
    return found->second;
  }

  void sweep() {
    std::erase_if(entries_, [](const auto& item) {
      return item.second->a.expired() || item.second->b.expired();
    });
  }

  std::mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, std::shared_ptr<Entry>> entries_;
};

std::string describe(const at::Tensor& tensor) {
  return c10::str(tensor.sizes(), " ", tensor.scalar_type(), " on ", tensor.device());
}

}  // namespace

void LoraPair::validate() const {
  constexpr const char* kWhere = "ctrlora::LoraPair";
  CTRLORA_CHECK(a.defined() && b.defined(), kWhere, "pair '", name,
                "': expected two tensors a and b; got an undefined one.");
  for (const at::Tensor* tensor : {&a, &b}) {
    CTRLORA_CHECK(tensor->layout() == at::kStrided && at::isFloatingType(tensor->scalar_type()),
                  kWhere, "pair '", name, "': expected dense real floating-point tensors; got a ",
                  describe(a), " and b ", describe(b),
                  ". Remedy: train such parameters with another optimizer.");
  }
  CTRLORA_CHECK(
      a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(1) && a.numel() > 0 && b.numel() > 0,
      kWhere, "pair '", name, "': expected a (r, n) and b (m, r) with one rank r; got a ",
      a.sizes(), " and b ", b.sizes(),
      ". Remedy: check that lora_A and lora_B belong to the same layer.");
  CTRLORA_CHECK(a.device() == b.device() && a.scalar_type() == b.scalar_type(), kWhere, "pair '",
                name, "': expected a and b on one device with one dtype; got a ", describe(a),
                " and b ", describe(b), ". Remedy: move both, e.g. layer.to(device).");
  CTRLORA_CHECK(std::isfinite(scaling) && scaling != 0.0, kWhere, "pair '", name,
                "': expected a finite scaling other than 0; got ", scaling, ".");
}

std::shared_ptr<ObservationSlot> register_pair(const LoraPair& pair) {
  pair.validate();
  return Registry::instance().add(pair);
}

void unregister_pair(const at::Tensor& tensor) {
  Registry::instance().remove(tensor);
}

std::optional<LoraPair> find_pair(const at::Tensor& tensor) {
  const auto entry = Registry::instance().find(tensor);
  if (entry == nullptr) {
    return std::nullopt;
  }
  auto a = entry->a.lock();
  auto b = entry->b.lock();
  if (!a.defined() || !b.defined()) {
    return std::nullopt;
  }
  return LoraPair{at::Tensor(std::move(a)), at::Tensor(std::move(b)), entry->scaling, entry->name};
}

std::shared_ptr<ObservationSlot> find_slot(const at::Tensor& tensor) {
  const auto entry = Registry::instance().find(tensor);
  return entry == nullptr ? nullptr : entry->slot;
}

}  // namespace ctrlora
