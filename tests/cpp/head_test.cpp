#include "ctrlora/head.h"

#include <ATen/ops/linear.h>

#include <cmath>
#include <limits>

#include "engine_model.h"

namespace {

using ctrlora::GroupSettings;
using ctrlora::HeadCapture;
using ctrlora::HeadMeter;
using ctrlora::HeadSlot;
using ctrlora::Options;
using problems::Model;
using problems::numbers;
using problems::randn;
using problems::same_bits;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Head {
  at::Tensor weight = randn({3, 5}).requires_grad_();
  std::shared_ptr<HeadSlot> slot = ctrlora::register_head(weight);

  static at::Tensor inputs_for(const at::Tensor& outputs) {
    at::DimVector shape(outputs.sizes().begin(), outputs.sizes().end());
    shape.back() = 5;
    return at::ones(shape, outputs.options());
  }
  std::shared_ptr<HeadCapture> capture(const at::Tensor& outputs) const {
    return slot->capture(inputs_for(outputs), outputs);
  }
  void backward(const at::Tensor& outputs, const at::Tensor& grads) const {
    capture(outputs)->complete(grads);
  }
  std::shared_ptr<HeadMeter> listen() const {
    auto meter = std::make_shared<HeadMeter>();
    slot->connect(meter, meter->add_head(weight));
    return meter;
  }
};

double sensitivity(const HeadMeter& meter) {
  return meter.sensitivity().item<double>();
}

// What the engine holds of it.
double sensitivity(const Model& model) {
  const at::Tensor squares = model.state("head.row_square") / model.state("head.row_weight");
  return squares.prod().sqrt().item<double>();
}

// |g| |z - mean|, the latter as from n - 1 degrees of freedom.
double expected(const at::Tensor& z, const at::Tensor& g) {
  const auto rows = static_cast<double>(z.size(0));
  return ((z - z.mean(0)).norm() * g.norm()).item<double>() * std::sqrt(rows / (rows - 1));
}

}  // namespace

TEST_CASE("a weight has one slot, as long as it lives and is registered") {
  const Head head;
  CHECK(ctrlora::register_head(head.weight) == head.slot);
  CHECK(ctrlora::find_head(head.weight) == head.slot);
  CHECK(HeadSlot::find(head.slot->handle()) == head.slot);
  CHECK(HeadSlot::find(0) == nullptr);
  CHECK(ctrlora::find_head(randn({3, 5})) == nullptr);
  CHECK_FALSE(head.slot->wanted());
  CHECK(head.capture(randn({4, 3})) == nullptr);
  ctrlora::unregister_head(head.weight);
  CHECK(ctrlora::find_head(head.weight) == nullptr);
  CHECK(ctrlora::register_head(head.weight) != head.slot);
}

TEST_CASE("the sensitivity is that of usable rows; micro-batches add up to the big batch") {
  at::manual_seed(1);
  const Head head;
  const auto meter = head.listen();
  CHECK(head.slot->wanted());
  CHECK(sensitivity(*meter) == kInf);
  const at::Tensor z = randn({2, 4, 3}) + 100.0, g = randn({2, 4, 3});
  double scale = 1.0;
  SUBCASE("one backward, with rows that are none") {
    const at::Tensor outputs = at::cat({z.flatten(0, 1), randn({3, 3})});
    const at::Tensor grads = at::cat({g.flatten(0, 1), at::zeros({3, 3}, at::kDouble)});
    grads[9].fill_(kNan);
    grads[10].fill_(1.0);
    outputs[10].fill_(kInf);
    head.backward(outputs, grads);
  }
  SUBCASE("two backwards, the loss scaled") {
    scale = 8.0;
    head.backward(z[0], scale * g[0]);
    head.backward(z[1], scale * g[1]);
  }
  meter->commit(0.6, scale, nullptr);
  CHECK(sensitivity(*meter) ==
        doctest::Approx(expected(z.flatten(0, 1), g.flatten(0, 1))).epsilon(1e-10));
}

TEST_CASE("gradients count as they are found: clipped, unscaled, averaged") {
  at::manual_seed(8);
  const Head head;
  const at::Tensor x = randn({6, 5}), z = randn({6, 3}), g = randn({6, 3});
  for (const double kept : {1.0, 0.01, 3.0}) {
    const auto meter = head.listen();
    head.slot->capture(x, z)->complete(g);
    head.weight.mutable_grad() = kept * g.t().matmul(x);
    meter->commit(0.6, 4.0, nullptr);  // the loss' scale, too, is in .grad or it is not
    CHECK(sensitivity(*meter) == doctest::Approx(kept * expected(z, g)).epsilon(1e-10));
  }
  const auto meter = head.listen();
  head.slot->capture(x, z)->complete(g);
  head.weight.mutable_grad() = at::full({3, 5}, kNan, at::kDouble);
  meter->commit(0.6, 1.0, nullptr);
  CHECK(sensitivity(*meter) == doctest::Approx(expected(z, g)).epsilon(1e-10));
}

TEST_CASE("heads side by side count as one") {
  at::manual_seed(6);
  const Head one, two;
  const auto meter = one.listen();
  two.slot->connect(meter, meter->add_head(two.weight));
  const at::Tensor z = randn({4, 6}), g = randn({4, 6});
  one.backward(z.slice(1, 0, 3), g.slice(1, 0, 3));
  two.backward(z.slice(1, 3), g.slice(1, 3));
  meter->commit(0.6, 1.0, nullptr);
  CHECK(sensitivity(*meter) == doctest::Approx(expected(z, g)).epsilon(1e-12));
}

TEST_CASE("both sums are bias-corrected averages, which spikes and empty rows leave sound") {
  HeadMeter meter;
  meter.add_head(at::zeros({1, 1}));
  // Four rows with that sum of squares about their mean, corrected, and that of the gradients.
  const auto enter = [&](double outputs, double grads) {
    meter.add(0, numbers({4.0, outputs * 0.75 + 25.0, grads, 10.0, 0.0}));
    meter.commit(0.5, 1.0, nullptr);
  };
  enter(4.0, 9.0);
  CHECK(sensitivity(meter) == doctest::Approx(6.0));
  enter(8.0, 9.0);  // (0.25 * 4 + 0.5 * 8) / 0.75
  CHECK(sensitivity(meter) == doctest::Approx(std::sqrt(20.0 / 3.0 * 9.0)));
  const double before = sensitivity(meter);
  enter(1.0, kNan);
  enter(kInf, 1.0);
  enter(1.0, 0.0);
  meter.add(0, numbers({1.0, 5.0, 5.0, 1.0, 0.0}));  // a single row: no spread
  meter.commit(0.5, 1.0, nullptr);
  meter.add(0, numbers({4.0, 1e30, 1e30, 1.0, 0.0}));
  meter.drop();
  meter.commit(0.5, 1.0, nullptr);  // nothing came
  CHECK(sensitivity(meter) == before);
  enter(20.0 / 3.0, 9e30);  // a spike of g: 25 times its mean
  CHECK(sensitivity(meter) > before);
  CHECK(sensitivity(meter) < 5.0 * before);
}

TEST_CASE("the gain makes a direction's change of the outputs what it should be") {
  at::manual_seed(9);
  const Head head;
  const auto meter = head.listen();
  const auto gain = [&](double step) { return meter->gains(step).item<double>(); };
  CHECK(gain(100.0) == 1.0);  // nothing is known
  const at::Tensor x = randn({9, 5}), z = randn({9, 3}), g = randn({9, 3});
  const at::Tensor direction = randn({3, 5});
  const double rms = x.slice(0, 0, 8).matmul(direction.t()).square().mean().sqrt().item<double>();
  g[8].zero_();
  head.slot->capture(x.slice(0, 0, 4), z.slice(0, 0, 4))->complete(g.slice(0, 0, 4));
  const at::Tensor rest = x.slice(0, 4).clone();
  const auto capture = head.slot->capture(rest, z.slice(0, 4));
  rest.zero_();
  capture->complete(g.slice(0, 4));
  meter->set_direction(0, direction, 0.5);
  meter->commit(0.6, 1.0, nullptr);
  CHECK(gain(100.0) == doctest::Approx(100.0 / rms).epsilon(1e-12));
  const auto enter = [&](double times) {
    head.slot->capture(x.slice(0, 0, 8), z.slice(0, 0, 8))->complete(g.slice(0, 0, 8));
    meter->set_direction(0, times * direction, 0.5);
    meter->commit(0.6, 1.0, nullptr);
  };
  SUBCASE("an average of squares") {
    enter(2.0);  // (0.25 + 0.5 * 4) / 0.75
    CHECK(gain(1.0) == doctest::Approx(1.0 / (rms * std::sqrt(3.0))).epsilon(1e-12));
  }
  SUBCASE("a spike counts as 25 times the mean") {
    enter(1e6);  // (0.25 + 0.5 * 25) / 0.75
    CHECK(gain(1.0) == doctest::Approx(1.0 / (rms * std::sqrt(17.0))).epsilon(1e-12));
  }
  SUBCASE("inputs next to nothing do not make it boundless") {
    for (const double times : {1e-6, 1e-30, 0.0}) {
      const auto other = head.listen();
      head.slot->capture(times * x, z)->complete(g);
      other->set_direction(0, direction, 0.5);
      other->commit(0.6, 1.0, nullptr);
      CHECK(other->gains(1.0).item<double>() == (times > 0.0 ? 1000.0 : 1.0));
    }
  }
  SUBCASE("what says nothing changes nothing") {
    enter(0.0);
    enter(kNan);
    head.backward(z, g);
    meter->commit(0.6, 1.0, nullptr);  // rows without a direction
    meter->set_direction(0, direction, 0.5);
    meter->commit(0.6, 1.0, nullptr);  // a direction without rows
    head.backward(z, g);
    meter->set_direction(0, 7.0 * direction, 0.5);
    meter->drop();
    meter->commit(0.6, 1.0, nullptr);
    CHECK(gain(1.0) == doctest::Approx(1.0 / rms).epsilon(1e-12));
  }
}

TEST_CASE("of many rows, evenly spaced ones tell; of many micro-batches, the first") {
  at::manual_seed(10);
  const Head head;
  const auto meter = head.listen();
  const auto backward = [&](double size, int64_t rows) {
    const at::Tensor z = randn({rows, 3});
    const at::Tensor x = at::full({rows, 5}, size / 5.0, at::kDouble);
    x.slice(0, 1, rows, 2).zero_();  // every second row, which counts as none
    head.slot->capture(x, z)->complete(at::ones_like(z));
  };
  for (int64_t i = 0; i < HeadMeter::kInputs / 256; ++i) {
    backward(2.0, 512);
  }
  backward(1e3, 4);
  meter->set_direction(0, at::ones({1, 5}, at::kDouble), 0.5);
  meter->commit(0.6, 1.0, nullptr);
  CHECK(meter->gains(1.0).item<double>() == doctest::Approx(0.5));
}

TEST_CASE("what does not belong to the forward is ignored, and so is who came too late") {
  at::manual_seed(7);
  const Head head;
  auto meter = head.listen();
  const at::Tensor z = randn({4, 3}), g = randn({4, 3});
  const auto capture = head.capture(z), other = head.capture(z);
  const at::Tensor written = z.clone();
  const auto overwritten = head.capture(written);
  written.mul_(2.0);
  overwritten->complete(g);
  other->complete(randn({5, 3}));
  capture->complete(g);
  capture->complete(g);
  meter->commit(0.6, 1.0, nullptr);
  CHECK(sensitivity(*meter) == doctest::Approx(expected(z, g)).epsilon(1e-12));
  const auto late = head.capture(z);
  CHECK(head.capture(randn({0, 3})) == nullptr);
  meter.reset();
  late->complete(g);
  CHECK(head.capture(z) == nullptr);
}

TEST_CASE("watch_head observes a forward in a C++ program and returns its outputs") {
  at::manual_seed(2);
  const Head head;
  const at::Tensor x = randn({4, 5});
  const auto run = [&] {
    const at::Tensor z = ctrlora::watch_head(head.weight, x, at::linear(x, head.weight));
    head.weight.mutable_grad().reset();
    z.square().sum().backward();
    return z.detach();
  };
  run();  // nobody listens
  const auto meter = head.listen();
  const at::Tensor z = run();
  meter->commit(0.6, 1.0, nullptr);
  CHECK(sensitivity(*meter) == doctest::Approx(expected(z, 2.0 * z)).epsilon(1e-12));
}

TEST_CASE("two processes with half of the rows each find what one with all of them does") {
  at::manual_seed(3);
  const Head head;
  const at::Tensor z = randn({8, 3}), g = randn({8, 3});
  const auto sums_of = [](const at::Tensor& outputs, const at::Tensor& grads) {
    return at::cat({numbers({static_cast<double>(outputs.size(0))}),
                    outputs.square().sum().view({1}), grads.square().sum().view({1}),
                    outputs.sum(0), at::zeros({3}, at::kDouble), numbers({8.0, 4.0})});
  };
  ctrlora::Processes pair;
  pair.count = 2;
  pair.all_reduce = [&](const std::vector<at::Tensor>& tensors) {
    REQUIRE(tensors.size() == 1);
    tensors[0].add_(sums_of(z.slice(0, 4), 2.0 * g.slice(0, 4)));  // a mean of half the rows
  };
  for (const bool saw_rows : {true, false}) {
    const auto meter = head.listen();
    if (saw_rows) {
      head.backward(z.slice(0, 0, 4), 2.0 * g.slice(0, 0, 4));
    }
    meter->set_direction(0, numbers({1.0, 0.0, 0.0, 0.0, 0.0}).view({1, 5}), 0.9);
    meter->commit(0.6, 1.0, &pair);  // here inputs of ones: the outputs move by 1
    CHECK(meter->gains(3.0).item<double>() ==
          doctest::Approx(3.0 / std::sqrt(saw_rows ? 12.0 / 8.0 : 8.0 / 4.0)));
    const int64_t first = saw_rows ? 0 : 4;
    CHECK(sensitivity(*meter) ==
          doctest::Approx(expected(z.slice(0, first), g.slice(0, first))).epsilon(1e-12));
  }
}

TEST_CASE("no step changes the head's outputs by more than head_radius, whatever the lr") {
  for (const double radius : {0.1, 1e-3, kInf}) {
    at::manual_seed(4);
    const Head head;
    Options options;
    options.head_radius = radius;
    options.kl_radius = kInf;
    Model own(3, options);
    own.engine.add_fallback({head.weight}, 0);
    for (int step = 0; step < 5; ++step) {
      own.backward();
      const std::vector<at::Tensor> before = own.parameters();
      const bool observed = radius < kInf && step > 0;
      if (observed || step == 1) {
        head.backward(0.01 * randn({8, 3}), 0.01 * randn({8, 3}));
      }
      own.engine.step({GroupSettings{.lr = 0.5, .initial_lr = 1.0}});
      const auto metrics = own.engine.metrics();
      CHECK(metrics.count("head_change") == (radius < kInf ? 1 : 0));
      CHECK_FALSE(same_bits(own.pairs[0].b.detach(), before[1]));
      if (observed) {
        CHECK(metrics.at("head_radius") == 0.5 * radius);              // follows the schedule
        CHECK(metrics.at("head_change") > metrics.at("head_radius"));  // binds in each step
        CHECK(metrics.at("predicted_decrease") ==
              doctest::Approx(metrics.at("head_radius") * sensitivity(own)).epsilon(1e-9));
      }
    }
  }
}

TEST_CASE("a head's first step moves its outputs by head_step times lr at any width") {
  for (const int64_t width : {8, 2000}) {
    for (const double head_step : {100.0, 0.0}) {
      at::manual_seed(11);
      const at::Tensor weight = randn({3, width}).requires_grad_();
      const at::Tensor bias = randn({3}).requires_grad_();
      const auto slot = ctrlora::register_head(weight);
      ctrlora::Engine engine(Options{.head_step = head_step});
      engine.add_fallback({bias, weight}, 0);
      const at::Tensor x = randn({12, width});
      const at::Tensor before = weight.detach().clone(), bias_before = bias.detach().clone();
      const at::Tensor z = ctrlora::watch_head(weight, x, at::linear(x, weight, bias));
      z.square().sum().backward();
      engine.step({GroupSettings{.lr = 1e-3}});
      const at::Tensor move = weight.detach() - before;
      const double change = x.matmul(move.t()).square().mean().sqrt().item<double>();
      const double one = move.abs().mean().item<double>();  // each entry moves as far
      CHECK(move.abs().amax().item<double>() == doctest::Approx(one).epsilon(1e-5));
      CHECK((bias.detach() - bias_before).abs().amax().item<double>() ==
            doctest::Approx(1e-3).epsilon(1e-5));
      CHECK((head_step > 0.0 ? change : 100.0 * one) == doctest::Approx(0.1).epsilon(1e-5));
      const auto metrics = engine.metrics();
      CHECK(metrics.count("head_gain") == (head_step > 0.0 ? 1 : 0));
      CHECK((head_step == 0.0 ||
             metrics.at("head_gain") == doctest::Approx(one / 1e-3).epsilon(1e-5)));
    }
  }
}

TEST_CASE(
    "a head that is not felt changes no bit; lr 0, observe(false) and dropping leave no trace") {
  std::vector<std::vector<at::Tensor>> ends;
  for (const bool with : {true, false}) {
    at::manual_seed(5);
    const Head head;
    Model own(2);
    if (with) {
      own.engine.add_fallback({head.weight}, 0);
    }
    for (int step = 0; step < 4; ++step) {
      own.backward();
      const at::Tensor z = 1e6 * randn({8, 3}), g = randn({8, 3});
      if (with) {
        head.backward(z, g);
      }
      own.engine.step({GroupSettings{.lr = 0.1}});
    }
    ends.push_back(own.parameters());
    if (with) {
      const at::Tensor kept = own.state("head.row_square").clone();
      own.engine.observe(false);
      CHECK_FALSE(head.slot->wanted());
      own.engine.observe(true);
      head.backward(randn({8, 3}), randn({8, 3}));
      own.engine.step({GroupSettings{.lr = 0.0}});
      head.backward(randn({8, 3}), randn({8, 3}));
      own.engine.drop_observations();
      own.backward();
      own.engine.step({GroupSettings{.lr = 0.1}});
      CHECK(same_bits(own.state("head.row_square"), kept));
    }
  }
  for (size_t i = 0; i < ends[0].size(); ++i) {
    CHECK(same_bits(ends[0][i], ends[1][i]));
  }
}
