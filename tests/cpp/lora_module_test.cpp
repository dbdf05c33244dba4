// LoRALinear: the same function as base + scaling B A, registered, frozen base, copies.
#include "ctrlora/lora_module.h"

#include <cmath>
#include <sstream>

#include "problems.h"

namespace {

using ctrlora::LoRALinear;
using problems::contains;
using problems::error;
using problems::error_of;
using problems::randn;

torch::nn::Linear make_base(int64_t n, int64_t m, bool bias, at::ScalarType dtype) {
  torch::nn::Linear base(torch::nn::LinearOptions(n, m).bias(bias));
  base->to(dtype);
  return base;
}

}  // namespace

TEST_CASE("forward and gradients are those of base + scaling B A") {
  at::manual_seed(1);
  for (const bool bias : {false, true}) {
    LoRALinear layer(make_base(6, 5, bias, at::kDouble), 3, 6.0, "layer");
    CHECK((layer->lora_a.scalar_type() == at::kDouble));
    CHECK(layer->lora_b.abs().max().item<double>() == 0.0);
    CHECK(layer->lora_a.abs().max().item<double>() <= 1.0 / std::sqrt(6.0));
    layer->lora_b.detach().copy_(randn({5, 3}));
    const at::Tensor x = randn({2, 4, 6});
    const auto dense = [&] {
      const at::Tensor w = layer->base->weight + 2.0 * layer->lora_b.matmul(layer->lora_a);
      const at::Tensor y = x.matmul(w.t());
      return bias ? y + layer->base->bias : y;
    };
    CHECK(error(layer->forward(x), dense()) < 1e-14);
    layer->forward(x).square().sum().backward();
    const at::Tensor got_a = layer->lora_a.grad().clone(), got_b = layer->lora_b.grad().clone();
    layer->zero_grad();
    dense().square().sum().backward();
    CHECK(error(got_a, layer->lora_a.grad()) < 1e-13);
    CHECK(error(got_b, layer->lora_b.grad()) < 1e-13);
    CHECK_FALSE(layer->base->weight.grad().defined());
  }
}

TEST_CASE("parameters have Python's names; the base is frozen; the pair is registered") {
  LoRALinear layer(make_base(8, 4, true, at::kBFloat16), 2, 8.0, "deep.down");
  std::vector<std::string> names;
  for (const auto& item : layer->named_parameters()) {
    names.push_back(item.key());
    CHECK(item.value().requires_grad() == (item.key().rfind("lora_", 0) == 0));
  }
  CHECK(names == std::vector<std::string>{"lora_a", "lora_b", "base.weight", "base.bias"});
  CHECK((layer->lora_a.scalar_type() == at::kFloat));  // 16-bit updates would be lost in rounding
  const auto pair = ctrlora::find_pair(layer->lora_b);
  REQUIRE(pair.has_value());
  CHECK(pair->name == "deep.down");
  CHECK(pair->scaling == 4.0);
  CHECK(pair->a.is_same(layer->lora_a));
  std::ostringstream text;
  text << layer;
  CHECK(contains(text.str(), "in_features=8, out_features=4, rank=2, scaling=4"));
}

TEST_CASE("a clone has its own parameters and its own pair") {
  at::manual_seed(2);
  LoRALinear layer(make_base(6, 5, true, at::kFloat), 2, 4.0, "layer");
  layer->lora_b.detach().copy_(at::randn({5, 2}));
  const auto copy = std::dynamic_pointer_cast<ctrlora::LoRALinearImpl>(layer->clone());
  REQUIRE(copy != nullptr);
  CHECK(problems::same_bits(copy->lora_a, layer->lora_a));
  CHECK(problems::same_bits(copy->base->weight, layer->base->weight));
  CHECK_FALSE(copy->lora_a.is_same(layer->lora_a));
  CHECK_FALSE(copy->base->weight.requires_grad());
  CHECK(ctrlora::find_pair(copy->lora_a)->b.is_same(copy->lora_b));
  CHECK(ctrlora::find_slot(copy->lora_a) != ctrlora::find_slot(layer->lora_a));
  const at::Tensor x = at::randn({3, 6});
  CHECK(problems::same_bits(copy->forward(x), layer->forward(x)));
}

TEST_CASE("numbers out of range are refused") {
  const torch::nn::Linear base = make_base(4, 4, false, at::kFloat);
  CHECK(contains(error_of([&] { LoRALinear(base, 0, 1.0, ""); }),
                 "[ctrlora::LoRALinear] rank = 0. Violated constraint: a whole number >= 1."));
  CHECK(contains(error_of([&] { LoRALinear(base, 2, -1.0, ""); }), "alpha = -1. Violated"));
}
