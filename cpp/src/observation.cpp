#include "ctrlora/observation.h"

#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <unordered_map>
#include <vector>

#include "detail/philox.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

void RowSampler::set_step(int64_t step) {
  const std::lock_guard<std::mutex> lock(mutex_);
  step_ = step;
  cached_rows_ = -1;
  last_ = {};
}

void RowSampler::set_process(int64_t rank) {
  const std::lock_guard<std::mutex> lock(mutex_);
  process_ = rank;
  cached_rows_ = -1;
}

at::Tensor RowSampler::sample(int64_t rows, int64_t micro_batch, at::Device device) {
  if (rows <= sample_rows_) {
    return {};
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (rows != cached_rows_ || micro_batch != cached_micro_batch_ || cached_.device() != device) {
    // One stream of the generator per (step, micro-batch).
    const uint64_t stream =
        (static_cast<uint64_t>(step_) << 20U) + static_cast<uint64_t>(micro_batch);
    const uint64_t seed = seed_ ^ (static_cast<uint64_t>(process_) * 0x9E3779B97F4A7C15ULL);
    const std::vector<double> offset = detail::philox_uniform(seed, stream, sample_rows_);
    std::vector<int64_t> picked(offset.size());
    const double stride = static_cast<double>(rows) / static_cast<double>(sample_rows_);
    for (size_t i = 0; i < picked.size(); ++i) {
      const double row = (static_cast<double>(i) + offset[i]) * stride;
      picked[i] = std::min(static_cast<int64_t>(row), rows - 1);
    }
    cached_ = at::tensor(picked, at::kLong).to(device, /*non_blocking=*/true);
    cached_rows_ = rows;
    cached_micro_batch_ = micro_batch;
  }
  return cached_;
}

std::shared_ptr<InputRows> RowSampler::rows_of(const at::Tensor& inputs, const at::Tensor& rows) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool same = last_.rows != nullptr && !last_.source.expired() &&
                    last_.source._unsafe_get_target() == inputs.unsafeGetTensorImpl() &&
                    last_.version == inputs._version() && last_.index.is_same(rows);
  if (!same) {
    last_ = {WeakTensor(inputs.getIntrusivePtr()), inputs._version(), rows,
             std::make_shared<InputRows>()};
  }
  return last_.rows;
}

at::Tensor RowSampler::fill(InputRows& place,
                            const at::Tensor& flat,
                            const at::Tensor& rows,
                            bool saved) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!place.values.defined() && flat.defined()) {
    const bool reference = saved || keep_references_;
    place.values = rows.defined() ? flat.index_select(0, rows) : reference ? flat : flat.clone();
    place.version = place.values._version();
  }
  return place.values;
}

void RowSampler::stop_keeping_references() {
  const std::lock_guard<std::mutex> lock(mutex_);
  keep_references_ = false;
}

namespace {

struct SlotTable {
  std::mutex mutex;
  std::unordered_map<int64_t, std::weak_ptr<ObservationSlot>> slots;
  int64_t last = 0;

  // Never destroyed: slots of static objects may outlive any order of destruction.
  static SlotTable& instance() {
    static auto* table = new SlotTable;  // NOLINT(cppcoreguidelines-owning-memory)
    return *table;
  }
};

}  // namespace

std::shared_ptr<ObservationSlot> ObservationSlot::make() {
  auto slot = std::make_shared<ObservationSlot>();
  SlotTable& table = SlotTable::instance();
  const std::lock_guard<std::mutex> lock(table.mutex);
  slot->handle_ = ++table.last;
  table.slots[slot->handle_] = slot;
  return slot;
}

std::shared_ptr<ObservationSlot> ObservationSlot::find(int64_t handle) {
  SlotTable& table = SlotTable::instance();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.slots.find(handle);
  return found == table.slots.end() ? nullptr : found->second.lock();
}

ObservationSlot::~ObservationSlot() {
  if (handle_ != 0) {
    SlotTable& table = SlotTable::instance();
    const std::lock_guard<std::mutex> lock(table.mutex);
    table.slots.erase(handle_);
  }
}

void ObservationSlot::connect(const std::weak_ptr<ObservationSink>& sink, int64_t layer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  sink_ = sink;
  layer_ = layer;
}

ObservationSlot::Connection ObservationSlot::connection() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {sink_, layer_, wanted()};
}

void ObservationSlot::connect(const Connection& connection) {
  connect(connection.sink, connection.layer);
  set_wanted(connection.wanted);
}

std::shared_ptr<Capture> ObservationSlot::capture(const at::Tensor& inputs,
                                                  const at::Tensor& base_output,
                                                  bool saved) {
  std::shared_ptr<ObservationSink> sink;
  int64_t layer = -1;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    sink = sink_.lock();
    layer = layer_;
  }
  if (sink == nullptr || inputs.numel() == 0 || inputs.dim() < 1) {
    return nullptr;
  }
  const detail::NumericsGuard guard;
  const at::Tensor flat = inputs.detach().reshape({-1, inputs.size(-1)});
  auto capture = std::make_shared<Capture>();
  capture->slot_ = weak_from_this();
  capture->total_rows_ = flat.size(0);
  capture->rows_ = sink->sampler().sample(flat.size(0), sink->micro_batch(layer), inputs.device());
  capture->inputs_ = sink->sampler().rows_of(inputs, capture->rows_);
  if (!saved) {
    (void)sink->sampler().fill(*capture->inputs_, flat, capture->rows_, /*saved=*/false);
  }
  Observation& observation = capture->observation_;
  const int64_t taken = capture->rows_.defined() ? capture->rows_.size(0) : flat.size(0);
  observation.row_weight = static_cast<double>(flat.size(0)) / static_cast<double>(taken);
  observation.sequences = inputs.dim() >= 3 ? flat.size(0) / inputs.size(-2) : flat.size(0);
  if (base_output.defined() && sink->wants_base_square() &&
      base_output.numel() / base_output.size(-1) == flat.size(0)) {
    const at::Tensor base = base_output.detach().reshape({flat.size(0), -1});
    observation.base_square = capture->rows_.defined() ? detail::row_squares(base, capture->rows_)
                                                       : detail::row_squares(base);
  }
  return capture;
}

void Capture::complete(const at::Tensor& output_grad, const at::Tensor& inputs) {
  const std::shared_ptr<ObservationSlot> slot = slot_.lock();
  if (done_ || slot == nullptr || !output_grad.defined() ||
      output_grad.numel() != total_rows_ * output_grad.size(-1)) {
    return;
  }
  done_ = true;
  const detail::NumericsGuard guard;
  const at::Tensor flat = output_grad.detach().reshape({total_rows_, output_grad.size(-1)});
  observation_.output_grads = rows_.defined() ? flat.index_select(0, rows_) : flat;
  std::shared_ptr<ObservationSink> sink;
  int64_t layer = -1;
  {
    const std::lock_guard<std::mutex> lock(slot->mutex_);
    sink = slot->sink_.lock();
    layer = slot->layer_;
  }
  if (sink != nullptr) {
    const at::Tensor input =
        inputs.defined() ? inputs.detach().reshape({-1, inputs.size(-1)}) : inputs;
    observation_.inputs = sink->sampler().fill(*inputs_, input, rows_, /*saved=*/true);
    if (observation_.inputs.defined() && observation_.inputs._version() != inputs_->version) {
      sink->sampler().stop_keeping_references();
    } else if (observation_.inputs.defined()) {
      sink->observe(layer, observation_);
      slot->observations_.fetch_add(1);
    }
  }
  observation_ = {};
  inputs_.reset();
  rows_.reset();
}

}  // namespace ctrlora
