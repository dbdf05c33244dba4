#include "ctrlora/layer_group.h"

#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "problems.h"

namespace {

using at::matmul;
using ctrlora::GroupSettings;
using ctrlora::LayerGroup;
using ctrlora::LoraPair;
using ctrlora::ObservationSlot;
using ctrlora::Options;
using problems::contains;
using problems::error;
using problems::error_of;
using problems::numbers;
using problems::randn;
using problems::same_bits;

constexpr int64_t kIn = 6;
constexpr int64_t kOut = 5;
constexpr int64_t kRank = 2;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Layers with slots and a group over them.
struct Layers {
  std::vector<LoraPair> pairs;
  std::vector<std::shared_ptr<ObservationSlot>> slots;
  std::shared_ptr<LayerGroup> group;

  explicit Layers(int64_t count,
                  const Options& options = {},
                  bool trained = true,
                  at::ScalarType dtype = at::kDouble) {
    for (int64_t l = 0; l < count; ++l) {
      pairs.push_back(problems::make_pair(kOut, kIn, kRank, trained, dtype));
      pairs.back().name = "layer " + std::to_string(l);
      slots.push_back(ctrlora::register_pair(pairs.back()));
    }
    const auto sampler = std::make_shared<ctrlora::RowSampler>(options.sample_rows, options.seed);
    group = std::make_shared<LayerGroup>(pairs, 0, options, sampler);
    LayerGroup::connect(group);
  }
  [[nodiscard]] at::Tensor state(const std::string& name) const {
    for (const auto& [own, tensor] : group->named_tensors()) {
      if (own == name) {
        return tensor;
      }
    }
    FAIL("no state named " << name);
    return {};
  }
  void random_gradients() {
    for (LoraPair& pair : pairs) {
      pair.a.mutable_grad() = randn(pair.a.sizes(), pair.a.scalar_type());
      pair.b.mutable_grad() = randn(pair.b.sizes(), pair.b.scalar_type());
    }
  }
  void observe(int64_t layer, const at::Tensor& x, const at::Tensor& g, const at::Tensor& y = {}) {
    slots[static_cast<size_t>(layer)]->capture(x, y)->complete(g);
  }
  void step(const GroupSettings& settings = {}) {
    group->bind();
    group->update_momentum();
    group->commit_observations();
    group->apply(group->propose(settings), at::ones({1}, at::kDouble), settings);
    group->finish();
  }
};

/// Bases of full size: every factor is exact.
Options exact() {
  Options options;
  options.sketch_rank = 64;
  return options;
}

at::Tensor outer(const at::Tensor& rows) {
  return matmul(rows.t(), rows);
}

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
    own->group->commit_observations();
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
  own.group->commit_observations();
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
  own.group->commit_observations();
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

TEST_CASE(
    "momentum is an EMA with bias correction; a layer without a finite gradient keeps its own") {
  at::manual_seed(8);
  Layers own(3);
  own.random_gradients();
  own.group->update_momentum();
  const at::Tensor grad = own.pairs[0].b.grad().clone(), first = own.state("momentum_b").clone();
  CHECK(error(first[0], 0.2 * grad) < 1e-14);
  own.random_gradients();
  own.pairs[1].a.mutable_grad().select(0, 1).select(0, 3).fill_(kNan);
  own.pairs[2].b.mutable_grad().reset();  // half a pair has no tangent step
  own.group->update_momentum();
  CHECK(error(own.state("momentum_b")[0], 0.8 * 0.2 * grad + 0.2 * own.pairs[0].b.grad()) < 1e-14);
  CHECK(same_bits(own.state("momentum_b").slice(0, 1), first.slice(0, 1)));
  CHECK(error(own.state("momentum_weight"), numbers({1 - 0.64, 0.2, 0.2})) < 1e-14);
  CHECK(same_bits(own.group->skipped(), at::tensor({0, 1, 0}, at::kLong)));
  const ctrlora::Proposal proposal = own.group->propose({});
  CHECK(same_bits(proposal.ok, numbers({1.0, 0.0, 0.0}) > 0));
  CHECK(error(proposal.momentum_factor, 1 / numbers({1 - 0.64, 0.2, 0.2})) < 1e-14);
}

TEST_CASE("the update is (1 - lr wd) W + f delta, for all ranks, dtypes and sizes of the kernels") {
  at::manual_seed(9);
  for (const auto& [m, n, r] : {std::array<int64_t, 3>{3, 2, 1},
                                {9, 14, 3},
                                {40, 24, 4},
                                {1030, 33, 8},
                                {70, 2100, 16},
                                {100, 90, 20}}) {
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
      Options options;
      options.sketch_rank = 6;
      const std::vector<LoraPair> pairs = {problems::make_pair(m, n, r, true, dtype),
                                           problems::make_pair(m, n, r, true, dtype)};
      LayerGroup group(pairs, 0, options, std::make_shared<ctrlora::RowSampler>(8, 0));
      for (const LoraPair& pair : pairs) {
        pair.a.mutable_grad() = randn({r, n}, dtype);
        pair.b.mutable_grad() = randn({m, r}, dtype);
      }
      group.update_momentum();
      group.commit_observations();
      const GroupSettings settings{.lr = 0.2, .weight_decay = 0.1};
      const ctrlora::Proposal own = group.propose(settings);
      REQUIRE(own.ok.all().item<bool>());
      const auto wide = [](const at::Tensor& x) { return x.detach().to(at::kDouble); };
      const auto delta = [&](const ctrlora::SideStep& step, const at::Tensor& weight,
                             const at::Tensor& grad, const at::Tensor& basis, int64_t l) {
        // The bias-corrected momentum of a first step is the gradient itself.
        return matmul(grad, step.momentum[l]) + matmul(basis, step.basis[l]) +
               matmul(weight, step.weight[l]);
      };
      std::vector<at::Tensor> expected;
      for (int64_t l = 0; l < 2; ++l) {
        const LoraPair& pair = pairs[static_cast<size_t>(l)];
        const at::Tensor f = own.length[l] * 0.5, a = wide(pair.a), b = wide(pair.b);
        const at::Tensor u = wide(group.factors().input.basis()[l]);
        const at::Tensor v = wide(group.factors().output.basis()[l]);
        expected.push_back(0.98 * a +
                           f * delta(own.step.a, a.t(), wide(pair.a.grad()).t(), u, l).t());
        expected.push_back(0.98 * b + f * delta(own.step.b, b, wide(pair.b.grad()), v, l));
      }
      group.apply(own, at::full({1}, 0.5, at::kDouble), settings);
      const double tolerance = dtype == at::kDouble ? 1e-12 : 1e-5;
      for (size_t l = 0; l < 2; ++l) {
        CAPTURE(r);
        CHECK(error(pairs[l].a.detach(), expected[2 * l]) < tolerance);
        CHECK(error(pairs[l].b.detach(), expected[2 * l + 1]) < tolerance);
      }
    }
  }
}

TEST_CASE("failed layers are taken out once and stand still from then on") {
  at::manual_seed(10);
  Layers own(3);
  own.random_gradients();
  own.step();
  CHECK(own.group->take_failed().empty());
  own.state("misses").select(0, 1).fill_(5);
  own.state("factor_misses").select(0, 2).fill_(5);
  const std::vector<LoraPair> failed = own.group->take_failed();
  REQUIRE(failed.size() == 2);
  CHECK(failed[0].name == "layer 1");
  CHECK(failed[1].name == "layer 2");
  CHECK(own.group->take_failed().empty());
  const at::Tensor before = own.pairs[1].b.detach().clone();
  const at::Tensor other = own.pairs[0].b.detach().clone();
  own.step({.weight_decay = 0.5});
  CHECK(same_bits(own.pairs[1].b.detach(), before));
  CHECK_FALSE(same_bits(own.pairs[0].b.detach(), other));
  CHECK_FALSE(own.slots[1]->wanted());
}

TEST_CASE("the gauge is balanced after the first step and every balance_every steps") {
  at::manual_seed(11);
  Options options = exact();
  options.balance_every = 3;
  options.whitening = 0.0;  // the Grams are B'B and AA'
  Layers own(2, options);
  for (int64_t t = 1; t <= 7; ++t) {
    own.random_gradients();
    own.step();
    for (const LoraPair& pair : own.pairs) {
      const at::Tensor p = outer(pair.b.detach()), q = outer(pair.a.detach().t());
      CHECK((error(p, q) < 1e-10) == (t == 1 || t % 3 == 0));
    }
  }
}
