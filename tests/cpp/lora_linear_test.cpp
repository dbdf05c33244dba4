#include "ctrlora/lora_linear.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/lora_pair.h"
#include "ctrlora/observation.h"
#include "problems.h"

namespace {

using ctrlora::lora_delta;
using ctrlora::lora_linear;
using problems::contains;
using problems::error;
using problems::randn;
using problems::same_bits;

constexpr int64_t kIn = 5;
constexpr int64_t kOut = 4;
constexpr int64_t kRank = 3;
constexpr double kScaling = 1.5;

struct Layer {
  at::Tensor weight, bias, a, b;
  static Layer random(at::ScalarType base = at::kDouble, at::ScalarType adapter = at::kDouble) {
    return {randn({kOut, kIn}, base), randn({kOut}, base),
            randn({kRank, kIn}, adapter).requires_grad_(),
            randn({kOut, kRank}, adapter).requires_grad_()};
  }
};

/// Gradients of inputs, a, b for the output gradient `g`.
std::vector<at::Tensor> gradients(const at::Tensor& y,
                                  const std::vector<at::Tensor>& of,
                                  const at::Tensor& g) {
  return torch::autograd::grad({y}, of, {g});
}

/// The same layer in plain float64 operations.
at::Tensor plain(const at::Tensor& x, const Layer& own, bool with_bias = true) {
  const auto wide = [](const at::Tensor& t) { return t.to(at::kDouble); };
  const at::Tensor base = at::matmul(wide(x), wide(own.weight).t());
  const at::Tensor delta = at::matmul(at::matmul(wide(x), wide(own.a).t()), wide(own.b).t());
  return base + kScaling * delta + (with_bias ? wide(own.bias) : at::zeros({}, at::kDouble));
}

void check_equal(const at::Tensor& y,
                 const at::Tensor& expected,
                 const at::Tensor& x,
                 const Layer& own,
                 double tolerance) {
  CHECK(error(y.detach(), expected.detach()) < tolerance);
  const at::Tensor g = randn(y.sizes());
  const std::vector<at::Tensor> got = gradients(y, {x, own.a, own.b}, g.to(y.scalar_type()));
  const std::vector<at::Tensor> truth = gradients(expected, {x, own.a, own.b}, g);
  for (size_t i = 0; i < got.size(); ++i) {
    CAPTURE(i);
    CHECK(error(got[i], truth[i]) < tolerance);
  }
  CHECK((got[0].scalar_type() == x.scalar_type()));
  CHECK((got[1].scalar_type() == own.a.scalar_type()));
  CHECK((got[2].scalar_type() == own.b.scalar_type()));
}

struct Sink : ctrlora::ObservationSink {
  ctrlora::RowSampler& sampler() override { return rows; }
  [[nodiscard]] int64_t micro_batch(int64_t) const override { return 0; }
  void observe(int64_t, const ctrlora::Observation& observation) override {
    seen.push_back(observation);
  }
  explicit Sink(int64_t sample_rows) : rows(sample_rows, 0) {}
  ctrlora::RowSampler rows;
  std::vector<ctrlora::Observation> seen;
};

struct Watched {
  std::shared_ptr<Sink> sink;
  std::shared_ptr<ctrlora::ObservationSlot> slot = std::make_shared<ctrlora::ObservationSlot>();
  explicit Watched(int64_t sample_rows = 1024) : sink(std::make_shared<Sink>(sample_rows)) {
    slot->connect(sink, 0);
    slot->set_wanted(true);
  }
};

}  // namespace

TEST_CASE("output and gradients equal base plus adapter, for inputs of any dimension") {
  at::manual_seed(0);
  const Layer own = Layer::random();
  for (const std::vector<int64_t>& shape :
       {std::vector<int64_t>{kIn}, {7, kIn}, {2, 7, kIn}, {2, 3, 2, kIn}}) {
    const at::Tensor x = randn(shape).requires_grad_();
    const at::Tensor y =
        lora_linear(x, own.weight, own.bias, own.a, own.b, kScaling, nullptr, false);
    std::vector<int64_t> expected = shape;
    expected.back() = kOut;
    CHECK(y.sizes() == at::IntArrayRef(expected));
    check_equal(y, plain(x, own), x, own, 1e-13);
  }
}

TEST_CASE("inputs are sampled in the backward, once for the layers that share them") {
  at::manual_seed(7);
  const Layer own = Layer::random(at::kFloat, at::kFloat);
  for (const bool autocast : {false, true}) {
    CAPTURE(autocast);
    const Watched q(4), k(4);
    k.slot->connect(q.sink, 1);
    const at::Tensor x = randn({2, 7, kIn}, at::kFloat).requires_grad_();
    at::autocast::set_autocast_enabled(at::kCPU, autocast);
    const auto run = [&](const Watched& watched) {
      return lora_linear(x, own.weight, own.bias, own.a, own.b, kScaling, watched.slot, false);
    };
    const at::Tensor y = run(q) + run(k);
    at::autocast::set_autocast_enabled(at::kCPU, false);
    const at::Tensor index = q.sink->rows.sample(14, 0, at::kCPU);
    // Each layer's own cast would tell nobody that x is shared: there the forward samples x itself.
    CHECK(q.sink->rows.rows_of(x, index)->values.defined() == autocast);
    (void)gradients(y, {own.a}, randn(y.sizes()).to(y.scalar_type()));
    REQUIRE(q.sink->seen.size() == 2);
    CHECK(problems::same_bits(q.sink->seen[0].inputs,
                              x.detach().view({14, kIn}).index_select(0, index)));
    CHECK(q.sink->seen[0].inputs.is_same(q.sink->seen[1].inputs));
  }
}

TEST_CASE("without bias, transposed as in Conv1D, and with strided inputs") {
  at::manual_seed(1);
  const Layer own = Layer::random();
  const at::Tensor x = randn({2, 7, kIn}).requires_grad_();
  const auto run = [&](const at::Tensor& inputs, const at::Tensor& weight, bool bias, bool turned) {
    return lora_linear(inputs, weight, bias ? std::optional(own.bias) : std::nullopt, own.a, own.b,
                       kScaling, nullptr, turned);
  };
  check_equal(run(x, own.weight, false, false), plain(x, own, false), x, own, 1e-13);
  const at::Tensor conv = own.weight.t().contiguous();
  check_equal(run(x, conv, true, true), plain(x, own), x, own, 1e-13);
  check_equal(run(x, conv, false, true), plain(x, own, false), x, own, 1e-13);
  const at::Tensor strided = randn({kIn, 7, 2}).permute({2, 1, 0}).detach().requires_grad_();
  check_equal(run(strided, own.weight, true, false), plain(strided, own), strided, own, 1e-13);
}

TEST_CASE(
    "a bfloat16 base with float32 adapters computes in bfloat16, gradients in their own dtype") {
  at::manual_seed(2);
  const Layer own = Layer::random(at::kBFloat16, at::kFloat);
  const at::Tensor x = randn({6, kIn}, at::kBFloat16).requires_grad_();
  const at::Tensor y = lora_linear(x, own.weight, own.bias, own.a, own.b, kScaling, nullptr, false);
  CHECK((y.scalar_type() == at::kBFloat16));
  check_equal(y, plain(x, own), x, own, 0.04);
}

TEST_CASE("under autocast operands are cast as torch's linear casts them") {
  at::manual_seed(3);
  const Layer own = Layer::random(at::kFloat, at::kFloat);
  const at::Tensor x = randn({6, kIn}, at::kFloat).requires_grad_();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const at::Tensor y = lora_linear(x, own.weight, own.bias, own.a, own.b, kScaling, nullptr, false);
  const at::Tensor torch_linear = at::linear(x, own.weight, own.bias);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  CHECK((y.scalar_type() == torch_linear.scalar_type()));
  CHECK((y.scalar_type() == at::kBFloat16));
  check_equal(y, plain(x, own), x, own, 0.04);
}

TEST_CASE("the base is frozen: its weight and bias get no gradient even if they ask") {
  at::manual_seed(4);
  Layer own = Layer::random();
  own.weight.requires_grad_();
  own.bias.requires_grad_();
  const at::Tensor x = randn({6, kIn});  // the first layer's inputs need none either
  lora_linear(x, own.weight, own.bias, own.a, own.b, kScaling, nullptr, false).sum().backward();
  CHECK_FALSE(own.weight.grad().defined());
  CHECK_FALSE(own.bias.grad().defined());
  CHECK_FALSE(x.grad().defined());
  const at::Tensor z = at::matmul(x, own.a.detach().t()).sum(0, true).expand({kOut, kRank});
  CHECK(error(own.b.grad(), kScaling * z) < 1e-13);
}

TEST_CASE("lora_delta adds to a foreign base; gradients reach the inputs through both paths") {
  at::manual_seed(5);
  const Layer own = Layer::random();
  const at::Tensor x = randn({2, 7, kIn}).requires_grad_();
  const at::Tensor base = at::linear(x, own.weight, own.bias);
  check_equal(lora_delta(x, base, own.a, own.b, kScaling, nullptr), plain(x, own), x, own, 1e-13);
  CHECK(error(base.detach(), at::linear(x, own.weight, own.bias).detach()) == 0.0);

  const at::Tensor detached = base.detach();  // a base without a graph of its own
  const at::Tensor y = lora_delta(x, detached, own.a, own.b, kScaling, nullptr);
  const at::Tensor g = randn({2, 7, kOut});
  const at::Tensor through = kScaling * at::matmul(at::matmul(g, own.b), own.a);
  CHECK(error(gradients(y, {x}, g)[0], through.detach()) < 1e-13);
}

TEST_CASE("lora_delta answers in the base output's dtype") {
  at::manual_seed(6);
  const Layer own = Layer::random(at::kBFloat16, at::kFloat);
  const at::Tensor x = randn({6, kIn}, at::kFloat).requires_grad_();
  const at::Tensor base = at::linear(x.detach().to(at::kBFloat16), own.weight, own.bias);
  const at::Tensor y = lora_delta(x, base, own.a, own.b, kScaling, nullptr);
  CHECK((y.scalar_type() == at::kBFloat16));
  CHECK(error(y.detach(), plain(x.detach(), own).detach()) < 0.04);
  CHECK((gradients(y, {x}, at::ones_like(y))[0].scalar_type() == at::kFloat));
}

TEST_CASE("an observation is delivered once a backward, with the base's own output") {
  at::manual_seed(7);
  const Layer own = Layer::random();
  Watched watched;
  const at::Tensor x = randn({2, 7, kIn}).requires_grad_(), g = randn({2, 7, kOut});
  const at::Tensor base = at::linear(x, own.weight, own.bias).detach();
  const auto forward = [&](bool foreign) {
    return foreign
               ? lora_delta(x, base, own.a, own.b, kScaling, watched.slot)
               : lora_linear(x, own.weight, own.bias, own.a, own.b, kScaling, watched.slot, false);
  };
  for (const bool foreign : {false, true}) {
    const at::Tensor dropped = forward(foreign);  // evaluation with a graph
    const at::Tensor y = forward(foreign);
    CHECK(watched.sink->seen.empty());
    torch::autograd::grad({y}, {own.a}, {g}, /*retain_graph=*/true);
    torch::autograd::grad({y}, {own.a}, {g});  // a second backward of the same forward
    REQUIRE(watched.sink->seen.size() == 1);
    const ctrlora::Observation seen = std::exchange(watched.sink->seen, {}).front();
    CHECK(same_bits(seen.inputs, x.detach().view({14, kIn})));
    CHECK(same_bits(seen.output_grads, g.view({14, kOut})));
    CHECK(error(seen.base_square, base.square().sum(-1).view({14})) < 1e-13);
    CHECK(seen.sequences == 2);
  }
}

TEST_CASE("nothing is observed unwanted or without gradients, and observing changes no number") {
  at::manual_seed(8);
  const Layer own = Layer::random();
  Watched watched;
  const at::Tensor x = randn({6, kIn}).requires_grad_(), g = randn({6, kOut});
  const auto run = [&](const std::shared_ptr<ctrlora::ObservationSlot>& slot) {
    const at::Tensor y = lora_linear(x, own.weight, own.bias, own.a, own.b, kScaling, slot, false);
    std::vector<at::Tensor> out = gradients(y, {x, own.a, own.b}, g);
    out.push_back(y.detach());
    return out;
  };
  const std::vector<at::Tensor> observed = run(watched.slot), alone = run(nullptr);
  for (size_t i = 0; i < alone.size(); ++i) {
    CHECK(same_bits(observed[i], alone[i]));
  }
  CHECK(watched.slot->observations() == 1);
  {
    const at::NoGradGuard no_grad;
    const at::Tensor y =
        lora_linear(x, own.weight, own.bias, own.a, own.b, kScaling, watched.slot, false);
    CHECK_FALSE(y.requires_grad());
  }
  watched.slot->set_wanted(false);
  run(watched.slot);
  CHECK(watched.slot->observations() == 1);
}

TEST_CASE("layers that receive one tensor share its rows") {
  at::manual_seed(9);
  const Layer q = Layer::random(), k = Layer::random();
  Watched first, second;
  second.slot->connect(first.sink, 1);
  const at::Tensor x = randn({2, 7, kIn});
  const at::Tensor y = lora_linear(x, q.weight, q.bias, q.a, q.b, kScaling, first.slot, false) +
                       lora_linear(x, k.weight, k.bias, k.a, k.b, kScaling, second.slot, false);
  y.sum().backward();
  REQUIRE(first.sink->seen.size() == 2);
  CHECK(first.sink->seen[0].inputs.is_same(first.sink->seen[1].inputs));
}

TEST_CASE(
    "layers that receive one tensor share its rows under autocast, where each casts its own") {
  at::manual_seed(9);
  const Layer q = Layer::random(at::kFloat, at::kFloat), k = Layer::random(at::kFloat, at::kFloat);
  Watched first, second;
  second.slot->connect(first.sink, 1);
  const at::Tensor x = randn({2, 7, kIn}, at::kFloat);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const at::Tensor y = lora_linear(x, q.weight, q.bias, q.a, q.b, kScaling, first.slot, false) +
                       lora_linear(x, k.weight, k.bias, k.a, k.b, kScaling, second.slot, false);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  y.sum().backward();
  REQUIRE(first.sink->seen.size() == 2);
  CHECK(first.sink->seen[0].inputs.is_same(first.sink->seen[1].inputs));
  CHECK(same_bits(first.sink->seen[0].inputs, x.view({14, kIn})));
}

TEST_CASE("a half that asks for no gradient gets none") {
  at::manual_seed(11);
  const Layer own = Layer::random();
  const at::Tensor x = randn({6, kIn}).requires_grad_();
  for (const bool train_a : {true, false}) {
    const at::Tensor a = own.a.detach().requires_grad_(train_a);
    const at::Tensor b = own.b.detach().requires_grad_(!train_a);
    const at::Tensor y =
        lora_linear(x, own.weight, own.bias, a, b, kScaling, nullptr, false).square().sum();
    y.backward();
    CHECK(a.grad().defined() == train_a);
    CHECK(b.grad().defined() == !train_a);
  }
}

TEST_CASE("a backward that is differentiated again reaches inputs and both halves") {
  at::manual_seed(12);
  const Layer own = Layer::random();
  const at::Tensor x = randn({2, 3, kIn}).requires_grad_();
  const auto penalty = [&](const at::Tensor& y) {
    const at::Tensor slope =
        torch::autograd::grad({y.square().sum()}, {own.a}, {}, std::nullopt, true)[0];
    return torch::autograd::grad({slope.square().sum()}, {x, own.a, own.b});
  };
  const auto fused =
      penalty(lora_linear(x, own.weight, own.bias, own.a, own.b, kScaling, nullptr, false));
  const auto reference = penalty(plain(x, own));
  for (size_t i = 0; i < fused.size(); ++i) {
    CHECK(error(fused[i], reference[i]) < 1e-12);
  }
}

TEST_CASE("shapes that do not fit are refused by name") {
  const Layer own = Layer::random();
  const at::Tensor x = randn({6, kIn});
  const auto linear = [&](const at::Tensor& inputs, const at::Tensor& weight, const at::Tensor& a,
                          const at::Tensor& b) {
    return problems::error_of(
        [&] { lora_linear(inputs, weight, std::nullopt, a, b, kScaling, nullptr, false); });
  };
  CHECK(contains(linear(x, randn({kOut}), own.a, own.b),
                 "[ctrlora::lora_linear] expected a 2-d weight; got [4]."));
  const std::string text = linear(randn({6, 9}), own.weight, own.a, own.b);
  CHECK(contains(text,
                 "[ctrlora::lora_linear] expected inputs (..., n), a (r, n), b (m, r) with "
                 "n = 5, m = 4; got inputs [6, 9], a [3, 5], b [4, 3]."));
  CHECK(contains(linear(x, own.weight, randn({3, 6}), own.b), "a [3, 6]"));
  CHECK(contains(linear(x, own.weight, own.a, randn({4, 2})), "b [4, 2]"));
  CHECK(contains(linear(x, own.weight, own.a, randn({7, 3})), "b [7, 3]"));
  CHECK(contains(linear(randn({}), own.weight, own.a, own.b), "got inputs []"));
  CHECK(contains(
      problems::error_of([&] { lora_delta(x, randn({6, 3}), own.a, own.b, kScaling, nullptr); }),
      "[ctrlora::lora_delta] expected inputs (..., n), a (r, n), b (m, r) with n = 5, "
      "m = 3; got inputs [6, 5], a [3, 5], b [4, 3]."));
}
