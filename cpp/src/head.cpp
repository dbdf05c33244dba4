#include "ctrlora/head.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
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
    : squares_(at::zeros({2}, at::kDouble)),
      weight_(at::zeros({2}, at::kDouble)),
      change_square_(at::zeros({0}, at::kDouble)),
      change_weight_(at::zeros({0}, at::kDouble)) {}

int64_t HeadMeter::add_head(const at::Tensor& weight) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto options = at::TensorOptions().dtype(at::kDouble).device(weight.device());
  Head& own = heads_.emplace_back();
  own.weight = weight;
  own.sums = at::zeros({3 + 2 * weight.size(0)}, options);
  change_square_ = at::cat({change_square_, at::zeros({1}, change_square_.options())});
  change_weight_ = at::cat({change_weight_, at::zeros({1}, change_weight_.options())});
  return static_cast<int64_t>(heads_.size()) - 1;
}

void HeadMeter::add(int64_t head, const at::Tensor& sums, const at::Tensor& inputs) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Head& own = heads_[static_cast<size_t>(head)];
  if (own.sums.numel() != sums.numel()) {
    return;
  }
  own.sums = own.sums.to(sums.device()) + sums;
  int64_t kept = 0;
  for (const at::Tensor& rows : own.inputs) {
    kept += rows.size(0);
  }
  if (inputs.defined() && inputs.size(1) == own.weight.size(1) && kept < kInputs) {
    own.inputs.push_back(inputs);
  }
}

void HeadMeter::drop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Head& own : heads_) {
    own.sums = at::zeros_like(own.sums);
    own.inputs.clear();
    own.direction = at::Tensor();
  }
}

void HeadMeter::set_direction(int64_t head, const at::Tensor& direction, double beta) {
  const std::lock_guard<std::mutex> lock(mutex_);
  heads_[static_cast<size_t>(head)].direction = direction;
  heads_[static_cast<size_t>(head)].direction_beta = beta;
}

namespace {

// Any fixed vector (n) that no layer norm makes orthogonal to its outputs.
at::Tensor probe(int64_t size, const at::TensorOptions& options) {
  return at::arange(1, size + 1, options).cos_();
}

at::Tensor for_products(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
}

// What the step's gradients are of those that backward made, squared: (weight.grad probe) over the
// same from the rows. 1 where nothing is known.
at::Tensor clipped_square(const at::Tensor& weight, const at::Tensor& from_rows) {
  at::Tensor one = at::ones({}, from_rows.options());
  if (!weight.grad().defined()) {
    return one;
  }
  const at::Tensor grad = for_products(weight.grad().detach());
  const at::Tensor found = grad.mv(probe(grad.size(1), grad.options())).to(at::kDouble);
  const at::Tensor square = found.square().sum() / from_rows.square().sum();
  return at::where(square.isfinite(), square, one);
}

// (2): sum of |z - mean|^2, without the bias of a mean from the same rows, and sum of |dloss/dz|^2.
at::Tensor about_mean(const at::Tensor& sums) {
  const int64_t size = (sums.size(0) - 3) / 2;
  const at::Tensor count = sums[0];
  const at::Tensor about = sums[1] - sums.slice(0, 3, 3 + size).square().sum() / count.clamp_min(1);
  const at::Tensor both = at::stack({about.clamp_min(0) * count / (count - 1), sums[2]});
  return at::where(count > 1, both, at::zeros({}, both.options()));
}

}  // namespace

void HeadMeter::commit(double beta, double loss_scale, const Processes* processes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (heads_.empty()) {
    return;
  }
  std::vector<at::Tensor> seen;
  seen.reserve(heads_.size());
  for (const Head& own : heads_) {
    seen.push_back(at::cat({own.sums, moved(own)}));
  }
  double unit = loss_scale;
  if (processes != nullptr) {
    processes->all_reduce(seen);
    unit *= static_cast<double>(processes->count);  // DDP averages the gradients
  }
  const at::Device device = seen.front().device();
  at::Tensor sample = at::zeros({2}, seen.front().options());
  std::vector<at::Tensor> changes;
  for (size_t i = 0; i < seen.size(); ++i) {
    const int64_t size = heads_[i].sums.size(0);
    const at::Tensor sums = seen[i].slice(0, 0, size);
    const at::Tensor both = about_mean(sums);
    const at::Tensor from_rows = sums.slice(0, 3 + heads_[i].weight.size(0)) / unit;
    const at::Tensor grads = both[1] / (unit * unit) * clipped_square(heads_[i].weight, from_rows);
    sample = sample + at::stack({both[0], grads}).to(device);
    changes.push_back(seen[i].slice(0, size).to(device));
    heads_[i].sums = at::zeros_like(sums);
  }
  enter(changes);
  squares_ = squares_.to(device);  // the model may have been moved
  weight_ = weight_.to(device);
  const at::Tensor mean = squares_ / weight_.clamp_min(1e-300);
  const at::Tensor usable = sample.isfinite().all().logical_and(sample[1] > 0).expand({2});
  detail::ema(squares_, weight_, detail::bounded_sample(sample, mean, weight_ > 0), usable, beta);
}

// (2) float64: sum over the inputs of the mean square of the outputs' change by the direction, and
// how many inputs there are; one that is zero everywhere is none.
at::Tensor HeadMeter::moved(const Head& own) {
  if (own.inputs.empty() || !own.direction.defined()) {
    return at::zeros({2}, own.sums.options());
  }
  const at::Tensor x = at::cat(own.inputs);
  const at::Tensor direction = own.direction.to(x.device(), x.scalar_type());
  const at::Tensor change = detail::row_squares(x.matmul(direction.t()));
  const at::Tensor count = (detail::row_squares(x) > 0).sum();
  return at::stack({change.sum() / static_cast<double>(direction.size(0)), count})
      .to(own.sums.options());
}

// `moved` of each head, over all processes, into its average; forgets inputs and directions.
void HeadMeter::enter(const std::vector<at::Tensor>& moved) {
  change_square_ = change_square_.to(moved.front().device());
  change_weight_ = change_weight_.to(moved.front().device());
  for (size_t i = 0; i < moved.size(); ++i) {
    const auto place = static_cast<int64_t>(i);
    const at::Tensor square = change_square_.slice(0, place, place + 1);
    const at::Tensor weight = change_weight_.slice(0, place, place + 1);
    const at::Tensor sample = (moved[i][0] / moved[i][1]).view({1});
    const at::Tensor usable = sample.isfinite().logical_and(sample > 0);
    const at::Tensor mean = square / weight.clamp_min(1e-300);
    detail::ema(square, weight, detail::bounded_sample(sample, mean, weight > 0), usable,
                heads_[i].direction_beta);
    heads_[i].inputs.clear();
    heads_[i].direction = at::Tensor();
  }
}

// Inputs next to nothing (a layer before the head is dead) would make weights without bound, which
// the outputs feel once it lives.
constexpr double kMostGain = 1000.0;

at::Tensor HeadMeter::gains(double step) const {
  const at::Tensor rms = (change_square_ / change_weight_.clamp_min(1e-300)).sqrt();
  return at::where(change_weight_ > 0, (step / rms).clamp_max(kMostGain), at::ones_like(rms));
}

at::Tensor HeadMeter::sensitivity() const {
  const at::Tensor product = (squares_ / weight_.clamp_min(1e-300)).prod(0, /*keepdim=*/true);
  const at::Tensor unknown =
      at::full({1}, std::numeric_limits<double>::infinity(), product.options());
  return at::where(weight_.slice(0, 0, 1) > 0, product.sqrt(), unknown);
}

std::vector<std::pair<std::string, at::Tensor>> HeadMeter::named_tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> out = {{"head.row_square", squares_},
                                                         {"head.row_weight", weight_}};
  if (!heads_.empty()) {
    out.emplace_back("head.change_square", change_square_);
    out.emplace_back("head.change_weight", change_weight_);
  }
  return out;
}

// ---- The channel ----

void HeadSlot::connect(const std::weak_ptr<HeadMeter>& meter, int64_t head) {
  const std::lock_guard<std::mutex> lock(mutex_);
  meter_ = meter;
  head_ = head;
  set_wanted(!meter.expired());
}

std::shared_ptr<HeadCapture> HeadSlot::capture(const at::Tensor& inputs,
                                               const at::Tensor& outputs) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!wanted() || meter_.expired() || outputs.dim() < 1 || outputs.numel() == 0 ||
      inputs.dim() != outputs.dim() || inputs.numel() == 0) {
    return nullptr;
  }
  return std::make_shared<HeadCapture>(meter_, head_, inputs, outputs);
}

HeadCapture::HeadCapture(std::weak_ptr<HeadMeter> meter,
                         int64_t head,
                         const at::Tensor& inputs,
                         const at::Tensor& outputs)
    : meter_(std::move(meter)),
      head_(head),
      outputs_(outputs.detach()),
      version_(outputs._version()) {
  const detail::NumericsGuard guard;
  const at::Tensor x = for_products(inputs.detach().reshape({-1, inputs.size(-1)}));
  projected_ = x.mv(probe(x.size(1), x.options())).to(at::kDouble);
  inputs_ = detail::some_rows(x).clone();  // x may be overwritten
}

void HeadCapture::complete(const at::Tensor& output_grad) {
  const at::Tensor outputs = std::move(outputs_);
  outputs_ = at::Tensor();
  const std::shared_ptr<HeadMeter> meter = meter_.lock();
  if (!outputs.defined() || meter == nullptr || !output_grad.defined() ||
      output_grad.sizes() != outputs.sizes() || outputs._version() != version_ ||
      projected_.size(0) * outputs.size(-1) != outputs.numel()) {
    return;
  }
  const detail::NumericsGuard guard;
  const at::Tensor z = outputs.reshape({-1, outputs.size(-1)});
  const at::Tensor g = output_grad.detach().reshape({-1, output_grad.size(-1)});
  const at::Tensor squares = detail::row_squares(z), grads = detail::row_squares(g);
  const at::Tensor usable =
      (grads > 0).logical_and(grads.isfinite()).logical_and(squares.isfinite());
  const auto masked = [](const at::Tensor& mask, const at::Tensor& x) {
    return at::where(mask, x, at::zeros({}, x.options()));
  };
  const at::Tensor own_z = masked(usable.unsqueeze(1), z);
  const at::Tensor own_g = for_products(masked(usable.unsqueeze(1), g));
  const at::Tensor times_probe = own_g.t().mv(projected_.to(own_g.scalar_type()));
  const at::Tensor scalars = at::stack({at::ones_like(squares), squares, grads});
  meter->add(head_,
             at::cat({masked(usable, scalars).sum(-1), own_z.sum(0, /*keepdim=*/false, at::kDouble),
                      times_probe.to(at::kDouble)}),
             masked(detail::some_rows(usable).unsqueeze(1), inputs_));
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

at::Tensor watch_head(const at::Tensor& weight,
                      const at::Tensor& inputs,
                      const at::Tensor& outputs) {
  const std::shared_ptr<HeadSlot> slot =
      at::GradMode::is_enabled() && outputs.requires_grad() ? find_head(weight) : nullptr;
  if (slot != nullptr) {
    if (const std::shared_ptr<HeadCapture> capture = slot->capture(inputs, outputs)) {
      outputs.register_hook([capture](const at::Tensor& grad) { capture->complete(grad); });
    }
  }
  return outputs;
}

}  // namespace ctrlora
