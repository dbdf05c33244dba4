#include "ctrlora/engine.h"

#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine_model.h"

namespace {

using ctrlora::Engine;
using ctrlora::GroupSettings;
using ctrlora::LoraPair;
using ctrlora::Options;
using problems::adamw;
using problems::contains;
using problems::copy_of;
using problems::error;
using problems::error_of;
using problems::Model;
using problems::randn;
using problems::same;
using problems::same_bits;
using problems::State;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kIn = Model::kIn, kOut = Model::kOut, kRank = Model::kRank;

std::atomic<int64_t> operator_calls{0};

/// Operator calls of one step with `layers` equal layers. The seed draws no loss spike in any
/// layer: forgetting its momentum takes some 20 calls more, however many layers have one.
int64_t calls_of_step(int64_t layers, const Options& options, bool observed) {
  at::manual_seed(1);
  Model own(layers, options);
  int64_t calls = 0;
  for (int step = 0; step < 3; ++step) {
    observed ? own.backward() : own.random_gradients();
    const at::CallbackHandle handle =
        at::addGlobalCallback(at::RecordFunctionCallback([](const at::RecordFunction&) {
                                ++operator_calls;
                                return std::unique_ptr<at::ObserverContext>();
                              }).scopes({at::RecordScope::FUNCTION}));
    operator_calls = 0;
    own.engine.step({GroupSettings{}});
    calls = operator_calls;
    at::removeCallback(handle);
  }
  return calls;
}

}  // namespace

TEST_CASE("a layer with a bad gradient is left out and counted; the others do not notice") {
  std::vector<std::vector<at::Tensor>> ends;
  for (const bool bad : {true, false}) {
    at::manual_seed(1);
    Model own(3);
    for (int step = 0; step < 4; ++step) {
      own.backward();
      const std::vector<at::Tensor> before = own.parameters();
      if (step == 2 && bad) {
        own.pairs[1].b.mutable_grad().select(0, 2).select(0, 1).fill_(step == 2 ? kNan : 0.0);
      } else if (step == 2) {
        own.pairs[1].a.mutable_grad().reset();
        own.pairs[1].b.mutable_grad().reset();
      }
      const at::Tensor momentum = own.state("group0.momentum_a")[1].clone();
      own.engine.step({GroupSettings{}});
      CHECK(same_bits(own.pairs[1].a.detach(), before[2]) == (step == 2));
      CHECK(same_bits(own.pairs[1].b.detach(), before[3]) == (step == 2));
      CHECK(same_bits(own.state("group0.momentum_a")[1], momentum) == (step == 2));
      CHECK_FALSE(same_bits(own.pairs[0].b.detach(), before[1]));
    }
    CHECK(own.engine.metrics().at("skipped") == (bad ? 1.0 : 0.0));
    ends.push_back(own.parameters());
  }
  for (size_t i = 0; i < ends[0].size(); ++i) {
    CHECK(same_bits(ends[0][i], ends[1][i]));
    CHECK(ends[0][i].isfinite().all().item<bool>());
  }
}

TEST_CASE("a group whose lr is 0 stays as it is, bit for bit, and its rows are dropped") {
  at::manual_seed(2);
  Model own(2);
  const LoraPair other = problems::make_pair(kOut, kIn, kRank);
  const at::Tensor head = randn({3}).requires_grad_();
  own.engine.add_pairs({other}, 1);
  own.engine.add_fallback({head}, 0);
  const auto step = [&](double lr, double other_lr) {
    own.backward();
    other.a.mutable_grad() = randn({kRank, kIn});
    other.b.mutable_grad() = randn({kOut, kRank});
    head.mutable_grad() = randn({3});
    own.engine.step({GroupSettings{.lr = lr, .weight_decay = 0.1}, GroupSettings{.lr = other_lr}});
  };
  step(0.0, 0.0);
  CHECK(own.engine.steps() == 0);
  step(0.1, 0.1);
  CHECK(own.engine.steps() == 1);
  const State before = copy_of(own.engine);
  const std::vector<at::Tensor> parameters = own.parameters();
  const at::Tensor head_before = head.detach().clone(), other_before = other.b.detach().clone();
  step(0.0, 0.0);
  CHECK(own.engine.steps() == 1);
  CHECK(same(copy_of(own.engine), before));
  step(0.0, 0.1);  // the other group goes on alone
  CHECK(own.engine.steps() == 2);
  CHECK(own.state("group0.age").item<int64_t>() == 1);
  CHECK(own.state("group1.age").item<int64_t>() == 2);
  CHECK_FALSE(same_bits(other.b.detach(), other_before));
  CHECK(same_bits(head.detach(), head_before));
  for (size_t i = 0; i < parameters.size(); ++i) {
    CHECK(same_bits(own.parameters()[i], parameters[i]));
  }
  for (const auto& [name, tensor] : before) {
    CHECK((name.rfind("group0.", 0) != 0 || same_bits(own.state(name), tensor)));
  }
}

TEST_CASE("rows gathered for a step with lr 0 never enter the factors") {
  at::manual_seed(3);
  Model own(1);
  own.backward();
  own.engine.step({GroupSettings{.lr = 0.0}});
  own.random_gradients();
  const at::Tensor x = randn({30, kIn});
  own.slots[0]->capture(x, {})->complete(randn({30, kOut}));
  own.engine.step({GroupSettings{}});
  CHECK(error(own.state("group0.input.trace"), x.square().sum().view({1}) / 30) < 1e-13);
}

TEST_CASE("other parameters are trained by AdamW; a bad gradient skips the step of the list") {
  at::manual_seed(6);
  Engine engine{Options{}};
  const at::Tensor p = randn({4, 3}).requires_grad_(), still = randn({2}).requires_grad_();
  engine.add_fallback({p, still}, 1);
  at::Tensor truth = p.detach().clone(), m = at::zeros_like(truth), v = at::zeros_like(truth);
  const at::Tensor before = still.detach().clone();
  const GroupSettings own{
      .lr = 0.01, .weight_decay = 0.2, .beta1 = 0.85, .beta2 = 0.99, .eps = 1e-6};
  for (int t = 1; t <= 5; ++t) {
    p.mutable_grad() = at::full_like(p, kNan);
    engine.step({GroupSettings{}, own});
    p.mutable_grad() = randn({4, 3});
    engine.step({GroupSettings{}, own});
    adamw(truth, m, v, p.grad(), t, own);
    CHECK(error(p.detach(), truth) < 1e-14);
  }
  CHECK(same_bits(still.detach(), before));
  CHECK(engine.metrics().at("skipped") == 5.0);
}

TEST_CASE("the number of operator calls does not grow with the number of layers") {
  Options options;
  options.step_length = "radius";  // outside the ball in some layer, however many there are
  // On the step that counts nothing is due; everything; all but raw directions, in thirds.
  for (const auto& [every, warmup] : {std::pair{1000, 0}, {1, 100}, {1, 2}}) {
    options.factor_every = every;
    options.factor_warmup_steps = warmup;
    for (const bool observed : {false, true}) {
      const int64_t calls = calls_of_step(6, options, observed);
      CHECK(calls > 50);  // the count counts
      CHECK(calls == calls_of_step(30, options, observed));
    }
  }
}

TEST_CASE("a step of a 4096 x 4096 layer allocates nothing of its size") {
  constexpr int64_t kSize = 4096;
  Engine engine{Options{}};
  const LoraPair pair = problems::make_pair(kSize, kSize, 16, true, at::kFloat);
  const auto slot = ctrlora::register_pair(pair);
  const at::Tensor x = at::randn({64, kSize}), g = at::randn({64, kSize});
  pair.a.mutable_grad() = at::randn({16, kSize});
  pair.b.mutable_grad() = at::randn({kSize, 16});
  const at::Tensor before = pair.b.detach().clone();
  const problems::LargestAllocation largest;
  engine.add_pairs({pair}, 0);
  for (int step = 0; step < 2; ++step) {
    slot->capture(x, x)->complete(g);
    engine.step({GroupSettings{}});
  }
  CHECK(slot->observations() == 2);
  CHECK_FALSE(same_bits(pair.b.detach(), before));
  CHECK(largest.bytes() >= 16 * kSize * 4);
  CHECK(largest.bytes() <= kSize * kSize * 4 / 16);
}

TEST_CASE("parameters without gradients stand still, uncounted, without decay") {
  at::manual_seed(7);
  Model own(3);
  const std::vector<at::Tensor> before = own.parameters();
  own.engine.step({GroupSettings{.weight_decay = 0.5}});  // no backward ever came
  own.random_gradients();
  own.pairs[2].a.mutable_grad().reset();  // half a pair has no tangent step
  own.engine.step({GroupSettings{.weight_decay = 0.5}});
  const std::vector<at::Tensor> after = own.parameters();
  CHECK(same_bits(after[4], before[4]));
  CHECK(same_bits(after[5], before[5]));
  CHECK_FALSE(same_bits(after[0], before[0]));
  CHECK(own.engine.metrics().at("skipped") == 0.0);
  CHECK(own.engine.steps() == 2);

  Model zero(2);
  for (const LoraPair& pair : zero.pairs) {
    pair.a.mutable_grad() = at::zeros_like(pair.a);
    pair.b.mutable_grad() = at::zeros_like(pair.b);
  }
  const std::vector<at::Tensor> start = zero.parameters();
  zero.engine.step({GroupSettings{}});  // balances the gauge, no more
  const std::vector<at::Tensor> end = zero.parameters();
  CHECK(error(at::matmul(end[1], end[0]), at::matmul(start[1], start[0])) < 1e-13);
  CHECK(zero.engine.metrics().at("misses") == 0.0);
}

TEST_CASE("from B = 0 a step of length radius changes the output by lr |W0|, exactly") {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    at::manual_seed(8);
    Options options;
    options.step_length = "radius";
    Model own(2, options, /*trained=*/false, dtype);
    own.random_gradients();
    for (const LoraPair& pair : own.pairs) {
      pair.a.mutable_grad().zero_();  // it is B's multiple
    }
    own.engine.step({GroupSettings{.lr = 0.2}});
    for (size_t l = 0; l < 2; ++l) {  // the factors are I: |D|_Omega is Frobenius' norm
      const at::Tensor b = own.pairs[l].b.detach().to(at::kDouble);
      const at::Tensor a = own.pairs[l].a.detach().to(at::kDouble);
      const double change = 1.5 * at::matmul(b, a).norm().item<double>();
      const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-5 : 1e-2;
      CHECK(change == doctest::Approx(0.2 * std::sqrt(double{kOut})).epsilon(tolerance));
    }
    CHECK(own.engine.metrics().at("output_change_max") == doctest::Approx(0.2).epsilon(1e-2));
  }
}

TEST_CASE("the Fisher ball bounds the predicted KL of all layers together") {
  for (const double radius : {std::numeric_limits<double>::infinity(), 1e-3}) {
    at::manual_seed(9);
    Options options;
    options.kl_radius = radius;
    Model own(3, options);
    own.backward();
    const std::vector<at::Tensor> before = own.parameters();
    own.engine.step({GroupSettings{.lr = 0.05, .initial_lr = 0.1}});
    const auto factor = [&](const std::string& side, size_t l) {  // complete bases
      const at::Tensor u = own.state("group0." + side + ".basis")[static_cast<int64_t>(l)];
      const at::Tensor e = own.state("group0." + side + ".eigenvalues")[static_cast<int64_t>(l)];
      return at::matmul(u * e, u.t());
    };
    double kl = 0.0, largest = 0.0;
    for (size_t l = 0; l < 3; ++l) {
      const at::Tensor change =
          1.5 * (at::matmul(own.pairs[l].b.detach(), own.pairs[l].a.detach()) -
                 at::matmul(before[2 * l + 1], before[2 * l]));
      const at::Tensor square = at::matmul(change, at::matmul(factor("input", l), change.t()));
      kl += 0.5 * (square * factor("output", l)).sum().item<double>();
      const at::Tensor base = own.state("group0.base_square")[static_cast<int64_t>(l)];
      largest = std::max(largest, std::sqrt((square.trace() / base).item<double>()));
    }
    const std::map<std::string, double> metrics = own.engine.metrics();
    CHECK(metrics.at("output_change_max") == doctest::Approx(largest).epsilon(1e-9));
    CHECK(metrics.at("predicted_decrease") > 0.0);
    if (std::isinf(radius)) {
      CHECK(metrics.at("kl_shrink") == 1.0);
      CHECK(metrics.at("predicted_kl") == doctest::Approx(kl).epsilon(1e-9));
      CHECK(kl > 1e-3);
      CHECK(largest == doctest::Approx(0.05).epsilon(1e-9));  // the balls of the outputs are full
    } else {                                                  // kl_radius (lr / initial lr)^2
      CHECK(kl == doctest::Approx(1e-3 * 0.25).epsilon(1e-9));
      CHECK(metrics.at("kl_radius") == doctest::Approx(1e-3 * 0.25));
      CHECK(metrics.at("kl_shrink") < 1.0);
    }
  }
}

TEST_CASE("maximize is the descent of the negated loss; a known loss scale changes nothing") {
  std::vector<std::vector<at::Tensor>> ends;
  for (const int variant : {0, 1, 2}) {
    at::manual_seed(10);
    Options options;
    options.maximize = variant == 1;
    options.loss_scale = variant == 2 ? 256.0 : 1.0;
    Model own(3, options);
    for (int step = 0; step < 4; ++step) {
      if (variant == 2 && step == 2) {
        own.engine.set_loss_scale(1024.0);
      }
      own.backward(variant == 2 ? (step < 2 ? 256.0 : 1024.0) : 1.0);
      for (const LoraPair& pair : own.pairs) {
        pair.a.mutable_grad().mul_(variant == 1 ? -1.0 : 1.0);
        pair.b.mutable_grad().mul_(variant == 1 ? -1.0 : 1.0);
      }
      own.engine.step({GroupSettings{}});
    }
    ends.push_back(own.parameters());
  }
  for (size_t i = 0; i < ends[0].size(); ++i) {
    CHECK(error(ends[1][i], ends[0][i]) < 1e-12);
    CHECK(error(ends[2][i], ends[0][i]) < 1e-12);
  }
}

TEST_CASE("layers of several shapes and dtypes train side by side, each as it would alone") {
  const auto make = [](int which) {
    at::manual_seed(11);
    const std::vector<LoraPair> all = {problems::make_pair(5, 6, 2), problems::make_pair(7, 6, 3),
                                       problems::make_pair(5, 6, 2, true, at::kFloat)};
    for (const LoraPair& pair : all) {
      pair.a.mutable_grad() = randn(pair.a.sizes(), pair.a.scalar_type());
      pair.b.mutable_grad() = randn(pair.b.sizes(), pair.b.scalar_type());
    }
    Options options;
    options.kl_radius = std::numeric_limits<double>::infinity();  // it couples the layers
    Engine engine(options);
    engine.add_pairs(which < 0 ? all : std::vector<LoraPair>{all[static_cast<size_t>(which)]}, 0);
    engine.step({GroupSettings{}});
    engine.step({GroupSettings{}});
    return all;
  };
  const std::vector<LoraPair> together = make(-1);
  for (int which = 0; which < 3; ++which) {
    const auto l = static_cast<size_t>(which);
    const LoraPair alone = make(which)[l];
    CHECK(error(together[l].a.detach(), alone.a.detach()) < (which == 2 ? 1e-5 : 1e-12));
    CHECK(error(together[l].b.detach(), alone.b.detach()) < (which == 2 ? 1e-5 : 1e-12));
  }
}

TEST_CASE("a pair given twice, and settings that are missing, are refused by name") {
  Model own(2);
  const std::string twice = error_of([&] { own.engine.add_pairs({own.pairs[1]}, 0); });
  CHECK(contains(twice,
                 "[ctrlora::Engine::add_pairs] pair 'layer 1': a tensor of shape [2, 6] is "
                 "trained here already. Remedy: pass every parameter once."));
  CHECK(contains(error_of([&] {
                   own.engine.add_pairs({{at::ones({2, 5}), at::ones({4, 3}), 1.0, "odd"}}, 0);
                 }),
                 "[ctrlora::LoraPair] pair 'odd'"));
  own.engine.add_pairs({problems::make_pair(kOut, kIn, kRank)}, 2);
  CHECK(contains(error_of([&] { own.engine.step({GroupSettings{}, GroupSettings{}}); }),
                 "[ctrlora::Engine::step] expected settings for every parameter group; got 2."));
}

TEST_CASE("metrics are finite from the start, and count the state's bytes") {
  at::manual_seed(13);
  Model own(2);
  for (int step = 0; step < 2; ++step) {
    for (const auto& [name, value] : own.engine.metrics()) {
      CAPTURE(name);
      CHECK(std::isfinite(value));
    }
    own.backward();
    own.engine.step({GroupSettings{}});
  }
  int64_t bytes = 0;
  for (const auto& item : own.engine.named_tensors()) {
    bytes += item.second.numel() * item.second.element_size();
  }
  CHECK(own.engine.state_bytes() == bytes);
  const std::map<std::string, double> metrics = own.engine.metrics();
  CHECK(metrics.at("steps") == 2.0);
  CHECK(metrics.at("state_bytes") == static_cast<double>(bytes));
  CHECK(metrics.at("captured_input") > 0.0);
  CHECK(metrics.at("captured_input") <= 1.0);
}

TEST_CASE("autocast does not reach the numerics, and no state ever needs a gradient") {
  std::vector<std::vector<at::Tensor>> ends;
  for (const bool autocast : {true, false}) {
    at::manual_seed(14);
    Model own(2, {}, true, at::kFloat);
    for (int step = 0; step < 3; ++step) {
      own.backward();
      at::autocast::set_autocast_enabled(at::kCPU, autocast);
      own.engine.step({GroupSettings{}});
      at::autocast::set_autocast_enabled(at::kCPU, false);
      CHECK_FALSE(own.pairs[0].a.grad_fn());
    }
    at::autocast::clear_cache();
    for (const auto& item : own.engine.named_tensors()) {
      CHECK_FALSE(item.second.requires_grad());
    }
    ends.push_back(own.parameters());
  }
  for (size_t i = 0; i < ends[0].size(); ++i) {
    CHECK(same_bits(ends[0][i], ends[1][i]));
  }
}
