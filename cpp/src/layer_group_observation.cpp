// What a LayerGroup observes: which layers on which step, and how it enters the factors.

#include <algorithm>
#include <utility>

#include "ctrlora/layer_group.h"
#include "detail/group_ranks.h"
#include "detail/owners.h"
#include "detail/parameter_slabs.h"
#include "detail/pending_observations.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora {

namespace {

// Steps in which every layer's Grams are measured anew: rounding of carried ones stays at that of
// eight steps, for an eighth of two products a step.
constexpr int64_t kGramsEvery = 8;

// Steps between two measurements of a layer's raw direction: a sixth of an observed step's passes,
// for a mean whose memory hardly matters.
constexpr int64_t kSizesEvery = 3;

}  // namespace

LayerGroup::Range LayerGroup::due(int64_t step, int64_t every) const {
  const int64_t part = step % every;  // layer l is due iff floor(l every / L) = part
  return {(part * layers() + every - 1) / every, ((part + 1) * layers() + every - 1) / every};
}

// Layers whose rows enter the factors on this step.
LayerGroup::Range LayerGroup::observed() const {
  return age_ < options_.factor_warmup_steps ? Range{0, layers()} : due(age_, observe_every_);
}

// Layers whose rows enter a rank sketch, which is not sent on each step.
LayerGroup::Range LayerGroup::sketched() const {
  return age_ < options_.factor_warmup_steps ? Range{0, layers()}
                                             : due(age_, options_.factor_every);
}

// Layers whose raw direction is measured.
LayerGroup::Range LayerGroup::measured() const {
  return age_ < options_.factor_warmup_steps
             ? Range{0, layers()}
             : due(age_, std::max(options_.factor_every, kSizesEvery));
}

void LayerGroup::observe_next(bool on) {
  const bool sketching = ranks_ != nullptr && ranks_->phase() != detail::SketchPhase::kNone;
  const Range range = on ? observed() : Range{0, 0};
  const Range ranked = on && sketching ? sketched() : Range{0, 0};
  for (int64_t l = 0; l < layers(); ++l) {
    if (slots_[l] != nullptr) {
      slots_[l]->set_wanted(range.has(l) || ranked.has(l));
    }
  }
}

namespace {

at::Tensor trace(const at::Tensor& gram) {
  return gram.diagonal(0, -2, -1).sum(-1);
}

// What M = c I gives for the trace over the adapter's own parameters, for c = 1 and s = 1.
at::Tensor unit_trace(const at::Tensor& a, const at::Tensor& b) {
  const auto square = [](const at::Tensor& x) {
    return x.to(at::kDouble).square().flatten(1).sum(-1);
  };
  return square(b) * static_cast<double>(a.size(2)) + square(a) * static_cast<double>(b.size(1));
}

}  // namespace

void LayerGroup::enter_traces(const at::Tensor& traces) {
  const at::Tensor unit = unit_trace(parameters_->a(), parameters_->b());
  const at::Tensor c = traces.to(unit.device()) / (scaling_.square() * unit);
  const at::Tensor known = c.isfinite();
  detail::ema(trace_sum_, trace_weight_, c, known, options_.factor_beta);
}

LayerGroup::Curvature LayerGroup::curvature() const {
  const auto gram = [&](const at::Tensor& weight, const LowRankEigen& factor) {
    SideProducts fresh;
    fresh.set_weight(weight.to(momentum_a_.scalar_type()), factor.basis());
    return trace(weighted_gram(factor.power(1.0, 0.0), fresh.uw, fresh.ww));
  };
  const at::Tensor kfac = gram(parameters_->b(), factors_.output) * factors_.input.trace() +
                          gram(parameters_->a().mT(), factors_.input) * factors_.output.trace();
  return {trace_sum_ / trace_weight_, kfac / unit_trace(parameters_->a(), parameters_->b())};
}

void LayerGroup::connect(const std::shared_ptr<LayerGroup>& self) {
  for (int64_t l = 0; l < self->layers(); ++l) {
    if (self->slots_[l] != nullptr) {
      self->slots_[l]->connect(self, l);
    }
  }
  self->observe_next(true);
}

int64_t LayerGroup::micro_batch(int64_t layer) const {
  const int64_t own = observations_->micro_batch(layer);
  return ranks_ == nullptr ? own : std::max(own, ranks_->micro_batch(layer));
}

void LayerGroup::observe(int64_t layer, const Observation& observation) {
  if (ranks_ != nullptr) {
    ranks_->add(layer, observation);
  }
  if (observed().has(layer)) {
    observations_->add(layer, observation, factors_);
  }
}

void LayerGroup::set_processes(const std::shared_ptr<const Processes>& processes,
                               int64_t exchange_every) {
  processes_ = processes;
  if (ranks_ != nullptr) {
    ranks_->set_processes(processes);
  }
  if (options_.curvature != "gradient") {  // factors of equal gradients are equal already
    observe_every_ = exchange_every;
    observations_->set_processes(processes, observe_every_, factors_);
    refresh_metrics();
  }
  observe_next(true);
}

Processes::Traffic LayerGroup::traffic() const {
  const int64_t gradients = parameters_->parameter_bytes();
  const int64_t ranks = ranks_ == nullptr ? 0 : ranks_->event_bytes();
  if (options_.curvature == "gradient") {
    return {0, gradients, ranks};
  }
  const int64_t numbers = factors_.input.basis().numel() + factors_.output.basis().numel();
  const auto bytes =
      static_cast<int64_t>(c10::elementSize(Processes::sent_dtype(factors_.input.dtype())));
  const bool divided = !SideStream::on_worker(options_.overlap, factors_.base_square.device());
  const int64_t maps =
      divided ? detail::Owners::bytes(factors_.input) + detail::Owners::bytes(factors_.output) : 0;
  return {numbers * bytes + maps, gradients, ranks};
}

void LayerGroup::drop_observations() {
  observations_->clear();
  if (ranks_ != nullptr) {
    ranks_->drop();
  }
}

std::pair<at::Tensor, at::Tensor> LayerGroup::raw_gradients(Range range) const {
  const auto part = [&](const at::Tensor& x) { return x.slice(0, range.begin, range.end); };
  const auto [grads_a, grads_b] = parameters_->gradients(range.begin, range.end);
  return {detail::stack_gradients(grads_a, part(grad_ok_), part(momentum_a_)),
          detail::stack_gradients(grads_b, part(grad_ok_), part(momentum_b_))};
}

bool LayerGroup::lags(int64_t step) const {
  return may_lag_ && observe_every_ > 1 && step >= options_.factor_warmup_steps;
}

void LayerGroup::publish() {
  if (refreshing_.begin < refreshing_.end) {
    factors_.slice(refreshing_.begin, refreshing_.end)
        .assign(back_.slice(refreshing_.begin, refreshing_.end));
  }
}

std::optional<KroneckerFactors::Commit> LayerGroup::collect_observations() {
  publish();
  changed_ = refreshing_;
  refreshing_ = {0, 0};
  const Range range = observed();
  if (range.begin == range.end) {
    return std::nullopt;
  }
  KroneckerFactors view = factors_.slice(range.begin, range.end);
  const at::Tensor ok = grad_ok_.slice(0, range.begin, range.end);
  const auto rows = [&] {
    auto [raw_a, raw_b] = raw_gradients(range);
    return std::make_pair(raw_a, raw_b.mT());
  };
  const CurvatureSketch sketch =
      observations_->collect(range.begin, range.end, age_, view, rows, ok);
  if (lags(age_)) {
    KroneckerFactors back = back_.slice(range.begin, range.end);
    back.assign(view);
    refreshing_ = range;
    view = std::move(back);
  } else {
    changed_ = range;
  }
  return KroneckerFactors::Commit{view, sketch};
}

void LayerGroup::adopt_factors() {
  observations_->clear();
  if (ranks_ != nullptr) {
    ranks_->commit(options_.loss_scale);
  }
  if (changed_.begin < changed_.end) {
    refresh_metrics();
  }
  // Grams carried by the update's coefficients (apply) would drift by rounding: an eighth of the
  // layers is measured anew on every step, and whatever changed otherwise.
  if (!parameters_->carried()) {
    refresh_grams({0, layers()});
  } else {
    refresh_grams(changed_);
    refresh_grams(due(age_, kGramsEvery));
  }
}

void LayerGroup::commit_observations(const std::vector<LayerGroup*>& groups, SideStream& side) {
  struct Work {
    at::Device device;
    bool lags;
    std::vector<KroneckerFactors::Commit> commits;
  };
  std::vector<Work> works;
  for (LayerGroup* group : groups) {
    const std::optional<KroneckerFactors::Commit> own = group->collect_observations();
    if (own) {
      const at::Device device = own->factors.base_square.device();
      const bool lags = group->lags(group->age_);
      auto work = std::find_if(works.begin(), works.end(), [&](const Work& known) {
        return known.device == device && known.lags == lags;
      });
      if (work == works.end()) {
        work = works.insert(work, {device, lags, {}});
      }
      work->commits.push_back(*own);
    }
  }
  for (const Work& work : works) {
    std::vector<at::Tensor> tensors;
    for (const KroneckerFactors::Commit& commit : work.commits) {
      for (const at::Tensor& tensor : commit.sketch.tensors()) {
        tensors.push_back(tensor);
      }
      for (const auto& item : commit.factors.named_tensors()) {
        tensors.push_back(item.second);
      }
    }
    const LayerGroup& any = *groups.front();
    std::shared_ptr<detail::Owners> owners;
    if (any.processes_ != nullptr && any.options_.curvature != "gradient" &&
        !SideStream::on_worker(any.options_.overlap, work.device)) {
      owners = KroneckerFactors::owners(work.commits, any.processes_);
    }
    side.submit(work.device, std::move(tensors),
                [commits = work.commits, options = any.options_, owners] {
                  KroneckerFactors::commit_all(commits, options, owners.get());
                });
  }
  if (std::any_of(works.begin(), works.end(), [](const Work& work) { return !work.lags; })) {
    side.join();
  }
  for (LayerGroup* group : groups) {
    group->adopt_factors();
  }
}

void LayerGroup::refresh_metrics() {
  input_metric_ = SideMetric::of(factors_.input, options_.whitening, options_.damping);
  output_metric_ = SideMetric::of(factors_.output, options_.whitening, options_.damping);
}

void LayerGroup::refresh_grams(Range range) {
  if (range.begin == range.end) {
    return;
  }
  const auto part = [&](const at::Tensor& x) { return x.slice(0, range.begin, range.end); };
  const auto refresh = [&](const SideProducts& kept, const at::Tensor& weight,
                           const LowRankEigen& factor) {
    SideProducts fresh;
    fresh.set_weight(part(weight).to(momentum_a_.scalar_type()), part(factor.basis()));
    part(kept.ww).copy_(fresh.ww);
    part(kept.uw).copy_(fresh.uw);
  };
  refresh(input_, parameters_->a().mT(), factors_.input);
  refresh(output_, parameters_->b(), factors_.output);
}

}  // namespace ctrlora
