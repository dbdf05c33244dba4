#include "ctrlora/cg_init.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "ctrlora/observation.h"
#include "ctrlora/tangent_step.h"
#include "detail/calibration_group.h"
#include "detail/check.h"
#include "detail/philox.h"
#include "detail/saved_tensor.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

using detail::as_column;
using detail::tall_gram;

namespace {

constexpr const char* kWhere = "ctrlora::CgInit";
constexpr uint64_t kFillStream = 13;
constexpr int64_t kShiftRows = 1024;  // of the base at a time: bounds the temporary

template <typename Value>
void check(bool ok, const char* name, const Value& value, const char* rule) {
  CTRLORA_CHECK(ok, "ctrlora::CgInitOptions", name, " = ", value, ". Violated constraint: ", rule,
                ".");
}

}  // namespace

void CgInitOptions::validate() const {
  check(batches >= 4, "batches", batches,
        "batches >= 4, one for the factors and two halves of the others");
  check(init_radius > 0 && init_radius < 1, "init_radius", init_radius, "0 < init_radius < 1");
  check(whitening >= 0 && whitening <= 1, "whitening", whitening, "0 <= whitening <= 1");
  check(damping > 0 && std::isfinite(damping), "damping", damping, "damping > 0");
  check(sketch_rank >= 1, "sketch_rank", sketch_rank, "sketch_rank >= 1");
  check(probes >= 0, "probes", probes, "probes >= 0");
  check(deviations >= 0 && std::isfinite(deviations), "deviations", deviations, "deviations >= 0");
  check(dense_limit >= 1, "dense_limit", dense_limit, "dense_limit >= 1");
}

namespace {

// Unit columns in whitened coordinates, random, off the span of `taken` (L, n, r').
at::Tensor random_directions(const at::Tensor& taken, int64_t columns, uint64_t seed) {
  const at::Tensor normal =
      detail::philox_normal(seed, kFillStream, {1, taken.size(1), columns}, taken.options())
          .expand({taken.size(0), -1, -1});
  const at::Tensor off = normal - at::bmm(taken, tall_gram(taken, normal).to(taken.scalar_type()));
  return off / off.norm(2, {1}, /*keepdim=*/true).clamp_min(1e-30);
}

// |B A|_O^2 for B (L, m, r), A^T (L, n, r).
at::Tensor output_square(const at::Tensor& b, const at::Tensor& at, const LowRankEigen& input) {
  const at::Tensor gram_a =
      weighted_gram(input.power(1.0, 0.0), tall_gram(input.basis(), at), tall_gram(at, at));
  return detail::inner(tall_gram(b, b), gram_a);
}

at::Tensor square_sum(const at::Tensor& columns) {
  return columns.square().sum({1, 2}, /*keepdim=*/false, at::kDouble);
}

}  // namespace

InitialPair initial_pair(const WhitenedSvd& directions,
                         const at::Tensor& kept,
                         const WhiteningMetric& input,
                         const WhiteningMetric& output,
                         const at::Tensor& base_square,
                         const at::Tensor& scaling,
                         int64_t rank,
                         const CgInitOptions& options) {
  const detail::NumericsGuard guard;
  const at::ScalarType dtype = directions.left.scalar_type();
  const at::Tensor values = at::where(kept, directions.values, at::zeros_like(directions.values));
  const at::Tensor root = values.sqrt().unsqueeze(1).to(dtype);
  const at::Tensor b = output.whiten(directions.left) * root;   // (L, m, r')
  const at::Tensor at = input.whiten(directions.right) * root;  // (L, n, r'): A^T

  // c^2 = init_radius |W0|_O / |s B A|_O; a scalar gauge makes A and B equally large, whatever the
  // units of the loss.
  const at::Tensor found = kept.any(-1);
  const at::Tensor change = (output_square(b, at, input.factor).sqrt() * scaling.abs());
  const at::Tensor c =
      at::where(found, options.init_radius * base_square.sqrt() / change, at::zeros_like(change))
          .sqrt();
  const at::Tensor gauge =
      at::where(found, (square_sum(b) / square_sum(at)).pow(0.25), at::zeros_like(change));
  const at::Tensor size_a = c * gauge;
  const at::Tensor size_b = -c * scaling.sign() / at::where(found, gauge, gauge + 1);

  // The other directions: A rows of the smallest kept size (of LoRA's usual size, |row|^2 = 1/3,
  // where nothing was kept), at zero B.
  const at::Tensor taken = directions.right * kept.unsqueeze(1);
  const at::Tensor fill = input.whiten(random_directions(taken, rank, options.seed));
  const at::Tensor smallest =
      at::where(kept, directions.values, at::full_like(values, 1e300)).amin(-1).sqrt();
  const at::Tensor usual = (rank / (3.0 * square_sum(fill))).sqrt();
  const at::Tensor fill_size = at::where(found, size_a * smallest, usual);
  const int64_t missing = rank - values.size(1);
  const auto pad = [&](const at::Tensor& x) {
    return missing == 0 ? x
                        : at::cat({x, at::zeros({x.size(0), x.size(1), missing}, x.options())}, 2);
  };
  const at::Tensor filled = pad(kept.unsqueeze(1)).logical_not();
  const at::Tensor whole_a =
      pad(at * as_column(size_a).to(dtype)) + fill * as_column(fill_size).to(dtype) * filled;
  const at::Tensor whole_b =
      options.zero_b ? pad(at::zeros_like(b)) : pad(b * as_column(size_b).to(dtype));
  const double radius = options.zero_b ? 0.0 : options.init_radius;
  return {whole_a.mT().contiguous(), whole_b, found.to(at::kDouble) * radius};
}

CgInit::CgInit(const std::vector<LoraPair>& pairs, const CgInitOptions& options)
    : options_(options), pairs_(pairs) {
  options_.validate();
  CTRLORA_CHECK(!pairs.empty(), kWhere, "expected at least one pair; got none.");
  const auto sampler = std::make_shared<RowSampler>(std::numeric_limits<int64_t>::max(),
                                                    options_.seed, /*keep_references=*/true);
  std::vector<std::vector<LoraPair>> sorted;
  for (const LoraPair& pair : pairs_) {
    pair.validate();
    CTRLORA_CHECK(find_slot(pair.a) != nullptr, kWhere, "expected registered pairs; got '",
                  pair.name, "'. Remedy: register_pair(pair) first.");
    const auto same = [&](const std::vector<LoraPair>& group) {
      const LoraPair& first = group.front();
      return first.a.sizes() == pair.a.sizes() && first.b.sizes() == pair.b.sizes() &&
             first.a.scalar_type() == pair.a.scalar_type() && first.a.device() == pair.a.device();
    };
    const auto found = std::find_if(sorted.begin(), sorted.end(), same);
    const auto group = static_cast<size_t>(found - sorted.begin());
    if (found == sorted.end()) {
      sorted.emplace_back();
    }
    places_.emplace_back(group, sorted[group].size());
    sorted[group].push_back(pair);
  }
  for (std::vector<LoraPair>& group : sorted) {
    groups_.push_back(
        std::make_shared<detail::CalibrationGroup>(std::move(group), options_, sampler));
  }
  for (const auto& group : groups_) {
    detail::CalibrationGroup::borrow(group);
  }
}

CgInit::~CgInit() {
  release();
}

void CgInit::release() {
  for (const auto& group : groups_) {
    group->release();
  }
}

int64_t CgInit::end_batch() {
  int64_t seen = 0;
  for (const auto& group : groups_) {
    seen += group->end_batch(batch_);
  }
  groups_.front()->sampler().set_step(++batch_);
  return seen;
}

std::vector<LayerInit> CgInit::finish() const {
  CTRLORA_CHECK(batch_ == options_.batches, kWhere, "expected ", options_.batches,
                " calibration batches; got ", batch_, ". Remedy: end_batch() after each.");
  std::vector<std::vector<LayerInit>> by_group;
  by_group.reserve(groups_.size());
  for (const auto& group : groups_) {
    by_group.push_back(group->finish());
  }
  std::vector<LayerInit> out;
  out.reserve(places_.size());
  for (const auto& [group, layer] : places_) {
    out.push_back(by_group[group][layer]);
  }
  const bool any =
      std::any_of(out.begin(), out.end(), [](const LayerInit& l) { return l.rows > 0; });
  CTRLORA_CHECK(any, kWhere, "expected gradients that are not zero; got none in any of the ",
                out.size(), " layers. Remedy: a loss that depends on the layers.");
  return out;
}

void CgInit::apply(const std::vector<LayerInit>& layers) {
  CTRLORA_CHECK(layers.size() == pairs_.size(), kWhere, "expected start values of ", pairs_.size(),
                " layers; got ", layers.size(), ".");
  release();
  const at::NoGradGuard no_grad;
  for (size_t l = 0; l < pairs_.size(); ++l) {
    if (layers[l].rows > 0) {
      pairs_[l].a.detach().copy_(layers[l].a);
      pairs_[l].b.detach().copy_(layers[l].b);
    }
  }
}

int64_t CgInit::bytes() const {
  int64_t sum = 0;
  for (const auto& group : groups_) {
    sum += group->bytes();
  }
  return sum;
}

std::vector<std::pair<std::string, at::Tensor>> CgInit::named_tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (const auto& [name, tensor] : groups_[g]->named_tensors()) {
      out.emplace_back("group" + std::to_string(g) + "." + name, tensor);
    }
  }
  return out;
}

void CgInit::load(const std::map<std::string, at::Tensor>& tensors) {
  const at::NoGradGuard no_grad;
  for (const auto& group : groups_) {
    group->start_sketch();
  }
  const auto own = named_tensors();
  std::ostringstream differ;
  for (const auto& [name, tensor] : own) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) {
      differ << " " << name << " is missing;";
    } else if (found->second.sizes() != tensor.sizes()) {
      differ << " " << name << " has shape " << found->second.sizes() << ", not " << tensor.sizes()
             << ";";
    } else if (const std::string why = detail::unusable(name, tensor, found->second);
               !why.empty()) {
      differ << " " << name << ": " << why << ";";
    }
  }
  CTRLORA_CHECK(differ.str().empty() && own.size() == tensors.size(), kWhere,
                "expected the statistics of these layers;", differ.str(), " got ", tensors.size(),
                " tensors of ", own.size(), ". Remedy: calibrate anew.");
  for (const auto& [name, tensor] : own) {
    tensor.copy_(tensors.at(name));
  }
  for (const auto& group : groups_) {
    group->after_load();
  }
  batch_ = options_.batches;
}

void shift_base(const at::Tensor& weight,
                const at::Tensor& a,
                const at::Tensor& b,
                double scaling,
                bool transposed) {
  const detail::NumericsGuard guard;
  const at::Tensor base = transposed ? weight.detach().t() : weight.detach();
  CTRLORA_CHECK(base.dim() == 2 && base.size(0) == b.size(0) && base.size(1) == a.size(1) &&
                    at::isFloatingType(base.scalar_type()),
                "ctrlora::shift_base", "expected a floating-point weight of ", b.size(0), " x ",
                a.size(1), "; got ", base.sizes(), " ", base.scalar_type(),
                ". Remedy: mode no_shift or zero_b.");
  const at::Tensor rows = a.detach();
  for (int64_t begin = 0; begin < base.size(0); begin += kShiftRows) {
    const int64_t end = std::min(begin + kShiftRows, base.size(0));
    const at::Tensor change = at::mm(b.detach().slice(0, begin, end), rows) * scaling;
    base.slice(0, begin, end).sub_(change.to(base.scalar_type()));
  }
}

}  // namespace ctrlora
