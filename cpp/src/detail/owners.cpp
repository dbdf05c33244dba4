#include "detail/owners.h"

#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <c10/core/ScalarType.h>

#include <utility>

namespace ctrlora::detail {

namespace {

constexpr int64_t kMaps = 3;

int64_t maps_of(const LowRankEigen& factor) {
  return factor.layers() * kMaps * factor.sketch_rank() * factor.sketch_rank();
}

int64_t numbers_of(const LowRankEigen& factor) {
  return factor.layers() * (factor.sketch_rank() + 1);
}

}  // namespace

Owners::Owners(std::shared_ptr<const Processes> processes, const std::vector<LowRankEigen>& factors)
    : processes_(std::move(processes)) {
  int64_t maps = 0, numbers = 1;
  at::ScalarType dtype = at::kFloat;  // rounded as the products with a slab would round them
  for (const LowRankEigen& factor : factors) {
    if (divides(factor)) {
      maps += maps_of(factor);
      numbers += numbers_of(factor);
      dtype = c10::promoteTypes(dtype, factor.dtype());
    }
  }
  const at::TensorOptions options = factors.front().options();
  maps_ = at::zeros({maps}, options.dtype(dtype));
  numbers_ = at::zeros({numbers}, options.dtype(at::kDouble));
}

bool Owners::divides(const LowRankEigen& factor) {
  constexpr int64_t kShare = 8;
  const auto size = [](at::ScalarType dtype) {
    return static_cast<int64_t>(c10::elementSize(dtype));
  };
  const int64_t k = factor.sketch_rank();
  return kShare * kMaps * k * size(factor.dtype()) <=
         factor.size() * size(Processes::sent_dtype(factor.dtype()));
}

int64_t Owners::bytes(const LowRankEigen& factor) {
  const auto one = static_cast<int64_t>(c10::elementSize(factor.dtype()));
  const auto number = static_cast<int64_t>(sizeof(double));
  return divides(factor) ? maps_of(factor) * one + numbers_of(factor) * number : 0;
}

std::pair<int64_t, int64_t> Owners::owned(const Slabs& bases, int64_t rank, int64_t count) {
  int64_t total = 0;
  for (const at::Tensor& slab : bases) {
    total += slab.size(0) * slab.size(1);
  }
  // A layer is the process' in whose share of the work its middle lies.
  int64_t before = 0, layer = 0, begin = 0, end = 0;
  for (const at::Tensor& slab : bases) {
    const int64_t work = slab.size(1);
    for (int64_t l = 0; l < slab.size(0); ++l, ++layer, before += work) {
      const int64_t owner = (2 * before + work) * count / (2 * total);
      begin += static_cast<int64_t>(owner < rank);
      end += static_cast<int64_t>(owner <= rank);
    }
  }
  return {begin, end};
}

Owners::Share Owners::next(const Slabs& bases) {
  int64_t layers = 0;
  for (const at::Tensor& slab : bases) {
    layers += slab.size(0);
  }
  const int64_t k = bases.front().size(2);
  const auto [begin, end] = owned(bases, processes_->rank, processes_->count);
  Share out{begin, end,
            maps_.narrow(0, maps_taken_, layers * kMaps * k * k).view({layers, kMaps, k, k}),
            numbers_.narrow(0, numbers_taken_, layers * (k + 1)).view({layers, k + 1})};
  maps_taken_ += out.maps.numel();
  numbers_taken_ += out.numbers.numel();
  return out;
}

void Owners::Share::put(const Nystrom& own) const {
  const int64_t k = maps.size(3);
  maps.slice(0, begin, end).copy_(at::stack({own.of_basis, own.of_fresh, own.map}, 1));
  numbers.slice(0, begin, end).slice(1, 0, k).copy_(own.values);
  numbers.slice(0, begin, end).select(1, k).copy_(own.ok);
}

Nystrom Owners::Share::all() const {
  const at::Tensor wide = maps.to(at::kDouble);
  const int64_t k = maps.size(3);
  return {wide.select(1, 0), wide.select(1, 1), wide.select(1, 2), numbers.slice(1, 0, k),
          numbers.select(1, k) > 0};
}

void Owners::exchange() {
  exchanged_ = true;
  processes_->all_reduce({maps_, numbers_});
}

void Owners::leave() {
  if (exchanged_) {
    return;
  }
  maps_.zero_();
  numbers_.zero_();
  numbers_.slice(0, numbers_.size(0) - 1).fill_(1);
  exchange();
}

at::Tensor Owners::complete() const {
  return numbers_[-1] == 0;
}

}  // namespace ctrlora::detail
