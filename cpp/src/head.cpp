#include "ctrlora/head.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/TensorImpl.h>

#include <limits>
#include <unordered_map>

#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

// ---- The averages ----

HeadMeter::HeadMeter()
    : squares_(at::zeros({2}, at::kDouble)), weight_(at::zeros({2}, at::kDouble)) {}

int64_t HeadMeter::add_head(const at::Tensor& weight) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto options = at::TensorOptions().dtype(at::kDouble).device(weight.device());
  pending_.push_back(at::zeros({3 + weight.size(0)}, options));
  return static_cast<int64_t>(pending_.size()) - 1;
}

void HeadMeter::add(int64_t head, const at::Tensor& sums) {
  const std::lock_guard<std::mutex> lock(mutex_);
  at::Tensor& own = pending_[static_cast<size_t>(head)];
  if (own.numel() == sums.numel()) {
    own = own.to(sums.device()) + sums;
  }
}

void HeadMeter::drop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (at::Tensor& own : pending_) {
    own = at::zeros_like(own);
  }
}

namespace {

// (2): sum of |z - mean|^2, without the bias of a mean from the same rows, and sum of |dloss/dz|^2.
at::Tensor about_mean(const at::Tensor& sums) {
  const at::Tensor count = sums[0];
  const at::Tensor about = sums[1] - sums.slice(0, 3).square().sum() / count.clamp_min(1);
  const at::Tensor both = at::stack({about.clamp_min(0) * count / (count - 1), sums[2]});
  return at::where(count > 1, both, at::zeros({}, both.options()));
}

}  // namespace

void HeadMeter::commit(double beta, double loss_scale, const Processes* processes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (pending_.empty()) {
    return;
  }
  double unit = loss_scale;
  if (processes != nullptr) {
    processes->all_reduce(pending_);
    unit *= static_cast<double>(processes->count);  // DDP averages the gradients
  }
  const at::Device device = pending_.front().device();
  at::Tensor sample = at::zeros({2}, pending_.front().options());
  for (at::Tensor& own : pending_) {
    sample = sample + about_mean(own).to(device);
    own = at::zeros_like(own);
  }
  squares_ = squares_.to(device);  // the model may have been moved
  weight_ = weight_.to(device);
  sample = at::stack({sample[0], sample[1] / (unit * unit)});
  const at::Tensor mean = squares_ / weight_.clamp_min(1e-300);
  const at::Tensor usable = sample.isfinite().all().logical_and(sample[1] > 0).expand({2});
  detail::ema(squares_, weight_, detail::bounded_sample(sample, mean, weight_ > 0), usable, beta);
}

at::Tensor HeadMeter::sensitivity() const {
  const at::Tensor product = (squares_ / weight_.clamp_min(1e-300)).prod(0, /*keepdim=*/true);
  const at::Tensor unknown =
      at::full({1}, std::numeric_limits<double>::infinity(), product.options());
  return at::where(weight_.slice(0, 0, 1) > 0, product.sqrt(), unknown);
}

std::vector<std::pair<std::string, at::Tensor>> HeadMeter::named_tensors() const {
  return {{"head.row_square", squares_}, {"head.row_weight", weight_}};
}

// ---- The channel ----

void HeadSlot::connect(const std::weak_ptr<HeadMeter>& meter, int64_t head) {
  const std::lock_guard<std::mutex> lock(mutex_);
  meter_ = meter;
  head_ = head;
  set_wanted(!meter.expired());
}

std::shared_ptr<HeadCapture> HeadSlot::capture(const at::Tensor& outputs) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!wanted() || meter_.expired() || outputs.dim() < 1 || outputs.numel() == 0) {
    return nullptr;
  }
  return std::make_shared<HeadCapture>(meter_, head_, outputs);
}

HeadCapture::HeadCapture(std::weak_ptr<HeadMeter> meter, int64_t head, const at::Tensor& outputs)
    : meter_(std::move(meter)),
      head_(head),
      outputs_(outputs.detach()),
      version_(outputs._version()) {}

void HeadCapture::complete(const at::Tensor& output_grad) {
  const at::Tensor outputs = std::move(outputs_);
  outputs_ = at::Tensor();
  const std::shared_ptr<HeadMeter> meter = meter_.lock();
  if (!outputs.defined() || meter == nullptr || !output_grad.defined() ||
      output_grad.sizes() != outputs.sizes() || outputs._version() != version_) {
    return;
  }
  const detail::NumericsGuard guard;
  const at::Tensor z = outputs.reshape({-1, outputs.size(-1)});
  const at::Tensor squares = detail::row_squares(z);
  const at::Tensor grads =
      detail::row_squares(output_grad.detach().reshape({-1, output_grad.size(-1)}));
  const at::Tensor usable =
      (grads > 0).logical_and(grads.isfinite()).logical_and(squares.isfinite());
  const auto masked = [](const at::Tensor& mask, const at::Tensor& x) {
    return at::where(mask, x, at::zeros({}, x.options()));
  };
  const at::Tensor scalars = at::stack({at::ones_like(squares), squares, grads});
  meter->add(head_,
             at::cat({masked(usable, scalars).sum(-1),
                      masked(usable.unsqueeze(1), z).sum(0, /*keepdim=*/false, at::kDouble)}));
}

namespace {

using WeakImpl = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

struct Entry {
  WeakImpl weight;
  std::shared_ptr<HeadSlot> slot;
};

struct Registry {
  std::mutex mutex;
  std::unordered_map<const c10::TensorImpl*, Entry> heads;
  int64_t last = 0;  // handle

  // Never destroyed: slots of static objects may outlive any order of destruction.
  static Registry& instance() {
    static auto* registry = new Registry;  // NOLINT(cppcoreguidelines-owning-memory)
    return *registry;
  }
};

}  // namespace

std::shared_ptr<HeadSlot> HeadSlot::find(int64_t handle) {
  Registry& registry = Registry::instance();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  for (const auto& item : registry.heads) {  // a model has one or two
    if (item.second.slot->handle_ == handle && !item.second.weight.expired()) {
      return item.second.slot;
    }
  }
  return nullptr;
}

std::shared_ptr<HeadSlot> register_head(const at::Tensor& weight) {
  Registry& registry = Registry::instance();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  std::erase_if(registry.heads, [](const auto& item) { return item.second.weight.expired(); });
  const auto [found, added] = registry.heads.try_emplace(
      weight.unsafeGetTensorImpl(), Entry{WeakImpl(weight.getIntrusivePtr()), nullptr});
  if (added) {
    found->second.slot = std::make_shared<HeadSlot>();
    found->second.slot->handle_ = ++registry.last;
  }
  return found->second.slot;
}

std::shared_ptr<HeadSlot> find_head(const at::Tensor& weight) {
  Registry& registry = Registry::instance();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.heads.find(weight.unsafeGetTensorImpl());
  const bool alive = found != registry.heads.end() && !found->second.weight.expired();
  return alive ? found->second.slot : nullptr;
}

void unregister_head(const at::Tensor& weight) {
  Registry& registry = Registry::instance();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.heads.erase(weight.unsafeGetTensorImpl());
}

at::Tensor watch_head(const at::Tensor& weight, const at::Tensor& outputs) {
  const std::shared_ptr<HeadSlot> slot =
      at::GradMode::is_enabled() && outputs.requires_grad() ? find_head(weight) : nullptr;
  if (slot != nullptr) {
    if (const std::shared_ptr<HeadCapture> capture = slot->capture(outputs)) {
      outputs.register_hook([capture](const at::Tensor& grad) { capture->complete(grad); });
    }
  }
  return outputs;
}

}  // namespace ctrlora
