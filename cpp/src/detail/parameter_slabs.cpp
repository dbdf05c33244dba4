#include "detail/parameter_slabs.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include <cstring>
#include <limits>

#include "detail/check.h"
#include "detail/tensor_math.h"

namespace ctrlora::detail {

namespace {

constexpr double kNever = std::numeric_limits<double>::quiet_NaN();  // no parameter's value

// Layer `layer` of a slab with a storage of its own over the same memory. As a plain view it would
// share the slab's storage, and whoever looks at storages (safetensors, accelerate, torch.save)
// would take all layers for tied or save the slab with each.
at::Tensor part_of(const at::Tensor& slab, int64_t layer) {
  const at::Tensor view = slab[layer];
  return at::from_blob(
      view.data_ptr(), view.sizes(), [slab](void*) {}, slab.options(), slab.device());
}

}  // namespace

ParameterSlabs::ParameterSlabs(std::vector<LoraPair> pairs, bool masters)
    : pairs_(std::move(pairs)), masters_(masters) {
  adopt();
}

void ParameterSlabs::adopt() {
  const NumericsGuard guard;
  std::vector<at::Tensor> a, b;
  for (const LoraPair& pair : pairs_) {
    a.push_back(pair.a.detach());
    b.push_back(pair.b.detach());
  }
  param_a_ = at::stack(a);
  param_b_ = at::stack(b);
  const bool narrow = param_a_.element_size() == 2;
  a_ = masters_ && narrow ? param_a_.to(at::kFloat) : param_a_;
  b_ = masters_ && narrow ? param_b_.to(at::kFloat) : param_b_;
  probe_a_ = at::full({a_.size(0), a_.size(1)}, kNever, a_.options());
  probe_b_ = at::full({b_.size(0), b_.size(2)}, kNever, b_.options());
  for (size_t l = 0; l < pairs_.size(); ++l) {
    pairs_[l].a.set_data(part_of(param_a_, static_cast<int64_t>(l)));
    pairs_[l].b.set_data(part_of(param_b_, static_cast<int64_t>(l)));
  }
}

// A parameter that is not its master rounded was written by somebody else: a loaded checkpoint, a
// hand that merges or clips.
void ParameterSlabs::follow() const {
  if (has_masters()) {
    const NumericsGuard guard;
    for (const auto& [master, param] : {std::pair(&a_, &param_a_), std::pair(&b_, &param_b_)}) {
      master->copy_(
          at::where(*param == master->to(param->scalar_type()), *master, param->to(at::kFloat)));
    }
  }
}

void ParameterSlabs::publish() const {
  if (has_masters()) {
    param_a_.copy_(a_);
    param_b_.copy_(b_);
  }
}

namespace {

// Element of a (rows, columns) matrix that stands for direction j of `rank`: every direction has
// one, at another place along the matrix' length.
int64_t probe_index(int64_t rows, int64_t columns, int64_t rank, int64_t j) {
  return rows == rank ? j * columns + j * columns / rank : j * rows / rank * columns + j;
}

template <typename Visit>
void visit_probes(const at::Tensor& slab, int64_t rank, const Visit& visit) {
  const auto* data = static_cast<const char*>(slab.const_data_ptr());
  const int64_t bytes = slab.element_size();
  for (int64_t l = 0; l < slab.size(0); ++l) {
    for (int64_t j = 0; j < rank; ++j) {
      const int64_t index = probe_index(slab.size(1), slab.size(2), rank, j);
      visit(data + (l * slab.stride(0) + index) * bytes, (l * rank + j) * bytes, bytes);
    }
  }
}

}  // namespace

void ParameterSlabs::remember() {
  for (const auto& [slab, probe] : {std::pair(&a_, &probe_a_), std::pair(&b_, &probe_b_)}) {
    if (slab->is_cpu()) {
      auto* out = static_cast<char*>(probe->data_ptr());
      visit_probes(*slab, a_.size(1), [&](const char* value, int64_t offset, int64_t bytes) {
        std::memcpy(out + offset, value, static_cast<size_t>(bytes));
      });
    }
  }
}

bool ParameterSlabs::carried() const {
  bool same = a_.is_cpu() && (a_.scalar_type() == at::kFloat || a_.scalar_type() == at::kDouble);
  for (const auto& [slab, probe] : {std::pair(&a_, &probe_a_), std::pair(&b_, &probe_b_)}) {
    if (same) {
      const auto* known = static_cast<const char*>(probe->const_data_ptr());
      visit_probes(*slab, a_.size(1), [&](const char* value, int64_t offset, int64_t bytes) {
        same = same && std::memcmp(known + offset, value, static_cast<size_t>(bytes)) == 0;
      });
    }
  }
  return same;
}

bool ParameterSlabs::bind() {
  const LoraPair& first = pairs_.front();
  if (first.a.device() != param_a_.device() || first.a.scalar_type() != param_a_.scalar_type()) {
    for (const LoraPair& pair : pairs_) {  // the whole model was cast or moved
      pair.validate();
      CTRLORA_CHECK(
          pair.a.device() == first.a.device() && pair.a.scalar_type() == first.a.scalar_type(),
          "ctrlora::Engine::step", "pairs '", first.name, "' and '", pair.name,
          "' started on one device with one dtype and now differ: ", first.a.device(), " ",
          first.a.scalar_type(), " and ", pair.a.device(), " ", pair.a.scalar_type(),
          ". Remedy: build a new optimizer.");
    }
    adopt();
    return true;
  }
  for (size_t l = 0; l < pairs_.size(); ++l) {
    rebind(pairs_[l].a, param_a_, static_cast<int64_t>(l), pairs_[l].name);
    rebind(pairs_[l].b, param_b_, static_cast<int64_t>(l), pairs_[l].name);
  }
  follow();
  return false;
}

void ParameterSlabs::rebind(at::Tensor& param,
                            const at::Tensor& slab,
                            int64_t layer,
                            const std::string& name) {
  const char* expected = static_cast<const char*>(slab.const_data_ptr()) +
                         layer * slab.stride(0) * slab.element_size();
  if (param.const_data_ptr() == expected) {
    return;
  }
  const NumericsGuard guard;
  const at::Tensor home = part_of(slab, layer);
  CTRLORA_CHECK(param.sizes() == home.sizes() && param.device() == home.device() &&
                    param.scalar_type() == home.scalar_type(),
                "ctrlora::Engine::step", "a parameter of pair '", name, "' was replaced: expected ",
                home.sizes(), " ", home.scalar_type(), " on ", home.device(), "; got ",
                param.sizes(), " ", param.scalar_type(), " on ", param.device(),
                ". Remedy: build a new optimizer after changing ranks.");
  home.copy_(param.detach());
  param.set_data(home);
}

std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>> ParameterSlabs::gradients(
    int64_t begin, int64_t end) const {
  std::vector<at::Tensor> a, b;
  for (auto l = static_cast<size_t>(begin); l < static_cast<size_t>(end); ++l) {
    at::Tensor grad_a = pairs_[l].a.grad();
    at::Tensor grad_b = pairs_[l].b.grad();
    const bool both = grad_a.defined() && grad_b.defined();
    a.push_back(both ? std::move(grad_a) : at::Tensor());
    b.push_back(both ? std::move(grad_b) : at::Tensor());
  }
  return {std::move(a), std::move(b)};
}

}  // namespace ctrlora::detail
