// CTROptimizer: the engine behind torch's interface, groups, closures, archives.
#include "ctrlora/ctr_optimizer.h"

#include <torch/optim/schedulers/step_lr.h>
#include <torch/serialize.h>

#include <sstream>

#include "ctrlora/lora_module.h"
#include "engine_model.h"

namespace {

using ctrlora::CTROptimizer;
using ctrlora::CTROptions;
using ctrlora::GroupSettings;
using ctrlora::LoRALinear;
using problems::contains;
using problems::error_of;
using problems::randn;
using problems::same_bits;
using problems::Warnings;
using torch::optim::OptimizerParamGroup;

// Two adapted layers and a head that is trained as it is; float64.
struct Net {
  torch::nn::Linear head{4, 2};
  LoRALinear first, second;
  at::Tensor x, y;

  explicit Net(uint64_t seed = 0) : first(nullptr), second(nullptr) {
    at::manual_seed(seed);
    const auto layer = [](int64_t n, int64_t m, const char* name) {
      torch::nn::Linear base(n, m);
      base->to(at::kDouble);
      LoRALinear made(base, 2, 4.0, name);
      made->lora_b.detach().copy_(randn({m, 2}) * 0.3);
      return made;
    };
    first = layer(5, 6, "first");
    second = layer(6, 4, "second");
    head = torch::nn::Linear(4, 2);
    head->to(at::kDouble);
    x = randn({12, 5});
    y = randn({12, 2});
  }
  at::Tensor loss() {
    return (head->forward(second->forward(first->forward(x).tanh()).tanh()) - y).square().mean();
  }
  [[nodiscard]] std::vector<at::Tensor> parameters() const {
    std::vector<at::Tensor> out = first->parameters();
    for (const auto& more : {second->parameters(), head->parameters()}) {
      out.insert(out.end(), more.begin(), more.end());
    }
    return out;
  }
  double train(CTROptimizer& opt, int steps) {
    at::Tensor value = at::zeros({}, at::kDouble);
    for (int i = 0; i < steps; ++i) {
      opt.zero_grad();
      value = loss();
      value.backward();
      opt.step();
    }
    return value.item<double>();
  }
};

bool same_parameters(const Net& left, const Net& right) {
  const auto x = left.parameters(), y = right.parameters();
  return std::equal(x.begin(), x.end(), y.begin(), [](const auto& own, const auto& other) {
    return same_bits(own.detach(), other.detach());
  });
}

void copy_parameters(const Net& from, Net& to) {
  const auto x = from.parameters(), y = to.parameters();
  for (size_t i = 0; i < x.size(); ++i) {
    y[i].detach().copy_(x[i].detach());
  }
}

std::string saved(const CTROptimizer& opt) {
  std::ostringstream stream;
  torch::save(opt, stream);
  return stream.str();
}

void load(CTROptimizer& opt, const std::string& bytes) {
  std::istringstream stream(bytes);
  torch::load(opt, stream);
}

const CTROptions& options_of(const CTROptimizer& opt, size_t group) {
  return dynamic_cast<const CTROptions&>(opt.param_groups()[group].options());
}

}  // namespace

TEST_CASE("steps are the engine's, bit for bit; a group is split in pairs and the rest") {
  Net own, other;
  CTROptimizer opt(own.parameters(), CTROptions(0.2).fallback_lr(0.01).total_steps(40));
  CHECK(opt.param_groups().size() == 2);
  CHECK(opt.param_groups()[0].params().size() == 4);
  CHECK(opt.param_groups()[1].params().size() == 6);  // two frozen bases and the head
  CHECK(options_of(opt, 0).total_steps() == 40);
  CHECK(opt.ranks() == std::map<std::string, int64_t>{{"first", 2}, {"second", 2}});
  const double first = own.loss().item<double>();
  const double last = own.train(opt, 12);
  CHECK(last < 0.7 * first);

  ctrlora::Options options;
  options.fallback_lr = 0.01;
  ctrlora::Engine engine(options);
  engine.add_pairs(
      {*ctrlora::find_pair(other.first->lora_a), *ctrlora::find_pair(other.second->lora_a)}, 0);
  engine.add_fallback({other.head->weight, other.head->bias}, 1);
  for (int i = 0; i < 12; ++i) {
    for (const at::Tensor& p : other.parameters()) {
      p.mutable_grad().reset();
    }
    other.loss().backward();
    engine.step({{.lr = 0.2, .initial_lr = 0.2}, {.lr = 0.01, .initial_lr = 0.01}});
  }
  CHECK(same_parameters(own, other));
  CHECK(opt.metrics().at("steps") == 12.0);
}

TEST_CASE("a group keeps what it sets and inherits the rest") {
  Net net;
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(net.first->parameters(),
                      std::make_unique<CTROptions>(CTROptions().weight_decay(0.3)));
  groups.emplace_back(net.second->parameters());
  CTROptimizer opt(groups, CTROptions(0.05).weight_decay(0.1).fallback_lr(2e-3));
  CHECK(options_of(opt, 0).lr() == 0.05);  // torch's own merging would give 0.1 weight decay
  CHECK(options_of(opt, 0).weight_decay() == 0.3);
  CHECK(options_of(opt, 1).is_fallback());  // the frozen base
  CHECK(options_of(opt, 2).weight_decay() == 0.1);
  opt.add_param_group(OptimizerParamGroup(
      net.head->parameters(), std::make_unique<CTROptions>(CTROptions().fallback_lr(0.5))));
  CHECK(options_of(opt, 4).lr() == 0.5);
  const at::Tensor before = net.head->weight.detach().clone();
  net.train(opt, 1);
  CHECK_FALSE(same_bits(net.head->weight.detach(), before));
}

TEST_CASE("torch's schedulers drive both kinds of groups") {
  Net net;
  CTROptimizer opt(net.parameters(), CTROptions(0.1).fallback_lr(1e-3));
  torch::optim::StepLR schedule(opt, 2, 0.5);
  for (int i = 0; i < 5; ++i) {  // torch's StepLR halves at its third and fifth call
    net.train(opt, 1);
    schedule.step();
  }
  CHECK(options_of(opt, 0).lr() == doctest::Approx(0.025));
  CHECK(options_of(opt, 1).lr() == doctest::Approx(0.25e-3));
  net.train(opt, 1);
  CHECK(opt.metrics().at("kl_radius") == doctest::Approx(0.005 / 16));
}

TEST_CASE("a closure runs once, with gradients; its loss comes back") {
  Net own, other;
  CTROptimizer opt(own.parameters()), plain(other.parameters());
  int calls = 0;
  const at::NoGradGuard no_gradients;
  const at::Tensor loss = opt.step([&] {
    ++calls;
    CHECK(at::GradMode::is_enabled());
    opt.zero_grad();
    const at::Tensor value = own.loss();
    value.backward();
    return value;
  });
  CHECK(calls == 1);
  {
    const at::AutoGradMode with_gradients(true);
    CHECK(loss.item<double>() == other.train(plain, 1));
  }
  CHECK(same_parameters(own, other));
  CHECK_FALSE(plain.step().defined());
}

TEST_CASE("a checked step runs the closure twice on the same random numbers, without a trace") {
  std::vector<at::Tensor> noise, grads;
  for (const int64_t every : {0, 2}) {
    Net net;
    ctrlora::Options engine;
    engine.ratio_every = every;
    CTROptimizer opt(net.parameters(), CTROptions(1e-3).engine(engine));
    std::vector<at::Tensor> seen;
    const auto closure = [&] {
      seen.push_back(at::rand({3}));
      opt.zero_grad();
      at::Tensor loss = net.loss();
      loss.backward();
      return loss;
    };
    opt.step(closure);
    opt.step(closure);
    REQUIRE(seen.size() == (every == 0 ? 2 : 3));
    CHECK(same_bits(seen[1], seen.back()));
    CHECK_FALSE(same_bits(seen[0], seen[1]));
    noise.push_back(at::rand({3}));
    grads.push_back(net.first->lora_b.grad().clone());
    CHECK(opt.metrics().count("ratio") == (every == 0 ? 0 : 1));
  }
  CHECK(same_bits(noise[0], noise[1]));
  CHECK(same_bits(grads[0], grads[1]));
}

TEST_CASE("a loss is evaluated before and after a checked step, without gradients or a trace") {
  std::vector<at::Tensor> noise, grads;
  std::vector<double> ratios;
  for (const bool by_closure : {false, true}) {
    Net net;
    ctrlora::Options engine;
    engine.ratio_every = 2;
    CTROptimizer opt(net.parameters(), CTROptions(1e-3).engine(engine));
    std::vector<at::Tensor> seen;
    std::vector<double> values;
    const auto loss = [&] {
      CHECK(at::GradMode::is_enabled() == false);
      seen.push_back(at::rand({3}));
      values.push_back(net.loss().item<double>());
      return net.loss();
    };
    for (int step = 0; step < 2; ++step) {
      const auto closure = [&] {
        opt.zero_grad();
        at::Tensor value = net.loss();
        value.backward();
        return value;
      };
      if (by_closure) {
        opt.step(closure);
      } else {
        closure();
        opt.step_with_loss(loss);
      }
    }
    if (!by_closure) {
      REQUIRE(seen.size() == 2);
      CHECK(same_bits(seen[0], seen[1]));
      CHECK(values[1] < values[0]);
    }
    noise.push_back(at::rand({3}));
    grads.push_back(net.first->lora_b.grad().clone());
    ratios.push_back(opt.metrics().at("ratio"));
  }
  CHECK(ratios[0] == ratios[1]);
  CHECK(same_bits(noise[0], noise[1]));
  CHECK(same_bits(grads[0], grads[1]));
  Net net;
  CTROptimizer opt(net.parameters(), CTROptions(1e-3));
  CHECK(contains(error_of([&] { opt.step_with_loss(nullptr); }),
                 "[ctrlora::CTROptimizer::step_with_loss] expected a function that evaluates the "
                 "loss; got none."));
}

TEST_CASE("a rank budget holds from the first step on") {
  Net own;
  CTROptimizer opt(own.parameters(), CTROptions(0.1).total_steps(40).rank_budget(0.5));
  CHECK(opt.ranks() == std::map<std::string, int64_t>{{"first", 2}, {"second", 2}});
  own.train(opt, 1);
  CHECK(opt.ranks() == std::map<std::string, int64_t>{{"first", 1}, {"second", 1}});
  const double first = own.loss().item<double>();
  CHECK(own.train(opt, 12) < first);
  CHECK(opt.ranks() == std::map<std::string, int64_t>{{"first", 1}, {"second", 1}});
}

TEST_CASE("zero_grad takes the rows of a backward that leads to no step along") {
  Net own, other;
  CTROptimizer opt(own.parameters()), plain(other.parameters());
  const at::Tensor x = own.x;
  own.x = randn({12, 5}) * 3;
  own.loss().backward();  // a loss spike: skipped
  own.x = x;
  own.train(opt, 3);
  other.train(plain, 3);
  CHECK(same_parameters(own, other));
}

TEST_CASE("frozen parameters wait until they thaw") {
  Net net;
  CTROptimizer opt(net.parameters());
  const at::Tensor before = net.first->base->bias.detach().clone();
  net.train(opt, 1);
  CHECK(same_bits(net.first->base->bias.detach(), before));
  net.first->base->bias.requires_grad_(true);
  net.train(opt, 1);
  net.first->base->bias.mutable_grad() = at::ones_like(before);
  opt.step();
  CHECK_FALSE(same_bits(net.first->base->bias.detach(), before));
}

TEST_CASE("a saved and loaded run goes on bit for bit") {
  ctrlora::Options options;
  options.sample_rows = 5;
  for (const int steps : {0, 1, 7}) {
    Net whole, half(3);
    CTROptimizer through(whole.parameters(), CTROptions(0.2).engine(options).weight_decay(0.1));
    whole.train(through, steps);
    dynamic_cast<CTROptions&>(through.param_groups()[0].options()).lr(0.07);
    CTROptimizer resumed(half.parameters(), CTROptions(0.1).engine(options));
    half.train(resumed, 2);  // had a life of its own
    half.x = whole.x;
    half.y = whole.y;
    copy_parameters(whole, half);
    load(resumed, saved(through));
    CHECK(options_of(resumed, 0).lr() == 0.07);
    CHECK(options_of(resumed, 0).weight_decay() == 0.1);
    CHECK(whole.train(through, 6) == half.train(resumed, 6));
    CHECK(same_parameters(whole, half));
  }
}

TEST_CASE("what does not fit is refused, before any change") {
  Net net, more(1);
  CTROptimizer opt(net.parameters());
  net.train(opt, 2);
  const std::string before = saved(opt);
  const auto refused = [&](CTROptimizer& own, const std::string& bytes) {
    return error_of([&] { load(own, bytes); });
  };
  CTROptimizer pairs_only({more.first->lora_a, more.first->lora_b});
  CHECK(contains(refused(pairs_only, before), "expected 1 saved groups; got 2. Remedy: build"));
  CTROptimizer swapped({more.second->lora_a, more.second->lora_b, more.head->weight});
  CHECK(contains(refused(swapped, before), "expected saved group 0 with 2 pair parameters; got 4"));
  std::ostringstream foreign;
  torch::save(at::ones({2}), foreign);
  CHECK(contains(refused(opt, foreign.str()), "expected an archive that save() wrote; got one"));
  Net wide(2);
  ctrlora::Options options;
  options.sketch_rank = 2;
  CTROptimizer other(wide.parameters(), CTROptions().engine(options));
  wide.train(other, 1);
  CHECK(contains(refused(opt, saved(other)), "another set of layers or other options:"));
  CHECK(opt.metrics().at("steps") == 2.0);
}

TEST_CASE("parameters and numbers that cannot be trained") {
  Net net;
  const at::Tensor& w = net.head->weight;
  const auto message = [](const std::vector<at::Tensor>& params, const CTROptions& options = {}) {
    return error_of([&] { CTROptimizer(params, options); });
  };
  CHECK(contains(message({}), "[ctrlora::CTROptimizer] expected at least one parameter; got none"));
  CHECK(contains(message({w, w}), "expected each parameter once; got one of shape [2, 4] twice"));
  CHECK(
      contains(message({at::ones({2}, at::kLong)}), "real floating-point leaf tensors; got [2] L"));
  CHECK(contains(message({net.first->lora_b}),
                 "both halves of pair 'first' in one parameter group: a [2, 5] and b [6, 2]; got "
                 "only [6, 2]. Remedy"));
  CHECK(contains(message(net.parameters(), CTROptions(-0.1)), "lr = -0.1. Violated constraint"));
  CHECK(contains(message(net.parameters(), CTROptions().fallback_lr(-1)), "lr = -1. Violated"));
  CHECK(contains(message(net.parameters(), CTROptions().total_steps(-1)), "total_steps = -1."));
  CHECK(contains(message(net.parameters(), CTROptions().rank_budget(0.5)),
                 "expected total_steps with rank_budget"));
  CHECK(contains(message(net.parameters(), CTROptions().total_steps(9).rank_budget(1.5)),
                 "rank_budget = 1.5. Violated constraint: a fraction in (0, 1]"));
  Warnings warnings;
  CTROptimizer plain({w.detach().clone().requires_grad_()});
  CHECK(contains(warnings.text, "found no LoRA pair among its parameters and trains all of them"));
}
