#include "detail/calibration_group.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "detail/check.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora::detail {

namespace {

constexpr const char* kWhere = "ctrlora::CgInit";
// Layers worked on together at the end: bounds the temporaries.
constexpr int64_t kSlice = 8;

at::TensorOptions statistics_of(const LoraPair& pair) {
  const bool wide = pair.a.scalar_type() == at::kDouble;
  return at::TensorOptions().dtype(wide ? at::kDouble : at::kFloat).device(pair.a.device());
}

Options factor_options(const CgInitOptions& options) {
  Options out;
  out.sketch_rank = options.sketch_rank;
  out.dense_limit = options.dense_limit;
  out.factor_every = 1;  // share sets of any layers of a group
  out.factor_beta = 1.0 - 1.0 / static_cast<double>(std::max<int64_t>(2, options.batches));
  out.seed = options.seed;
  return out;
}

int64_t probes_of(const CgInitOptions& options, int64_t rank) {
  return options.probes == 0 ? WhitenedGradient::default_probes(rank)
                             : std::max(options.probes, rank);
}

}  // namespace

CalibrationGroup::CalibrationGroup(std::vector<LoraPair> pairs,
                                   const CgInitOptions& options,
                                   std::shared_ptr<RowSampler> sampler)
    : pairs_(std::move(pairs)),
      options_(options),
      factor_options_(factor_options(options)),
      sampler_(std::move(sampler)),
      seen_(pairs_.size()),
      factors_(layers(),
               pairs_.front().in_features(),
               pairs_.front().out_features(),
               factor_options_,
               statistics_of(pairs_.front())),
      pending_(layers(), factor_options_) {
  const at::TensorOptions device = statistics_of(pairs_.front());
  finite_ = at::ones({layers()}, device.dtype(at::kBool));
  rows_ = at::zeros({layers()}, device.dtype(at::kDouble));
}

void CalibrationGroup::borrow(const std::shared_ptr<CalibrationGroup>& self) {
  const at::NoGradGuard no_grad;
  for (int64_t layer = 0; layer < self->layers(); ++layer) {
    const LoraPair& pair = self->pairs_[static_cast<size_t>(layer)];
    const auto slot = find_slot(pair.a);
    self->borrowed_.emplace_back(slot, slot->connection());
    slot->connect(ObservationSlot::Connection{self, layer, true});
    self->old_b_.push_back(pair.b.detach().clone());
    pair.b.detach().zero_();
  }
}

void CalibrationGroup::release() {
  const at::NoGradGuard no_grad;
  for (const auto& [slot, connection] : borrowed_) {
    slot->connect(connection);
  }
  borrowed_.clear();
  for (size_t layer = 0; layer < old_b_.size(); ++layer) {
    pairs_[layer].b.detach().copy_(old_b_[layer]);
  }
  old_b_.clear();
}

int64_t CalibrationGroup::micro_batch(int64_t layer) const {
  return pending_.micro_batch(layer);
}

void CalibrationGroup::observe(int64_t layer, const Observation& observation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (observation.inputs.device() != rows_.device() ||
      observation.inputs.size(-1) != factors_.input.size() ||
      observation.output_grads.size(-1) != factors_.output.size()) {
    return;  // a module whose output is not this layer's
  }
  seen_[static_cast<size_t>(layer)] = 1;
  if (batch_ < options_.factor_batches()) {
    // The factors leave bad rows out; here they are an error.
    const at::Tensor sum =
        observation.inputs.sum(at::kFloat) + observation.output_grads.sum(at::kFloat);
    finite_[layer].logical_and_(at::isfinite(sum));
    pending_.add(layer, observation, factors_);
  } else {
    add_to_sketch(layer, observation);
  }
}

void CalibrationGroup::add_to_sketch(int64_t layer, const Observation& observation) {
  const at::ScalarType dtype = factors_.input.basis().scalar_type();
  at::Tensor grads = observation.output_grads.to(dtype);
  const at::Tensor counts = row_squares(grads).ne(0);  // true for NaN, too: noticed at the end
  rows_[layer].add_(counts.sum());
  const int64_t share_set = pending_.share_set(layer);
  const bool shared = last_.source.defined() && last_.source.is_same(observation.inputs) &&
                      share_set >= 0 && share_set == last_.share_set;
  if (!shared) {
    const at::Tensor inputs = observation.inputs.to(dtype);
    last_ = {observation.inputs, inputs, gradient_.input_coordinates(layer, inputs), share_set};
  }
  at::Tensor inputs = last_.inputs;
  at::Tensor coordinates = last_.coordinates;
  if (counts.is_cpu()) {  // padding adds zeros; elsewhere the number of rows would be a sync
    const at::Tensor index = at::nonzero(counts).squeeze(-1);
    if (4 * index.numel() < 3 * counts.numel()) {
      inputs = inputs.index_select(0, index);
      coordinates = coordinates.index_select(0, index);
      grads = grads.index_select(0, index);
    }
  }
  GradientSketch& half = halves_[static_cast<size_t>((batch_ - options_.factor_batches()) % 2)];
  gradient_.add(half, layer, inputs, coordinates, grads);
}

void CalibrationGroup::commit_factors() {
  const at::TensorOptions options = factors_.input.basis().options();
  // Layers without rows give zeros, which change nothing; no gradient proxy here.
  const auto no_rows = [&] {
    return std::make_pair(at::zeros({layers(), 1, factors_.input.size()}, options),
                          at::zeros({layers(), 1, factors_.output.size()}, options));
  };
  constexpr int64_t kNeverStart = int64_t{1} << 32;
  factors_.commit(pending_.collect(0, layers(), kNeverStart, factors_, no_rows, finite_),
                  factor_options_);
  pending_.clear();
}

void CalibrationGroup::start_sketch() {
  gradient_ = WhitenedGradient(factors_, options_.whitening, options_.damping,
                               probes_of(options_, rank()), options_.seed);
  halves_ = {gradient_.empty(), gradient_.empty()};
}

int64_t CalibrationGroup::end_batch(int64_t batch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const NumericsGuard guard;
  const int64_t first = options_.factor_batches();
  if (batch < first) {
    commit_factors();
    if (batch + 1 == first) {
      start_sketch();
    }
  } else {
    const at::Tensor seen = at::tensor(seen_, at::kByte).to(rows_.device(), at::kDouble);
    halves_[static_cast<size_t>((batch - first) % 2)].batches.add_(seen);
  }
  last_ = {};
  batch_ = batch + 1;
  const int64_t count = std::count(seen_.begin(), seen_.end(), 1);
  std::fill(seen_.begin(), seen_.end(), uint8_t{0});
  return count;
}

void CalibrationGroup::check_rows() const {
  const at::Tensor finite = finite_.logical_and(finite_layers(halves_[0].range))
                                .logical_and(finite_layers(halves_[1].range))
                                .logical_and(finite_layers(halves_[0].corange))
                                .logical_and(finite_layers(halves_[1].corange))
                                .to(at::kCPU);
  const at::Tensor rows = rows_.to(at::kCPU);
  for (size_t layer = 0; layer < pairs_.size(); ++layer) {
    CTRLORA_CHECK(
        finite.const_data_ptr<bool>()[layer], kWhere, "expected finite numbers; got NaN ",
        "or inf among the inputs or output gradients of layer '", pairs_[layer].name,
        "'. Remedy: look for NaN in the loss; with a GradScaler, start at a lower scale.");
    const auto count = static_cast<int64_t>(rows.const_data_ptr<double>()[layer]);
    CTRLORA_CHECK(count == 0 || count >= rank(), kWhere, "expected at least as many rows with a ",
                  "gradient as the rank, ", rank(), "; got ", count, " for layer '",
                  pairs_[layer].name, "'. Remedy: more or larger calibration batches.");
  }
}

std::vector<LayerInit> CalibrationGroup::finish() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const NumericsGuard guard;
  check_rows();
  std::vector<LayerInit> out;
  for (int64_t begin = 0; begin < layers(); begin += kSlice) {
    finish_slice(begin, std::min(begin + kSlice, layers()), out);
  }
  return out;
}

void CalibrationGroup::finish_slice(int64_t begin, int64_t end, std::vector<LayerInit>& out) const {
  const WhitenedGradient gradient = gradient_.slice(begin, end);
  const GradientSketch first = halves_[0].slice(begin, end);
  const GradientSketch second = halves_[1].slice(begin, end);
  const GradientSketch all = first + second;
  const FactoredGradient whole = gradient.reconstruct(all);
  const int64_t found = std::min(rank(), whole.left.size(2));
  const WhitenedSvd directions = svd(whole, found);
  const at::Tensor split =
      split_half_values(gradient.reconstruct(first), gradient.reconstruct(second), found);
  const at::Tensor samples = gradient.effective_samples(first, second);
  const NoiseModel noise = gradient.noise(samples);
  const at::Tensor kept = (split > options_.deviations * gradient.deviation(directions, samples))
                              .logical_and(directions.values > 0)
                              .logical_and(directions.ok.unsqueeze(-1));
  std::vector<double> scaling;
  for (int64_t layer = begin; layer < end; ++layer) {
    scaling.push_back(pairs_[static_cast<size_t>(layer)].scaling);
  }
  const InitialPair start =
      initial_pair(directions, kept, gradient.input(), gradient.output(),
                   factors_.base_square.slice(0, begin, end),
                   at::tensor(scaling, at::kDouble).to(rows_.device()), rank(), options_);
  const at::Tensor energy =
      at::where(kept, directions.values.square(), at::zeros_like(directions.values)).sum(-1) /
      gradient.energy(all);
  const at::Tensor finite = finite_layers(start.a).logical_and(finite_layers(start.b));
  const at::Tensor numbers =
      at::stack({kept.sum(-1).to(at::kDouble), rows_.slice(0, begin, end), energy.clamp_max(1),
                 noise.floor(), samples, start.radius, finite.to(at::kDouble)},
                1)
          .to(at::kCPU);
  const at::Tensor spectra = at::stack({directions.values, split}, 1).to(at::kCPU);
  for (int64_t layer = begin; layer < end; ++layer) {
    const int64_t at = layer - begin;
    const double* number = numbers[at].const_data_ptr<double>();
    CTRLORA_CHECK(number[1] == 0.0 || number[6] == 1.0, kWhere,
                  "expected statistics that give finite start values; got others for layer '",
                  pairs_[static_cast<size_t>(layer)].name,
                  "'. Remedy: calibrate anew; a cache of them was changed after it was written.");
    out.push_back({pairs_[static_cast<size_t>(layer)].name, start.a[at], start.b[at],
                   spectra[at][0], spectra[at][1], static_cast<int64_t>(number[0]),
                   static_cast<int64_t>(number[1]), number[2], number[3], number[4], number[5]});
  }
}

int64_t CalibrationGroup::bytes() const {
  const LoraPair& pair = pairs_.front();
  const int64_t element = factors_.input.basis().element_size();
  const int64_t bases =
      (factors_.input.basis().numel() + factors_.output.basis().numel()) * element;
  const int64_t sketches = 2 * layers() *
                           WhitenedGradient::sketch_bytes(pair.in_features(), pair.out_features(),
                                                          probes_of(options_, rank()), element);
  return bases + std::max(bases, sketches) + layers() * static_cast<int64_t>(pair.b.nbytes());
}

std::vector<std::pair<std::string, at::Tensor>> CalibrationGroup::named_tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> out = factors_.named_tensors();
  for (size_t half = 0; half < halves_.size(); ++half) {
    const std::string prefix = "half" + std::to_string(half) + ".";
    out.emplace_back(prefix + "range", halves_[half].range);
    out.emplace_back(prefix + "corange", halves_[half].corange);
    out.emplace_back(prefix + "batches", halves_[half].batches);
  }
  out.emplace_back("finite", finite_);
  out.emplace_back("rows", rows_);
  return out;
}

void CalibrationGroup::after_load() {
  const std::array<GradientSketch, 2> loaded = halves_;
  start_sketch();  // probes' coordinates on the loaded bases
  halves_ = loaded;
}

}  // namespace ctrlora::detail
