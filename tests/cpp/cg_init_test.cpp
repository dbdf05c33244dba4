// Start values from calibration batches against a dense float64 reference; the slots' borrowing.
#include "ctrlora/cg_init.h"

#include <cmath>

#include "ctrlora/observation.h"
#include "problems.h"

namespace {

using ctrlora::CgInit;
using ctrlora::CgInitOptions;
using ctrlora::LayerInit;
using ctrlora::LoraPair;
using problems::contains;
using problems::dense_power;
using problems::error;
using problems::error_of;
using problems::randn;

constexpr int64_t kIn = 9, kOut = 7, kRank = 3;

CgInitOptions options_of(int64_t batches = 4) {
  CgInitOptions options;
  options.batches = batches;
  options.sketch_rank = 64;
  return options;
}

struct Batch {
  at::Tensor x, y, g;  // (N, n), (N, m), (N, m)
};

// Batches of one layer y = x W^T whose gradients agree on a rank-3 map.
struct Layer {
  explicit Layer(const std::string& name,
                 int64_t in = kIn,
                 int64_t out = kOut,
                 at::ScalarType dtype = at::kDouble)
      : pair(problems::make_pair(out, in, kRank, /*trained=*/true, dtype)),
        weight(randn({out, in})),
        map(at::matmul(randn({in, kRank}), randn({kRank, out}))) {
    pair.name = name;
    slot = ctrlora::register_pair(pair);
  }
  [[nodiscard]] Batch batch(int64_t rows, double noise = 0.3) const {
    const at::Tensor x = randn({rows, map.size(0)}) * at::arange(1, map.size(0) + 1).pow(-0.5);
    const at::Tensor g = at::matmul(x, map) + noise * randn({rows, map.size(1)});
    return {x, at::matmul(x, weight.t()), g / static_cast<double>(rows)};
  }
  void see(const Batch& batch) const {
    const auto capture = slot->capture(batch.x, batch.y);
    REQUIRE(capture != nullptr);
    capture->complete(batch.g);
  }
  LoraPair pair;
  at::Tensor weight, map;
  std::shared_ptr<ctrlora::ObservationSlot> slot;
};

std::vector<Batch> batches_of(const Layer& layer, int64_t count = 4, double noise = 0.3) {
  std::vector<Batch> out;
  for (int64_t i = 0; i < count; ++i) {
    out.push_back(layer.batch(300 + i, noise));
  }
  return out;
}

void run(CgInit& init, const Layer& layer, const std::vector<Batch>& batches) {
  for (const Batch& batch : batches) {
    layer.see(batch);
    CHECK(init.end_batch() == 1);
  }
}

// s B A of the method page, from dense factors of the first batch and G of the others.
at::Tensor reference(const Layer& layer, const std::vector<Batch>& batches, double whitening) {
  const auto mean = [](const at::Tensor& x) {
    return (at::matmul(x.t(), x) / static_cast<double>(x.size(0))).unsqueeze(0);
  };
  const at::Tensor omega = mean(batches[0].x);
  const at::Tensor s = mean(batches[0].g * static_cast<double>(batches[0].g.size(0)));
  at::Tensor gradient = at::zeros({layer.map.size(1), layer.map.size(0)}, at::kDouble);
  for (size_t i = 1; i < batches.size(); ++i) {
    gradient = gradient + at::matmul(batches[i].g.t(), batches[i].x) / 3.0;
  }
  const at::Tensor left = dense_power(s, -0.5 * whitening, 0.01)[0];
  const at::Tensor right = dense_power(omega, -0.5 * whitening, 0.01)[0];
  const auto [u, values, vh] = at::linalg_svd(at::matmul(at::matmul(left, gradient), right));
  const at::Tensor core =
      at::matmul(u.narrow(1, 0, kRank) * values.narrow(0, 0, kRank), vh.narrow(0, 0, kRank));
  const at::Tensor change = -at::matmul(at::matmul(left, core), right);
  const auto output_norm = [&](const at::Tensor& d) {
    return (at::matmul(d, omega[0]) * d).sum().sqrt();
  };
  return change * (0.01 * output_norm(layer.weight) / output_norm(change));
}

}  // namespace

TEST_CASE("start values are the method's, against dense factors and a dense decomposition") {
  at::manual_seed(0);
  for (const double whitening : {0.0, 0.5, 1.0}) {
    const Layer layer("layer");
    const std::vector<Batch> batches = batches_of(layer);
    CgInitOptions options = options_of();
    options.whitening = whitening;
    CgInit init({layer.pair}, options);
    run(init, layer, batches);
    const LayerInit got = init.finish().at(0);
    CHECK(got.name == "layer");
    CHECK(got.kept == kRank);
    CHECK(got.rows == 301 + 302 + 303);
    CHECK(got.radius == 0.01);
    CHECK(got.energy_kept > 0.9);
    CHECK(error(layer.pair.scaling * at::matmul(got.b, got.a),
                reference(layer, batches, whitening)) < 1e-7);
    CHECK(error(got.b.norm(), got.a.norm()) < 1e-9);  // the scalar gauge
    const at::Tensor ratio = got.b.norm(2, {0}) / got.b.norm(2, {0})[0];
    CHECK(ratio.isfinite().all().item<bool>());
  }
}

TEST_CASE("the units of the loss do not matter") {
  at::manual_seed(1);
  const Layer layer("layer");
  const std::vector<Batch> batches = batches_of(layer);
  CgInit init({layer.pair}, options_of());
  run(init, layer, batches);
  const LayerInit plain = init.finish().at(0);
  init.release();
  CgInit again({layer.pair}, options_of());
  for (const Batch& batch : batches) {
    layer.see({batch.x, batch.y, batch.g * 1000.0});
    again.end_batch();
  }
  const LayerInit scaled = again.finish().at(0);
  CHECK(error(at::matmul(scaled.b, scaled.a), at::matmul(plain.b, plain.a)) < 1e-9);
  CHECK(error(scaled.a.norm(2, {1}), plain.a.norm(2, {1})) < 1e-9);  // signs are free
  CHECK(scaled.effective_samples == doctest::Approx(plain.effective_samples));
}

TEST_CASE("directions that are noise are filled with random whitened ones at zero B") {
  at::manual_seed(2);
  Layer layer("layer", 40, 30);
  layer.map.zero_();
  CgInit init({layer.pair}, options_of(8));
  for (int i = 0; i < 8; ++i) {
    layer.see(layer.batch(200, 1.0));
    init.end_batch();
  }
  const LayerInit got = init.finish().at(0);
  CHECK(got.kept < kRank);
  CHECK(got.noise_floor > 0.8 * got.spectrum[0].item<double>());
  CHECK(got.b.abs().amax(0).gt(0).sum().item<int64_t>() == got.kept);
  CHECK(got.a.norm(2, {1}).gt(0).all().item<bool>());
  CHECK(std::get<1>(at::linalg_svd(got.a))[-1].item<double>() > 1e-3 * got.a.norm().item<double>());
}

TEST_CASE("more ranks than the gradient has: the rest is filled") {
  at::manual_seed(3);
  const Layer layer("layer", kIn, 2);  // m < r
  CgInit init({layer.pair}, options_of());
  run(init, layer, batches_of(layer));
  const LayerInit got = init.finish().at(0);
  CHECK(got.a.sizes() == at::IntArrayRef({kRank, kIn}));
  CHECK(got.b.sizes() == at::IntArrayRef({2, kRank}));
  CHECK(got.kept == 2);
  CHECK(got.b.select(1, 2).eq(0).all().item<bool>());
  CHECK(got.a[2].norm().item<double>() > 0.0);
}

TEST_CASE("zero_b gives the same A and keeps the function") {
  at::manual_seed(4);
  const Layer layer("layer");
  const std::vector<Batch> batches = batches_of(layer);
  CgInit init({layer.pair}, options_of());
  run(init, layer, batches);
  const LayerInit guided = init.finish().at(0);
  init.release();
  CgInitOptions options = options_of();
  options.zero_b = true;
  CgInit zero({layer.pair}, options);
  run(zero, layer, batches);
  zero.apply(zero.finish());
  CHECK(problems::same_bits(layer.pair.a.detach(), guided.a));
  CHECK(layer.pair.b.eq(0).all().item<bool>());
  CHECK(zero.finish().at(0).radius == 0.0);
}

TEST_CASE("layers of several shapes and dtypes; one that nothing calls keeps what it has") {
  at::manual_seed(5);
  const Layer one("one"), two("two", 20, 12, at::kFloat), three("three"), idle("idle");
  const at::Tensor idle_a = idle.pair.a.detach().clone();
  const at::Tensor idle_b = idle.pair.b.detach().clone();
  CgInit init({one.pair, two.pair, three.pair, idle.pair}, options_of());
  CHECK(init.bytes() > 0);
  for (int i = 0; i < 4; ++i) {
    const Batch batch = one.batch(40);
    one.see(batch);
    three.see({batch.x, batch.y, batch.g});  // shares its input
    const Batch wide = two.batch(40);
    two.see({wide.x.to(at::kBFloat16), wide.y.to(at::kFloat), wide.g.to(at::kBFloat16)});
    CHECK(init.end_batch() == 3);
  }
  const std::vector<LayerInit> got = init.finish();
  CHECK(got[1].name == "two");
  CHECK((got[1].a.scalar_type() == at::kFloat));
  CHECK(got[3].rows == 0);
  CHECK(error(got[2].spectrum, got[0].spectrum) < 1e-9);
  init.apply(got);
  CHECK(error(one.pair.b.detach(), got[0].b) == 0.0);
  CHECK(problems::same_bits(idle.pair.a.detach(), idle_a));
  CHECK(problems::same_bits(idle.pair.b.detach(), idle_b));
}

namespace {

// Another listener, as an engine would be.
struct Listener : ctrlora::ObservationSink {
  ctrlora::RowSampler& sampler() override { return rows; }
  int64_t micro_batch(int64_t /*layer*/) const override { return 0; }
  void observe(int64_t layer, const ctrlora::Observation& /*rows*/) override { last = layer; }
  ctrlora::RowSampler rows{4, 0};
  int64_t last = -1;
};

}  // namespace

TEST_CASE("slots and b come back as they were, unless start values were written") {
  at::manual_seed(6);
  const Layer layer("layer");
  const auto listener = std::make_shared<Listener>();
  layer.slot->connect(listener, 5);
  const at::Tensor b = layer.pair.b.detach().clone();
  const Batch batch = layer.batch(10);
  {
    const CgInit init({layer.pair}, options_of());
    CHECK(layer.pair.b.eq(0).all().item<bool>());
    CHECK(layer.slot->wanted());
    layer.see(batch);
    CHECK(listener->last == -1);
  }
  CHECK(problems::same_bits(layer.pair.b.detach(), b));
  CHECK_FALSE(layer.slot->wanted());
  layer.see(batch);
  CHECK(listener->last == 5);
}

TEST_CASE("what cannot give start values is refused, and nothing is written") {
  at::manual_seed(7);
  const Layer layer("some.layer");
  const at::Tensor a = layer.pair.a.detach().clone();
  const auto message = [&](const std::vector<Batch>& batches) {
    CgInit init({layer.pair}, options_of());
    for (const Batch& batch : batches) {
      layer.see(batch);
      init.end_batch();
    }
    return error_of([&] { init.apply(init.finish()); });
  };
  const std::vector<Batch> good = batches_of(layer);
  CHECK(contains(message({good[0]}), "expected 4 calibration batches; got 1"));
  for (const size_t where : {size_t{0}, size_t{2}}) {
    std::vector<Batch> bad = batches_of(layer);
    bad[where].g[3][1] = NAN;
    CHECK(contains(message(bad),
                   "got NaN or inf among the inputs or output gradients of layer "
                   "'some.layer'"));
    bad = batches_of(layer);
    bad[where].x[3][1] = INFINITY;
    CHECK(contains(message(bad), "expected finite numbers"));
  }
  std::vector<Batch> few = {good[0]};
  for (int i = 0; i < 3; ++i) {
    few.push_back(layer.batch(1));
  }
  few[1].g.zero_();
  CHECK(contains(message(few),
                 "as many rows with a gradient as the rank, 3; got 2 for layer "
                 "'some.layer'"));
  std::vector<Batch> flat = batches_of(layer);
  for (Batch& batch : flat) {
    batch.g.zero_();
  }
  CHECK(contains(message(flat), "expected gradients that are not zero; got none in any of the 1"));
  CHECK(problems::same_bits(layer.pair.a.detach(), a));
}

TEST_CASE("statistics saved and loaded give the same start values, bit for bit") {
  at::manual_seed(8);
  const Layer layer("layer");
  CgInit init({layer.pair}, options_of());
  run(init, layer, batches_of(layer));
  std::map<std::string, at::Tensor> saved;
  for (const auto& [name, tensor] : init.named_tensors()) {
    saved[name] = tensor.clone();
  }
  const LayerInit expected = init.finish().at(0);
  init.release();
  CgInit again({layer.pair}, options_of());
  again.load(saved);
  const LayerInit got = again.finish().at(0);
  CHECK(problems::same_bits(got.a, expected.a));
  CHECK(problems::same_bits(got.b, expected.b));
  CHECK(problems::same_bits(got.split_half, expected.split_half));

  saved["group0.half1.range"] = at::zeros({1, 2, 3});
  saved.erase("group0.rows");
  CgInit other({layer.pair}, options_of());
  const std::string message = error_of([&] { other.load(saved); });
  CHECK(contains(message, "group0.rows is missing"));
  CHECK(contains(message, "group0.half1.range has shape [1, 2, 3], not [1, 7, 7]"));
}

TEST_CASE("an input that is overwritten before its backward is not used; later ones are copied") {
  at::manual_seed(9);
  const Layer layer("layer");
  CgInit init({layer.pair}, options_of());
  Batch batch = layer.batch(20);
  const auto overwrite = [&] {
    const auto capture = layer.slot->capture(batch.x, batch.y);
    batch.x.add_(1.0);
    capture->complete(batch.g);
  };
  overwrite();
  CHECK(init.end_batch() == 0);
  overwrite();
  CHECK(init.end_batch() == 1);
}

TEST_CASE("shift_base takes the start values out of the base") {
  at::manual_seed(10);
  const at::Tensor a = randn({3, 20}), b = randn({1500, 3});
  const at::Tensor weight = randn({1500, 20});
  const at::Tensor expected = weight - 2.0 * at::matmul(b, a);
  const at::Tensor plain = weight.clone();
  ctrlora::shift_base(plain, a, b, 2.0, /*transposed=*/false);
  CHECK(error(plain, expected) < 1e-14);
  const at::Tensor turned = weight.t().contiguous();
  ctrlora::shift_base(turned, a, b, 2.0, /*transposed=*/true);
  CHECK(error(turned.t(), expected) < 1e-14);
  const at::Tensor packed = at::zeros({1500, 20}, at::kByte);
  CHECK(contains(error_of([&] { ctrlora::shift_base(packed, a, b, 2.0, false); }),
                 "expected a floating-point weight of 1500 x 20; got [1500, 20] Byte"));
}

TEST_CASE("options and pairs out of range are refused") {
  at::manual_seed(11);
  const Layer layer("layer");
  const auto message = [&](auto change) {
    CgInitOptions options;
    change(options);
    return error_of([&] { const CgInit init({layer.pair}, options); });
  };
  CHECK(contains(message([](CgInitOptions& o) { o.batches = 3; }), "batches = 3. Violated"));
  CHECK(contains(message([](CgInitOptions& o) { o.init_radius = 0.0; }), "init_radius = 0."));
  CHECK(contains(message([](CgInitOptions& o) { o.init_radius = NAN; }), "init_radius = nan."));
  CHECK(contains(message([](CgInitOptions& o) { o.whitening = 1.5; }), "whitening = 1.5."));
  CHECK(contains(message([](CgInitOptions& o) { o.damping = 0.0; }), "damping = 0."));
  CHECK(contains(message([](CgInitOptions& o) { o.sketch_rank = 0; }), "sketch_rank = 0."));
  CHECK(contains(message([](CgInitOptions& o) { o.probes = -1; }), "probes = -1."));
  CHECK(contains(message([](CgInitOptions& o) { o.deviations = -1.0; }), "deviations = -1."));
  CHECK(contains(message([](CgInitOptions& o) { o.dense_limit = 0; }), "dense_limit = 0."));
  CHECK(contains(error_of([] { const CgInit init({}, CgInitOptions{}); }), "got none"));
  const LoraPair stranger = problems::make_pair(4, 5, 2);
  CHECK(contains(error_of([&] { const CgInit init({stranger}, CgInitOptions{}); }),
                 "expected registered pairs; got 'layer'"));
}
