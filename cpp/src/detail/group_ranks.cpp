#include "detail/group_ranks.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nan_to_num.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "detail/philox.h"
#include "detail/small_matrix.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora::detail {

namespace {

// The inverse of a Gram of active directions, zero elsewhere. `floor` is relative to its trace.
at::Tensor active_inverse(const at::Tensor& gram, double floor) {
  const at::Tensor diagonal = gram.diagonal(0, -2, -1);
  const at::Tensor off = (diagonal == 0).to(gram.scalar_type());
  const at::Tensor lift = floor * diagonal.mean(-1, /*keepdim=*/true) * (1 - off) + off;
  const Cholesky cholesky = robust_cholesky(gram + at::diag_embed(lift), 1e-15);
  return select_layers(cholesky.ok, cholesky_inverse(cholesky.factor) - at::diag_embed(off),
                       at::zeros({}, gram.options()));
}

at::Tensor product(const at::Tensor& tall, const at::Tensor& small) {  // (L,d,p) (L,p,q)
  return at::bmm(tall, small.to(tall.scalar_type()));
}

constexpr double kFloor = 1e-10;

double rounding_of(const at::Tensor& slab) {
  return slab.scalar_type() == at::kDouble ? 1e-12 : 1e-6;
}

// Left singular vectors of (L, d, q) columns, largest first; zero where there is but rounding.
at::Tensor singular_vectors(const at::Tensor& columns) {
  return product(columns, gram_root(tall_gram(columns, columns), rounding_of(columns)).inverse);
}

}  // namespace

GroupRanks::GroupRanks(const GroupView& view, const Options& options, int64_t sketch_columns)
    : exponent_(options.whitening / 2), damping_(options.damping), seed_(options.seed) {
  const int64_t layers = view.a.size(0);
  const int64_t n = view.a.size(2);
  const int64_t m = view.b.size(1);
  const int64_t q = std::min({sketch_columns, m, n});
  const at::TensorOptions tall = view.momentum_a.options();
  const at::TensorOptions small = tall.dtype(at::kDouble);
  phase_ = at::zeros({layers}, at::kLong);  // on the host: backward asks for it
  probe_a_ = at::zeros({layers, n, q}, tall);
  probe_b_ = at::zeros({layers, m, q}, tall);
  sum_b_ = at::zeros({layers, m, q}, tall);
  sum_a_ = at::zeros({layers, 2, q, n}, tall);
  steps_ = at::zeros({layers}, at::kDouble);
  process_ = at::zeros({layers}, at::kLong);
  pending_b_ = at::zeros_like(sum_b_);
  pending_a_ = at::zeros_like(sum_a_);
  pending_backwards_ = at::zeros_like(steps_);
  score_ = at::zeros(view.gram_a.sizes(), small);
  score_steps_ = at::zeros({layers}, small);
}

SketchPhase GroupRanks::phase() const {
  return static_cast<SketchPhase>(*phase_.const_data_ptr<int64_t>());
}

at::Tensor GroupRanks::whiten(const LowRankEigen& factor,
                              const at::Tensor& columns,
                              double sign) const {
  return factor.apply_power(columns, sign * exponent_, damping_);
}

void GroupRanks::begin(SketchPhase phase, const GroupView& view, uint64_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (phase == SketchPhase::kRange) {
    begin_range(view, stream);
  } else if (phase == SketchPhase::kSplit) {
    begin_split(view);
  }
  phase_.fill_(static_cast<int64_t>(phase));
}

// V: random, outside the present rows in whitened coordinates; kept as O_g^-1/2 (I - Pi_A) V.
void GroupRanks::begin_range(const GroupView& view, uint64_t stream) {
  const LowRankEigen& omega = view.factors.input;
  const at::Tensor random = philox_normal(seed_, stream, probe_a_.sizes(), probe_a_.options());
  const at::Tensor a = view.a.mT().to(random.scalar_type());
  const at::Tensor inside =
      small_bmm(active_inverse(view.gram_a, kFloor), tall_gram(a, whiten(omega, random, 1.0)));
  probe_a_.copy_(whiten(omega, random, -1.0) - product(a, inside));
  sum_b_.zero_();
  sum_a_.zero_();
  steps_.zero_();
  score_.zero_();
  score_steps_.zero_();
}

// U = orth((I - Pi_B) S_g^-1/2 Y), kept as S_g^-1/2 U.
void GroupRanks::begin_split(const GroupView& view) {
  add_up(sum_b_);
  const LowRankEigen& s = view.factors.output;
  const at::Tensor b = view.b.to(sum_b_.scalar_type());
  const at::Tensor inside = small_bmm(active_inverse(view.gram_b, kFloor), tall_gram(b, sum_b_));
  const at::Tensor residual = whiten(s, sum_b_, -1.0) - whiten(s, product(b, inside), 1.0);
  // Twice: the second pass orthonormalises what rounding left of the first.
  const at::Tensor range =
      singular_vectors(singular_vectors(at::nan_to_num(residual, 0.0, 0.0, 0.0)));
  probe_b_.copy_(whiten(s, range, -1.0));
  sum_b_.zero_();
  steps_.zero_();
}

void GroupRanks::set_processes(std::shared_ptr<const Processes> processes) {
  drop();
  processes_ = std::move(processes);
  resume();
}

void GroupRanks::resume() {
  const int64_t own = processes_ == nullptr ? 0 : processes_->rank;
  if (*process_.const_data_ptr<int64_t>() != own) {
    sum_b_.zero_();
    sum_a_.zero_();
    steps_.zero_();
    process_.fill_(own);
  }
}

int64_t GroupRanks::event_bytes() const {
  return (sum_b_.numel() + sum_a_.numel()) *
         static_cast<int64_t>(c10::elementSize(Processes::sent_dtype(sum_b_.scalar_type())));
}

// A mean over steps and processes: with a mean loss in each, the gradient of DDP's loss.
void GroupRanks::add_up(const at::Tensor& sums) {
  if (processes_ != nullptr) {
    const at::Tensor steps = steps_.to(sums.device());  // a device's collectives take its tensors
    const at::Tensor sent = sums.to(Processes::sent_dtype(sums.scalar_type()));
    processes_->all_reduce({sent, steps});
    sums.copy_(sent);
    steps_.copy_(steps);
  }
}

int64_t GroupRanks::micro_batch(int64_t layer) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(pending_backwards_.const_data_ptr<double>()[layer]);
}

namespace {

// Half shares of a process' rows that are in the first half of the joined batch, in which the
// processes' rows follow each other: both or none but for a middle process. Rows of one sequence
// are not independent, and a process may have but one sequence.
int64_t shares_in_first_half(const Processes* processes) {
  return processes == nullptr ? 1
                              : std::clamp<int64_t>(processes->count - 2 * processes->rank, 0, 2);
}

}  // namespace

void GroupRanks::add(int64_t layer, const Observation& rows) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const SketchPhase now = phase();
  if (now == SketchPhase::kNone || rows.inputs.size(-1) != probe_a_.size(1) ||
      rows.output_grads.size(-1) != probe_b_.size(1) || rows.inputs.device() != probe_a_.device()) {
    return;
  }
  const at::ScalarType dtype = probe_a_.scalar_type();
  at::Tensor x = rows.inputs.to(dtype);
  at::Tensor g = rows.output_grads.to(dtype);
  const at::Tensor finite = at::isfinite(row_squares(x) + row_squares(g));
  if (!known_to_be_true(finite)) {
    const at::Tensor zero = at::zeros({}, x.options());
    x = at::where(finite.unsqueeze(-1), x, zero);
    g = at::where(finite.unsqueeze(-1), g, zero);
  }
  g = g * rows.row_weight;
  any_pending_ = true;
  if (now == SketchPhase::kRange) {
    pending_b_[layer].addmm_(g.t(), at::mm(x, probe_a_[layer]));
  } else {
    const at::Tensor c = at::mm(g, probe_b_[layer]);
    const int64_t shares = shares_in_first_half(processes_.get());
    const int64_t half = x.size(0) * shares / 2;
    const auto part = [&](int64_t which, int64_t begin, int64_t end) {
      if (begin < end) {  // scaled to stand for all rows, of all processes
        const double share =
            shares == 1 ? static_cast<double>(x.size(0)) / static_cast<double>(end - begin) : 2.0;
        pending_a_[layer][which].addmm_(c.slice(0, begin, end).t(), x.slice(0, begin, end), 1,
                                        share);
      }
    };
    part(0, 0, half);
    part(1, half, x.size(0));
  }
  pending_backwards_[layer] += 1.0;
}

void GroupRanks::commit(double loss_scale) {
  if (any_pending_) {
    const at::Tensor b = sum_b_ + pending_b_ / loss_scale;
    const at::Tensor a = sum_a_ + pending_a_ / loss_scale;
    // Rows that are finite may have products that are not: they count as rows of nothing.
    const at::Tensor ok = finite_layers(b).logical_and(finite_layers(a));
    sum_b_.copy_(select_layers(ok, b, sum_b_));
    sum_a_.copy_(select_layers(ok, a, sum_a_));
    steps_.add_(pending_backwards_ > 0);  // left out or not: knowing would stop a device
    drop();
  }
}

void GroupRanks::drop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (any_pending_) {
    pending_b_.zero_();
    pending_a_.zero_();
    pending_backwards_.zero_();
    any_pending_ = false;
  }
}

void GroupRanks::score(const at::Tensor& a_grad_a, const at::Tensor& live) {
  const at::Tensor usable = live.logical_and(finite_layers(a_grad_a));
  score_.add_(select_layers(usable, a_grad_a, at::zeros({}, a_grad_a.options())));
  score_steps_.add_(usable);
}

void GroupRanks::transport(const GaugeMap& gauge) {  // A <- R A, gradA <- R^-T gradA
  score_.copy_(
      select_layers(gauge.ok, small_bmm(small_bmm(gauge.map, score_), gauge.inverse), score_));
}

GroupScores GroupRanks::scores(const GroupView& view) {
  if (phase() == SketchPhase::kSplit) {
    add_up(sum_a_);
  }
  const at::Tensor p = view.gram_b.diagonal(0, -2, -1);
  const at::Tensor q = view.gram_a.diagonal(0, -2, -1);
  const at::Tensor slope = score_.diagonal(0, -2, -1) / score_steps_.clamp_min(1.0).unsqueeze(-1);
  GroupScores out;
  out.existing = (0.5 * view.scaling.square().unsqueeze(-1) * p * q - slope).to(at::kCPU);
  out.active = p.logical_or(q).to(at::kCPU);

  // Z O_g^-1/2 (I - Pi_A), transposed: (L, n, q) of each half.
  const LowRankEigen& omega = view.factors.input;
  const at::Tensor a = view.a.mT().to(probe_a_.scalar_type());
  const at::Tensor inverse = active_inverse(view.gram_a, kFloor);
  const at::Tensor count = steps_.clamp_min(1.0).to(probe_a_.options()).view({-1, 1, 1});
  const auto residual = [&](int64_t half) {
    const at::Tensor z = sum_a_.select(1, half).mT() / count;
    const at::Tensor inside = small_bmm(inverse, tall_gram(a, z));
    return at::nan_to_num(whiten(omega, z, -1.0) - whiten(omega, product(a, inside), 1.0), 0.0, 0.0,
                          0.0);
  };
  const at::Tensor first = residual(0);
  const at::Tensor second = residual(1);
  const at::Tensor cross = tall_gram(first, second);
  // Directions of one half, judged by the other: sigma_i = u_i^T Z_other v_i.
  const auto judged = [&](const at::Tensor& half) {
    const GramRoot root = gram_root(tall_gram(half, half), rounding_of(half));
    const at::Tensor inner = (root.inverse * small_bmm(cross, root.vectors)).sum(-2);
    return at::nan_to_num(inner, 0.0, 0.0, 0.0).clamp_min(0);
  };
  const at::Tensor sigma = (judged(first) + judged(second)) / 2;
  const at::Tensor utility = 0.5 * sigma.square() * (phase() == SketchPhase::kSplit ? 1.0 : 0.0);

  const at::Tensor both = first + second;
  const at::Tensor v = singular_vectors(both);
  out.rows = at::nan_to_num(whiten(omega, v, -1.0), 0.0, 0.0, 0.0).mT().contiguous();
  // A direction that came out as nothing cannot be grown.
  const at::Tensor usable = (out.rows != 0).any(-1);
  out.fresh = at::where(usable, utility, at::zeros({}, utility.options())).to(at::kCPU);
  return out;
}

void GroupRanks::change(const GroupView& view,
                        const at::Tensor& keep,
                        const at::Tensor& grow,
                        const at::Tensor& rows) const {
  const at::Device device = view.a.device();
  const at::Tensor stays = keep.to(device);
  const at::Tensor index = grow.to(device);
  const auto masked = [&](const at::Tensor& slab, int64_t dim) {
    slab.copy_(at::where(stays.unsqueeze(dim), slab, at::zeros({}, slab.options())));
  };
  masked(view.a, -1);
  masked(view.b, -2);
  masked(view.momentum_a, -1);
  masked(view.momentum_b, -2);
  // As large as the rows that stay, on average; 1 where there is none.
  const at::Tensor sizes = view.gram_a.diagonal(0, -2, -1) * stays;
  const at::Tensor mean = sizes.sum(-1) / stays.sum(-1).clamp_min(1);
  const at::Tensor size = at::where(mean > 0, mean, at::full({}, 1.0, mean.options())).sqrt();
  const at::Tensor from = index.clamp_min(0).unsqueeze(-1).expand({-1, -1, rows.size(-1)});
  const at::Tensor grown =
      rows.gather(1, from) * as_column(size).to(rows.scalar_type()) * (index >= 0).unsqueeze(-1);
  view.a.add_(grown.to(view.a.scalar_type()));
}

std::vector<std::pair<std::string, at::Tensor>> GroupRanks::named_tensors() const {
  return {{"ranks.phase", phase_},     {"ranks.probe_a", probe_a_},
          {"ranks.probe_b", probe_b_}, {"ranks.sum_a", sum_a_},
          {"ranks.sum_b", sum_b_},     {"ranks.steps", steps_},
          {"ranks.score", score_},     {"ranks.score_steps", score_steps_},
          {"ranks.process", process_}};
}

void GroupRanks::to(const at::TensorOptions& statistics) {
  for (at::Tensor* tensor : {&probe_a_, &probe_b_, &sum_b_, &sum_a_, &pending_b_, &pending_a_}) {
    *tensor = tensor->to(statistics);
  }
  for (at::Tensor* tensor : {&score_, &score_steps_}) {
    *tensor = tensor->to(statistics.device());
  }
}

}  // namespace ctrlora::detail
