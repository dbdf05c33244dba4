#include "ctrlora/ctr_optimizer.h"

#include <ATen/core/grad_mode.h>
#include <torch/serialize/archive.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <tuple>
#include <utility>

#include "ctrlora/lora_pair.h"
#include "detail/check.h"
#include "detail/new_file.h"
#include "detail/random_state.h"

namespace ctrlora {

namespace {

constexpr const char* kWhere = "ctrlora::CTROptimizer";
constexpr int64_t kArchiveVersion = 1;  // of what save() writes around the engine's tensors

std::string name_of(const LoraPair& pair, size_t index, const std::set<std::string>& taken) {
  const std::string own = pair.name.empty() ? "pair" + std::to_string(index) : pair.name;
  std::string name = own;
  for (int copies = 2; taken.count(name) > 0; ++copies) {
    name = own + "#" + std::to_string(copies);
  }
  return name;
}

bool contains(const std::vector<at::Tensor>& params, const at::Tensor& tensor) {
  return std::any_of(params.begin(), params.end(),
                     [&](const at::Tensor& p) { return p.is_same(tensor); });
}

c10::IValue read(torch::serialize::InputArchive& archive, const std::string& key) {
  c10::IValue value;
  CTRLORA_CHECK(archive.try_read(key, value), kWhere, "expected an archive that save() wrote; got ",
                "one without '", key, "'. Remedy: load the file that holds the optimizer.");
  return value;
}

}  // namespace

GroupSettings CTROptions::settings() const {
  GroupSettings out;
  out.lr = lr();
  out.initial_lr = is_fallback_ ? lr() : first_lr_;
  out.weight_decay = weight_decay();
  std::tie(out.beta1, out.beta2) = fallback_betas();
  out.eps = fallback_eps();
  out.validate();
  return out;
}

CTROptions CTROptions::completed(const CTROptions& defaults) const {
  CTROptions out = defaults;
  const auto take = [](auto& own, const auto& given) { own = given.has_value() ? given : own; };
  take(out.lr_, lr_);
  take(out.weight_decay_, weight_decay_);
  take(out.fallback_lr_, fallback_lr_);
  take(out.fallback_betas_, fallback_betas_);
  take(out.fallback_eps_, fallback_eps_);
  take(out.fallback_weight_decay_, fallback_weight_decay_);
  return out;
}

CTROptions CTROptions::as_fallback() const {
  CTROptions out = *this;
  out.is_fallback_ = true;
  return out.lr(fallback_lr()).weight_decay(fallback_weight_decay());
}

CTROptimizer::CTROptimizer(const std::vector<at::Tensor>& params, const CTROptions& defaults)
    : CTROptimizer({torch::optim::OptimizerParamGroup(params)}, defaults) {}

CTROptimizer::CTROptimizer(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                           const CTROptions& defaults)
    : Optimizer(std::vector<torch::optim::OptimizerParamGroup>{},
                std::make_unique<CTROptions>(defaults)) {
  CTRLORA_CHECK(defaults.total_steps() >= 0, kWhere, "total_steps = ", defaults.total_steps(),
                ". Violated constraint: total_steps >= 0.");
  Options options = defaults.engine();
  options.fallback_lr = defaults.fallback_lr();
  engine_ = std::make_unique<Engine>(options);
  for (const auto& group : groups) {
    add_param_group(group);
  }
  if (pairs_.empty()) {
    TORCH_WARN("[", kWhere, "] found no LoRA pair among its parameters and trains all of them by ",
               "AdamW. Remedy: build the model with ctrlora::LoRALinear, or call ",
               "ctrlora::register_pair() before the optimizer is built.");
  }
  if (defaults.rank_budget() != 0.0) {
    schedule_ranks(defaults);
  }
}

void CTROptimizer::schedule_ranks(const CTROptions& defaults) {
  CTRLORA_CHECK(defaults.total_steps() > 0, kWhere,
                "expected total_steps with rank_budget: the schedule is in shares of the run. ",
                "Remedy: CTROptions().total_steps(...).");
  std::vector<RankLayer> layers;
  layers.reserve(pairs_.size());
  for (const LoraPair& pair : pairs_) {
    layers.push_back({pair.name, pair.out_features(), pair.in_features(), pair.rank()});
  }
  RankOptions ranks;
  ranks.schedule.total_steps = defaults.total_steps();
  ranks.budget = budget_from_fraction(layers, defaults.rank_budget(), ranks.rules);
  engine_->schedule_ranks(ranks);
}

void CTROptimizer::add_param_group(const torch::optim::OptimizerParamGroup& group) {
  const auto& defaults = static_cast<const CTROptions&>(*defaults_);
  CTROptions options = defaults;
  if (group.has_options()) {
    const auto* own = dynamic_cast<const CTROptions*>(&group.options());
    CTRLORA_CHECK(own != nullptr, kWhere, "expected a group with CTROptions; got another ",
                  "optimizer's. Remedy: std::make_unique<ctrlora::CTROptions>(...).");
    options = own->completed(defaults);
  }
  options.first_lr_ = options.lr();
  (void)options.settings();
  (void)options.as_fallback().settings();
  check_members(group.params());
  std::vector<LoraPair> pairs = pairs_among(group.params());
  std::set<std::string> taken;
  for (const LoraPair& pair : pairs_) {
    taken.insert(pair.name);
  }
  std::vector<at::Tensor> halves, rest;
  for (LoraPair& pair : pairs) {
    pair.name = name_of(pair, taken.size(), taken);
    taken.insert(pair.name);
    halves.insert(halves.end(), {pair.a, pair.b});
  }
  for (const at::Tensor& param : group.params()) {
    if (!contains(halves, param)) {
      rest.push_back(param);
    }
  }
  if (!pairs.empty()) {
    engine_->add_pairs(pairs, static_cast<int64_t>(param_groups_.size()));
    add_part(halves, options);
    pairs_.insert(pairs_.end(), pairs.begin(), pairs.end());
  }
  if (!rest.empty()) {
    for (const at::Tensor& param : rest) {
      frozen_.push_back({static_cast<int64_t>(param_groups_.size()), param});
    }
    add_part(rest, options.as_fallback());
    adopt_thawed();
  }
}

void CTROptimizer::add_part(const std::vector<at::Tensor>& params, const CTROptions& options) {
  param_groups_.emplace_back(params, std::make_unique<CTROptions>(options));
}

void CTROptimizer::check_members(const std::vector<at::Tensor>& params) const {
  CTRLORA_CHECK(!params.empty(), kWhere, "expected at least one parameter; got none. Remedy: pass ",
                "model->parameters().");
  std::set<const c10::TensorImpl*> known;
  for (const auto& group : param_groups_) {
    for (const at::Tensor& param : group.params()) {
      known.insert(param.unsafeGetTensorImpl());
    }
  }
  for (const at::Tensor& param : params) {
    CTRLORA_CHECK(param.defined() && param.layout() == at::kStrided &&
                      at::isFloatingType(param.scalar_type()) && param.is_leaf(),
                  kWhere, "expected dense real floating-point leaf tensors; got ",
                  param.defined() ? c10::str(param.sizes(), " ", param.scalar_type()) : "none",
                  ". Remedy: leave it out of the parameters.");
    CTRLORA_CHECK(known.insert(param.unsafeGetTensorImpl()).second, kWhere,
                  "expected each parameter once; got one of shape ", param.sizes(),
                  " twice. Remedy: leave it out.");
  }
}

std::vector<LoraPair> CTROptimizer::pairs_among(const std::vector<at::Tensor>& params) const {
  std::vector<LoraPair> out;
  std::set<const c10::TensorImpl*> done;
  for (const at::Tensor& param : params) {
    const std::optional<LoraPair> pair = find_pair(param);
    if (!pair.has_value() || done.count(param.unsafeGetTensorImpl()) > 0 ||
        pair->a.requires_grad() != pair->b.requires_grad()) {
      continue;
    }
    CTRLORA_CHECK(contains(params, pair->a) && contains(params, pair->b), kWhere,
                  "expected both halves of pair '", pair->name, "' in one parameter group: a ",
                  pair->a.sizes(), " and b ", pair->b.sizes(), "; got only ", param.sizes(),
                  ". Remedy: pass both in the same group.");
    done.insert({pair->a.unsafeGetTensorImpl(), pair->b.unsafeGetTensorImpl()});
    out.push_back(*pair);
  }
  return out;
}

void CTROptimizer::adopt_thawed() {
  std::map<int64_t, std::vector<at::Tensor>> thawed;
  std::erase_if(frozen_, [&](const Frozen& member) {
    const bool trains = member.param.requires_grad();
    if (trains) {
      thawed[member.group].push_back(member.param);
    }
    return trains;
  });
  for (const auto& [group, params] : thawed) {
    engine_->add_fallback(params, group);
  }
}

std::vector<at::Tensor> CTROptimizer::all_params() const {
  std::vector<at::Tensor> out;
  for (const auto& group : param_groups_) {
    out.insert(out.end(), group.params().begin(), group.params().end());
  }
  return out;
}

std::unique_ptr<detail::RandomState> CTROptimizer::check_due() const {
  return engine_->ratio_due() ? std::make_unique<detail::RandomState>(all_params()) : nullptr;
}

// The loss with those random numbers; leaves no trace in gradients, generators and observations.
at::Tensor CTROptimizer::evaluate(const LossClosure& loss,
                                  const detail::RandomState& random,
                                  bool with_gradients) {
  const std::vector<at::Tensor> params = all_params();
  std::vector<at::Tensor> grads;
  grads.reserve(params.size());
  for (const at::Tensor& param : params) {
    grads.push_back(
        std::exchange(param.mutable_grad(), at::Tensor()));  // the closure writes its own
  }
  const detail::RandomState now(params);
  random.set();
  engine_->observe(false);
  const at::AutoGradMode mode(with_gradients);
  const at::Tensor value = loss().detach();
  engine_->observe(true);
  now.set();
  for (size_t i = 0; i < params.size(); ++i) {
    params[i].mutable_grad() = grads[i];
  }
  return value;
}

void CTROptimizer::advance(const at::Tensor& before,
                           const LossClosure& again,
                           const detail::RandomState* random,
                           bool with_gradients) {
  const at::NoGradGuard no_gradients;
  adopt_thawed();
  std::vector<GroupSettings> settings;
  for (size_t i = 0; i < param_groups_.size(); ++i) {
    CTROptions& options = options_of(i);
    options.first_lr_ = options.first_lr_ == 0.0 ? options.lr() : options.first_lr_;
    settings.push_back(options.settings());
  }
  if (random != nullptr) {
    engine_->begin_trial();
  }
  engine_->step(settings);
  if (random != nullptr) {
    check_step(before, evaluate(again, *random, with_gradients));
  }
}

at::Tensor CTROptimizer::step(LossClosure closure) {
  const std::unique_ptr<detail::RandomState> random = closure ? check_due() : nullptr;
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode with_gradients(true);
    loss = closure();
  }
  advance(loss, closure, random.get(), /*with_gradients=*/true);
  return loss;
}

void CTROptimizer::step_with_loss(const LossClosure& loss) {
  CTRLORA_CHECK(loss != nullptr, "ctrlora::CTROptimizer::step_with_loss",
                "expected a function that evaluates the loss; got none. Remedy: step().");
  const std::unique_ptr<detail::RandomState> random = check_due();
  const at::Tensor before =
      random == nullptr ? at::Tensor() : evaluate(loss, *random, /*with_gradients=*/false);
  advance(before, loss, random.get(), /*with_gradients=*/false);
}

void CTROptimizer::zero_grad(bool set_to_none) {
  Optimizer::zero_grad(set_to_none);
  engine_->drop_observations();
}

CTROptions& CTROptimizer::options_of(size_t group) {
  return static_cast<CTROptions&>(param_groups_[group].options());
}

const CTROptions& CTROptimizer::options_of(size_t group) const {
  return static_cast<const CTROptions&>(param_groups_[group].options());
}

std::map<std::string, int64_t> CTROptimizer::ranks() const {
  std::map<std::string, int64_t> out = engine_->ranks();
  for (const LoraPair& pair : pairs_) {
    out.emplace(pair.name, pair.rank());  // those that AdamW trains
  }
  return out;
}

// Keys of an archive may hold no dots, names of layers do: tensors are numbered, names a list.
void CTROptimizer::save(torch::serialize::OutputArchive& archive) const {
  archive.write("ctrlora_version", c10::IValue(kArchiveVersion));
  const c10::List<std::string> names;
  for (const auto& [name, tensor] : engine_->named_tensors()) {
    archive.write("tensors/" + std::to_string(names.size()), tensor, /*is_buffer=*/true);
    names.push_back(name);
  }
  archive.write("names", c10::IValue(names));
  archive.write("groups/size", c10::IValue(static_cast<int64_t>(param_groups_.size())));
  for (size_t i = 0; i < param_groups_.size(); ++i) {
    const CTROptions& own = options_of(i);
    const auto [beta1, beta2] = own.fallback_betas();
    const c10::List<double> numbers{own.is_fallback() ? 1.0 : 0.0,
                                    static_cast<double>(param_groups_[i].params().size()),
                                    own.lr(),
                                    own.first_lr_,
                                    own.weight_decay(),
                                    beta1,
                                    beta2,
                                    own.fallback_eps()};
    archive.write("groups/" + std::to_string(i), c10::IValue(numbers));
  }
}

void CTROptimizer::load(torch::serialize::InputArchive& archive) {
  const int64_t version = read(archive, "ctrlora_version").toInt();
  CTRLORA_CHECK(version == kArchiveVersion, kWhere, "expected an archive of version ",
                kArchiveVersion, "; got ", version,
                ". Remedy: load it with the release that wrote it.");
  const int64_t saved_groups = read(archive, "groups/size").toInt();
  CTRLORA_CHECK(saved_groups == static_cast<int64_t>(param_groups_.size()), kWhere, "expected ",
                param_groups_.size(), " saved groups; got ", saved_groups,
                ". Remedy: build the optimizer as when the state was saved.");
  std::vector<std::vector<double>> groups;
  for (size_t i = 0; i < param_groups_.size(); ++i) {
    groups.push_back(read(archive, "groups/" + std::to_string(i)).toDoubleVector());
    CTRLORA_CHECK((groups[i][0] == 1.0) == options_of(i).is_fallback() &&
                      groups[i][1] == static_cast<double>(param_groups_[i].params().size()),
                  kWhere, "expected saved group ", i, " with ", param_groups_[i].params().size(),
                  options_of(i).is_fallback() ? " fallback" : " pair", " parameters; got ",
                  groups[i][1], ". Remedy: build the optimizer as when the state was saved.");
  }
  std::map<std::string, at::Tensor> tensors;
  const auto names = read(archive, "names").toList();
  for (size_t i = 0; i < names.size(); ++i) {
    const std::string name = names.get(i).toStringRef();
    archive.read("tensors/" + std::to_string(i), tensors[name], /*is_buffer=*/true);
  }
  adopt_thawed();
  engine_->load(tensors);
  for (size_t i = 0; i < param_groups_.size(); ++i) {
    const std::vector<double>& saved = groups[i];
    CTROptions& own = options_of(i);
    own.first_lr_ = saved[3];
    own.lr(saved[2]).weight_decay(saved[4]).fallback_betas({saved[5], saved[6]});
    own.fallback_eps(saved[7]);
  }
}

void save_atomically(torch::serialize::OutputArchive& archive, const std::string& path) {
  detail::NewFile file(path + ".tmp" + std::to_string(::getpid()));
  archive.save_to([&](const void* from, size_t count) {
    file.write(static_cast<const char*>(from), count);
    return count;
  });
  file.become(path);
  TORCH_CHECK(file.reason().empty(), "[ctrlora::save_atomically] expected to write '", path,
              "'; got: ", file.reason(),
              ". Remedy: free space or another folder; what was there is as it was.");
}

}  // namespace ctrlora
