#include "ctrlora/layer_group.h"

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "layer_model.h"

namespace {

using ctrlora::LayerGroup;
using ctrlora::LoraPair;
using ctrlora::Options;
using layer_model::exact;
using layer_model::kIn;
using layer_model::kNan;
using layer_model::kOut;
using layer_model::kRank;
using layer_model::Layers;
using layer_model::outer;
using problems::contains;
using problems::error;
using problems::error_of;
using problems::numbers;
using problems::randn;
using problems::same_bits;

}  // namespace

TEST_CASE("parameters become views of one slab and stay the tensors they were") {
  at::manual_seed(0);
  const LoraPair first = problems::make_pair(kOut, kIn, kRank);
  const LoraPair second = problems::make_pair(kOut, kIn, kRank);
  const c10::TensorImpl* identity = second.a.unsafeGetTensorImpl();
  const at::Tensor a = second.a.detach().clone(), b = second.b.detach().clone();
  const LayerGroup group({first, second}, 4, {}, std::make_shared<ctrlora::RowSampler>(8, 0));
  CHECK(group.layers() == 2);
  CHECK(group.group() == 4);
  CHECK(group.age() == 0);
  CHECK(second.a.unsafeGetTensorImpl() == identity);
  CHECK(second.a.requires_grad());
  CHECK(second.a.is_leaf());
  CHECK(same_bits(second.a.detach(), a));
  CHECK(same_bits(second.b.detach(), b));
  CHECK(second.a.const_data_ptr<double>() == first.a.const_data_ptr<double>() + kRank * kIn);
  CHECK(second.b.const_data_ptr<double>() == first.b.const_data_ptr<double>() + kOut * kRank);
}

TEST_CASE("a replaced storage is adopted: same steps as if the numbers had been written in place") {
  Options options = exact();
  std::vector<at::Tensor> ends;
  for (const bool replace : {true, false}) {
    at::manual_seed(1);
    Layers own(3, options);
    own.random_gradients();
    own.step();
    const at::Tensor fresh = randn({kRank, kIn});
    at::Tensor& a = own.pairs[1].a;
    const void* home = a.const_data_ptr();
    if (replace) {
      a.set_data(fresh.clone());  // what load_state_dict(assign=True) or a merge does
    } else {
      a.detach().copy_(fresh);
    }
    own.group->bind();
    CHECK(a.const_data_ptr() == home);
    CHECK(same_bits(a.detach(), fresh));
    own.step();
    ends.push_back(at::cat({own.pairs[0].a.detach(), a.detach(), own.pairs[2].a.detach()}).clone());
  }
  CHECK(same_bits(ends[0], ends[1]));
}

TEST_CASE("a parameter of another shape is refused by name") {
  Layers own(2);
  own.pairs[1].b.set_data(at::zeros({kOut, kRank + 1}, at::kDouble));
  const std::string text = error_of([&] { own.group->bind(); });
  CHECK(contains(text, "[ctrlora::Engine::step] a parameter of pair 'layer 1' was replaced"));
  CHECK(contains(text, "expected [5, 2] Double on cpu; got [5, 3] Double on cpu."));
  CHECK(contains(text, "Remedy: build a new optimizer after changing ranks."));
}

TEST_CASE("a model cast as a whole is followed; a part of it is refused") {
  at::manual_seed(2);
  Layers own(2);
  own.random_gradients();
  own.step();
  const at::Tensor momentum = own.state("momentum_b").clone();
  for (LoraPair& pair : own.pairs) {
    pair.a.mutable_grad().reset();
    pair.b.mutable_grad().reset();
    pair.a.set_data(pair.a.to(at::kBFloat16));
    pair.b.set_data(pair.b.to(at::kBFloat16));
  }
  own.group->bind();
  CHECK((own.pairs[0].a.scalar_type() == at::kBFloat16));
  CHECK(same_bits(own.state("momentum_b"), momentum.to(at::kFloat)));  // statistics stay float32
  CHECK((own.state("input.basis").scalar_type() == at::kFloat));
  CHECK((own.state("rms_square").scalar_type() == at::kDouble));
  own.random_gradients();
  own.step();
  CHECK_FALSE(same_bits(own.state("momentum_b"), momentum.to(at::kFloat)));

  own.pairs[0].a.mutable_grad().reset();
  own.pairs[0].a.set_data(own.pairs[0].a.to(at::kDouble));
  CHECK(contains(error_of([&] { own.group->bind(); }), "pair 'layer 0': expected a and b on one"));
  own.pairs[0].b.mutable_grad().reset();
  own.pairs[0].b.set_data(own.pairs[0].b.to(at::kDouble));
  const std::string text = error_of([&] { own.group->bind(); });
  CHECK(contains(text,
                 "pairs 'layer 0' and 'layer 1' started on one device with one dtype and now "
                 "differ: cpu Double and cpu BFloat16."));
}

TEST_CASE("every layer is wanted during warm-up, then a contiguous part of them on each step") {
  Options options;
  options.factor_warmup_steps = 2;
  options.factor_every = 3;
  for (const int64_t count : {1, 2, 5, 7}) {
    Layers own(count, options);
    for (int64_t t = 0; t < 9; ++t) {
      for (int64_t l = 0; l < count; ++l) {
        const bool due = t < 2 || l * 3 / count == t % 3;
        CHECK(own.slots[static_cast<size_t>(l)]->wanted() == due);
      }
      own.step();
      CHECK(own.group->age() == t + 1);
    }
  }
}

TEST_CASE("observed rows become the factors; micro-batches equal the big batch") {
  at::manual_seed(3);
  Layers whole(1, exact()), parts(1, exact());
  const at::Tensor x = randn({12, kIn}), g = randn({12, kOut}), y = randn({12, kOut});
  whole.observe(0, x, g, y);
  parts.observe(0, x.slice(0, 0, 5), g.slice(0, 0, 5), y.slice(0, 0, 5));
  CHECK(parts.group->micro_batch(0) == 1);
  parts.observe(0, x.slice(0, 5), g.slice(0, 5), y.slice(0, 5));
  CHECK(parts.group->micro_batch(0) == 2);
  for (Layers* own : {&whole, &parts}) {
    own->group->update_momentum();
    ctrlora::LayerGroup::commit_observations({own->group.get()}, own->side);
    CHECK(own->group->micro_batch(0) == 0);
    const ctrlora::KroneckerFactors& factors = own->group->factors();
    CHECK(error(factors.input.to_dense()[0], outer(x) / 12) < 1e-12);
    CHECK(error(factors.output.to_dense()[0], outer(g) * 12) < 1e-12);  // mean over 12 tokens
    CHECK(error(factors.base_square, y.square().sum().view({1}) / 12) < 1e-13);
    CHECK(same_bits(factors.absolute, at::ones({1}, at::kBool)));
  }
}

TEST_CASE("rows without a gradient or with bad numbers do not count") {
  at::manual_seed(4);
  Layers own(1, exact());
  at::Tensor x = randn({8, kIn}), g = randn({8, kOut}), y = randn({8, kOut});
  const at::Tensor good = at::tensor({0, 2, 5, 7}, at::kLong);
  g.select(0, 1).zero_();  // padding
  g.select(0, 3).select(0, 2).fill_(kNan);
  x.select(0, 4).select(0, 1).fill_(std::numeric_limits<double>::infinity());
  g.select(0, 6).select(0, 0).fill_(-std::numeric_limits<double>::infinity());
  own.observe(0, x, g, y);
  own.group->update_momentum();
  ctrlora::LayerGroup::commit_observations({own.group.get()}, own.side);
  const ctrlora::KroneckerFactors& factors = own.group->factors();
  CHECK(error(factors.input.to_dense()[0], outer(x.index_select(0, good)) / 4) < 1e-12);
  CHECK(error(factors.output.to_dense()[0], outer(g.index_select(0, good)) * 4) < 1e-12);
  CHECK(error(factors.base_square, y.index_select(0, good).square().sum().view({1}) / 4) < 1e-13);
}

TEST_CASE("foreign sizes are ignored, and dropped rows never arrive") {
  at::manual_seed(5);
  Layers own(1, exact());
  own.observe(0, randn({8, kIn}), randn({8, kOut + 1}));
  own.observe(0, randn({8, kIn - 1}), randn({8, kOut}));
  CHECK(own.group->micro_batch(0) == 0);
  own.observe(0, randn({8, kIn}), randn({8, kOut}));
  own.group->drop_observations();
  CHECK(own.group->micro_batch(0) == 0);
  own.group->update_momentum();
  ctrlora::LayerGroup::commit_observations({own.group.get()}, own.side);
  CHECK(same_bits(own.group->factors().seen, at::zeros({1}, at::kDouble)));
}

TEST_CASE("layers with one input tensor form a share set; who once gets another leaves for good") {
  at::manual_seed(6);
  Options options = exact();
  options.factor_every = 1;
  Layers own(4, options);
  const auto backward = [&](const std::vector<at::Tensor>& inputs) {
    for (int64_t l = 0; l < 4; ++l) {
      own.observe(l, inputs[static_cast<size_t>(l)], randn({8, kOut}));
    }
    own.step();
    return own.group->factors().input.to_dense();
  };
  const auto sets = [&] { return own.state("share_set"); };
  const at::Tensor x = randn({8, kIn}), other = randn({8, kIn});
  const at::Tensor dense = backward({x, x, x, other});
  CHECK(same_bits(sets(), at::tensor({0, 0, 0, 3}, at::kLong)));
  CHECK(same_bits(dense[0], dense[2]));
  CHECK(error(dense[0], outer(x) / 8) < 1e-12);
  CHECK(error(dense[3], outer(other) / 8) < 1e-12);
  const at::Tensor second = backward({x, x, other, other});
  CHECK(same_bits(sets(), at::tensor({0, 0, 2, 3}, at::kLong)));
  CHECK(error(second[2], (outer(x) + outer(other)) / 16) < 1e-12);
  backward({x, x, x, x});
  CHECK(same_bits(sets(), at::tensor({0, 0, 2, 3}, at::kLong)));
}

TEST_CASE("an unobserved layer takes its gradients as rows, from B = 0 on the identity") {
  at::manual_seed(7);
  Layers own(1, exact(), /*trained=*/false);
  LoraPair& pair = own.pairs[0];
  pair.a.mutable_grad() = at::zeros({kRank, kIn}, at::kDouble);
  pair.b.mutable_grad() = randn({kOut, kRank});
  own.step();
  const ctrlora::KroneckerFactors& factors = own.group->factors();
  CHECK(same_bits(factors.seen, at::zeros({1}, at::kDouble)));
  CHECK(error(factors.input.to_dense()[0], at::eye(kIn, at::kDouble)) < 1e-14);
  own.random_gradients();
  own.step();
  const auto unit = [](const at::Tensor& moment) {
    return moment * (static_cast<double>(moment.size(0)) / moment.trace());
  };
  CHECK(error(factors.input.to_dense()[0], unit(outer(pair.a.grad()))) < 1e-11);
  CHECK(error(factors.output.to_dense()[0], unit(outer(pair.b.grad().t()))) < 1e-11);
  CHECK(same_bits(factors.absolute, at::zeros({1}, at::kBool)));
}
