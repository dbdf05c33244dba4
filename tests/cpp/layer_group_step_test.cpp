#include "ctrlora/layer_group.h"

#include <array>
#include <memory>
#include <vector>

#include "layer_model.h"

namespace {

using at::matmul;
using ctrlora::GroupSettings;
using ctrlora::LayerGroup;
using ctrlora::LoraPair;
using ctrlora::Options;
using layer_model::exact;
using layer_model::kNan;
using layer_model::Layers;
using layer_model::outer;
using problems::error;
using problems::numbers;
using problems::randn;
using problems::same_bits;

}  // namespace

TEST_CASE(
    "momentum is an EMA with bias correction; a layer without a finite gradient keeps its own") {
  at::manual_seed(8);
  Options options;
  options.beta1 = 0.8;
  Layers own(3, options);
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
  ctrlora::LayerGroup::commit_observations({own.group.get()}, own.side);
  const ctrlora::Proposal proposal = Layers::propose(*own.group, own.options);
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
      ctrlora::SideStream side;
      LayerGroup::commit_observations({&group}, side);
      const GroupSettings settings{.lr = 0.2, .weight_decay = 0.1};
      const ctrlora::Proposal own = Layers::propose(group, options, settings);
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

TEST_CASE("Grams carried by the update's coefficients are those of the parameters as they are") {
  at::manual_seed(12);
  Options options;
  options.sketch_rank = 3;
  options.factor_every = 1000;
  options.balance_every = 7;
  Layers own(20, options);
  const auto check = [&](double tolerance) {
    for (size_t l = 0; l < own.pairs.size(); ++l) {
      const at::Tensor a = own.pairs[l].a.detach(), b = own.pairs[l].b.detach();
      const auto layer = static_cast<int64_t>(l);
      const at::Tensor u = own.group->factors().input.basis()[layer];
      const at::Tensor v = own.group->factors().output.basis()[layer];
      CHECK(error(own.state("input.ww")[layer], outer(a.t())) < tolerance);
      CHECK(error(own.state("output.ww")[layer], outer(b)) < tolerance);
      CHECK(error(own.state("input.uw")[layer], matmul(u.t(), a.t())) < tolerance);
      CHECK(error(own.state("output.uw")[layer], matmul(v.t(), b)) < tolerance);
    }
  };
  for (int64_t t = 0; t < 24; ++t) {
    own.random_gradients();
    own.step({.weight_decay = 0.3});
    check(1e-12);
  }
  for (LoraPair& pair : own.pairs) {  // somebody else writes to a parameter
    pair.a.detach().mul_(3.0);
  }
  own.group->bind();
  ctrlora::LayerGroup::commit_observations({own.group.get()}, own.side);
  check(1e-12);
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
