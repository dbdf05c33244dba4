#include "detail/tall_skinny.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "detail/elementwise_kernels.h"
#include "detail/tall_kernels.h"
#include "detail/tensor_math.h"

namespace ctrlora::detail {

namespace {

// Rows of one task: small enough to balance, large enough to amortise.
constexpr int64_t kChunk = kGramRows;
constexpr int kMaxLeft = 3;  // left sides of one job
constexpr int kMaxTerms = 3;
constexpr int64_t kGrain = 32768;  // elements worth a thread, as in ATen

// At B = 0 the coefficients of an exactly zero momentum are 1e60: in range for float64 only.
at::Tensor narrow(const at::Tensor& coefficients, at::ScalarType dtype) {
  return dtype == at::kDouble ? coefficients : coefficients.clamp(-1e30, 1e30).to(dtype);
}

enum class Layout { kTall, kWide, kOther };

bool is_narrow(const at::Tensor& slab) {
  return slab.scalar_type() == at::kBFloat16;
}

Layout layout_of(const at::Tensor& slab) {
  if (!slab.is_cpu() || (slab.scalar_type() != at::kFloat && !is_narrow(slab)) || slab.dim() != 3) {
    return Layout::kOther;
  }
  if (slab.stride(2) == 1) {
    return Layout::kTall;
  }
  return slab.stride(1) == 1 ? Layout::kWide : Layout::kOther;
}

// The common layout of slabs that the CPU kernels take, else kOther.
Layout common_layout(const std::vector<at::Tensor>& slabs) {
  const Layout layout = layout_of(slabs.front());
  const bool same = std::all_of(slabs.begin(), slabs.end(),
                                [&](const at::Tensor& slab) { return layout_of(slab) == layout; });
  return same ? layout : Layout::kOther;
}

// Rows of one layer's slabs for the kernels, which compute in float32: narrow slabs are widened
// there, a block at a time in cache, so that memory is read at their own size. Kept by one thread.
class RowBlock {
 public:
  RowBlock(int64_t layer, bool wide, int64_t begin, int64_t end)
      : layer_(layer), wide_(wide), begin_(begin), rows_(end - begin) {}

  TallMatrix of(const at::Tensor& slab) {
    const int64_t offset = layer_ * slab.stride(0) + begin_ * slab.stride(1);
    const int64_t stride = slab.stride(wide_ ? 2 : 1);
    if (is_narrow(slab)) {
      return widened(slab.const_data_ptr<at::BFloat16>() + offset, slab.size(2), stride);
    }
    // The kernels write through terms[0] alone, which the caller handed over for that.
    auto* data = const_cast<float*>(slab.const_data_ptr<float>());  // NOLINT(*-const-cast)
    return {data + offset, slab.size(2), stride};
  }

 private:
  TallMatrix widened(const at::BFloat16* from, int64_t columns, int64_t stride) {
    const int64_t lines = wide_ ? columns : rows_;
    const int64_t length = wide_ ? rows_ : columns;
    kept_.emplace_back(static_cast<size_t>(lines * length));
    float* to = kept_.back().data();
    for (int64_t line = 0; line < lines; ++line, from += stride, to += length) {
      for (int64_t i = 0; i < length; ++i) {
        to[i] = static_cast<float>(from[i]);
      }
    }
    return {kept_.back().data(), columns, length};
  }

  int64_t layer_;
  bool wide_;
  int64_t begin_, rows_;
  std::vector<std::vector<float>> kept_;
};

// Layout of all slabs of all jobs; kOther if the kernels do not take them.
Layout kernel_layout(const std::vector<GramJob>& jobs) {
  std::vector<at::Tensor> slabs;
  for (const GramJob& job : jobs) {
    slabs.insert(slabs.end(), job.left.begin(), job.left.end());
    slabs.push_back(job.right);
    if (!kernel_takes(job.right.size(2)) || job.left.size() > kMaxLeft || is_narrow(job.right)) {
      return Layout::kOther;
    }
  }
  return common_layout(slabs);
}

int64_t total_columns(const GramJob& job) {
  int64_t columns = 0;
  for (const at::Tensor& left : job.left) {
    columns += left.size(2);
  }
  return columns;
}

// (L, chunks, p, q) float32 -> (L, p, q) float64, in order.
at::Tensor sum_chunks(const at::Tensor& partial) {
  at::Tensor out = at::zeros({partial.size(0), partial.size(2), partial.size(3)},
                             partial.options().dtype(at::kDouble));
  const int64_t size = partial.stride(1);
  const auto* from = partial.const_data_ptr<float>();
  auto* to = out.data_ptr<double>();
  for (int64_t l = 0; l < partial.size(0); ++l, to += size) {
    for (int64_t c = 0; c < partial.size(1); ++c, from += size) {
      for (int64_t i = 0; i < size; ++i) {
        to[i] += static_cast<double>(from[i]);
      }
    }
  }
  return out;
}

}  // namespace

std::vector<at::Tensor> tall_grams(const std::vector<GramJob>& jobs) {
  std::vector<at::Tensor> out;
  const Layout layout = kernel_layout(jobs);
  if (layout == Layout::kOther) {
    for (const GramJob& job : jobs) {
      std::vector<at::Tensor> parts;
      parts.reserve(job.left.size());
      for (const at::Tensor& left : job.left) {
        parts.push_back(at::bmm(left.mT().to(job.right.scalar_type()), job.right));
      }
      out.push_back(at::cat(parts, 1).to(at::kDouble));
    }
    return out;
  }
  const bool wide = layout == Layout::kWide;
  const int64_t layers = jobs.front().right.size(0);
  const int64_t size = jobs.front().right.size(1);
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  std::vector<at::Tensor> partial;
  partial.reserve(jobs.size());
  for (const GramJob& job : jobs) {
    partial.push_back(
        at::zeros({layers, chunks, total_columns(job), job.right.size(2)}, job.right.options()));
  }
  at::parallel_for(0, layers * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t layer = task / chunks;
      const int64_t begin = task % chunks * kChunk;
      const int64_t end = std::min(size, begin + kChunk);
      RowBlock block(layer, wide, begin, end);
      for (size_t j = 0; j < jobs.size(); ++j) {
        const TallMatrix right = block.of(jobs[j].right);
        TallMatrix left[kMaxLeft];
        const auto count = static_cast<int>(jobs[j].left.size());
        for (int t = 0; t < count; ++t) {
          left[t] = block.of(jobs[j].left[static_cast<size_t>(t)]);
        }
        gram_kernel(left, count, right, wide, 0, end - begin,
                    partial[j].data_ptr<float>() + task * partial[j].stride(1));
      }
    }
  });
  out.reserve(partial.size());
  for (const at::Tensor& sums : partial) {
    out.push_back(sum_chunks(sums));
  }
  return out;
}

at::Tensor tall_gram(const at::Tensor& x, const at::Tensor& y) {
  return tall_grams({{{x}, y}}).front();
}

void tall_combine(const std::vector<Term>& terms) {
  const at::Tensor& out = terms.front().slab;
  const at::ScalarType dtype = terms[terms.size() > 1 ? 1 : 0].slab.scalar_type();
  std::vector<at::Tensor> slabs, coefficients;
  bool taken = kernel_takes(out.size(2)) && terms.size() <= kMaxTerms && !is_narrow(out);
  for (const Term& term : terms) {
    slabs.push_back(term.slab);
    coefficients.push_back(term.coefficients);
    taken = taken && term.slab.size(2) <= kMaxCombineColumns;
  }
  const Layout layout = common_layout(slabs);
  if (layout == Layout::kOther || !taken) {
    at::Tensor sum = at::bmm(out.to(dtype), narrow(coefficients.front(), dtype));
    for (size_t t = 1; t < terms.size(); ++t) {
      sum.baddbmm_(slabs[t].to(dtype), narrow(coefficients[t], dtype));
    }
    out.copy_(sum);
    return;
  }
  const bool wide = layout == Layout::kWide;
  const at::Tensor joint = narrow(at::cat(coefficients, 1), dtype).contiguous();
  const int64_t size = out.size(1);
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  at::parallel_for(0, out.size(0) * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t layer = task / chunks;
      const int64_t begin = task % chunks * kChunk;
      const int64_t end = std::min(size, begin + kChunk);
      RowBlock block(layer, wide, begin, end);
      TallMatrix matrices[kMaxTerms];
      for (size_t t = 0; t < slabs.size(); ++t) {
        matrices[t] = block.of(slabs[t]);
      }
      combine_kernel(matrices, static_cast<int>(slabs.size()), wide,
                     joint.const_data_ptr<float>() + layer * joint.stride(0), 0, end - begin);
    }
  });
}

namespace {

at::Tensor stack_defined(const std::vector<at::Tensor>& grads, const at::Tensor& like) {
  std::vector<at::Tensor> present = grads;
  const auto given = std::find_if(grads.begin(), grads.end(),
                                  [](const at::Tensor& grad) { return grad.defined(); });
  const at::IntArrayRef shape = given != grads.end() ? given->sizes() : like.sizes().slice(1);
  for (at::Tensor& grad : present) {
    if (!grad.defined()) {
      grad = at::zeros(shape, like.options());
    } else if (grad.scalar_type() != like.scalar_type()) {
      grad = grad.to(like.scalar_type());
    }
  }
  return at::stack(present);
}

// The host loops below need plain memory: one dtype, contiguous, on the CPU.
bool in_plain_memory(const std::vector<at::Tensor>& grads, const at::Tensor& momentum) {
  return momentum.is_cpu() && momentum.is_contiguous() &&
         std::all_of(grads.begin(), grads.end(), [&](const at::Tensor& grad) {
           return !grad.defined() || (grad.is_contiguous() && grad.is_cpu() &&
                                      grad.scalar_type() == momentum.scalar_type());
         });
}

// Largest squared norm of a gradient whose Grams are in range: beyond it the layer sits out the
// step.
double largest_square(at::ScalarType dtype) {
  return dtype == at::kDouble ? 1e290 : 1e30;
}

double sum_of_squares(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += values[i] * values[i];
  }
  return sum;
}

double sum_of_squares(const float* values, int64_t count) {
  return squares_kernel(values, count);
}

void lerp(double* momentum, const double* grad, int64_t count, double step) {
  for (int64_t i = 0; i < count; ++i) {
    momentum[i] += step * (grad[i] - momentum[i]);
  }
}

void lerp(float* momentum, const float* grad, int64_t count, float step) {
  lerp_kernel(momentum, grad, count, step);
}

}  // namespace

namespace {

bool has_float_rows(const at::Tensor& rows) {
  return rows.is_cpu() && rows.is_contiguous() && rows.scalar_type() == at::kFloat;
}

// @param row_of number of the row whose square is the i-th.
template <typename RowOf>
at::Tensor float_row_squares(const at::Tensor& rows, at::IntArrayRef shape, const RowOf& row_of) {
  const int64_t size = rows.size(-1);
  at::Tensor out = at::empty(shape, rows.options().dtype(at::kDouble));
  const auto* from = rows.const_data_ptr<float>();
  auto* to = out.data_ptr<double>();
  at::parallel_for(0, out.numel(), kGrain / std::max<int64_t>(size, 1) + 1,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       to[i] = sum_of_squares(from + row_of(i) * size, size);
                     }
                   });
  return out;
}

}  // namespace

at::Tensor some_rows(const at::Tensor& rows) {
  return rows.slice(0, 0, rows.size(0), std::max<int64_t>(1, (rows.size(0) + 255) / 256));
}

at::Tensor row_squares(const at::Tensor& rows) {
  if (!has_float_rows(rows)) {
    return at::linalg_vector_norm(rows, 2, {-1}, /*keepdim=*/false, at::kDouble).square();
  }
  return float_row_squares(rows, rows.sizes().slice(0, static_cast<size_t>(rows.dim() - 1)),
                           [](int64_t i) { return i; });
}

at::Tensor row_squares(const at::Tensor& rows, const at::Tensor& index) {
  if (!has_float_rows(rows)) {
    return row_squares(rows.index_select(0, index));
  }
  const auto* picked = index.const_data_ptr<int64_t>();
  return float_row_squares(rows, index.sizes(), [=](int64_t i) { return picked[i]; });
}

at::Tensor momentum_step(const std::vector<at::Tensor>& grads_a,
                         const at::Tensor& momentum_a,
                         const std::vector<at::Tensor>& grads_b,
                         const at::Tensor& momentum_b,
                         const at::Tensor& wanted,
                         double beta) {
  const double limit = largest_square(momentum_a.scalar_type());
  if (!in_plain_memory(grads_a, momentum_a) || !in_plain_memory(grads_b, momentum_b)) {
    const at::Tensor slab_a = stack_defined(grads_a, momentum_a);
    const at::Tensor slab_b = stack_defined(grads_b, momentum_b);
    const auto in_range = [&](const at::Tensor& slab) {  // false for NaN, too
      return slab.flatten(1).square().sum(-1) <= limit;
    };
    const at::Tensor finite = in_range(slab_a).logical_and(in_range(slab_b));
    const at::Tensor moves = as_column(finite.logical_and(wanted));
    momentum_a.lerp_(at::where(moves, slab_a, momentum_a), 1.0 - beta);
    momentum_b.lerp_(at::where(moves, slab_b, momentum_b), 1.0 - beta);
    return finite;
  }
  const auto layers = static_cast<int64_t>(grads_a.size());
  at::Tensor finite = at::empty({layers}, wanted.options());
  bool* ok = finite.data_ptr<bool>();
  const bool* moves = wanted.const_data_ptr<bool>();
  AT_DISPATCH_FLOATING_TYPES(momentum_a.scalar_type(), "momentum_step", [&] {
    const auto step = static_cast<scalar_t>(1.0 - beta);
    // A layer at a time: the second reading of its gradients comes out of the cache.
    at::parallel_for(0, layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        const at::Tensor& a = grads_a[static_cast<size_t>(l)];
        const at::Tensor& b = grads_b[static_cast<size_t>(l)];
        const auto in_range = [&](const at::Tensor& grad) {  // false for NaN, too
          return !grad.defined() ||
                 sum_of_squares(grad.const_data_ptr<scalar_t>(), grad.numel()) <= limit;
        };
        ok[l] = in_range(a) && in_range(b);
        const auto move = [&](const at::Tensor& momentum, const at::Tensor& grad) {
          lerp(momentum.data_ptr<scalar_t>() + l * momentum.stride(0),
               grad.const_data_ptr<scalar_t>(), grad.numel(), step);
        };
        if (ok[l] && moves[l]) {
          move(momentum_a, a);
          move(momentum_b, b);
        }
      }
    });
  });
  return finite;
}

at::Tensor stack_gradients(const std::vector<at::Tensor>& grads,
                           const at::Tensor& ok,
                           const at::Tensor& like) {
  const at::Tensor slab = stack_defined(grads, like);
  return known_to_be_true(ok) ? slab
                              : at::where(as_column(ok), slab, at::zeros({}, slab.options()));
}

}  // namespace ctrlora::detail
