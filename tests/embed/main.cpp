// A C++ user's first program: one frozen layer, its adapter trained by the engine alone.
#include <ctrlora/ctrlora.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdio>

int main() {
  torch::manual_seed(0);
  const int64_t features = 32;
  const int64_t rank = 4;
  const double width = std::sqrt(static_cast<double>(features));
  const at::Tensor base = torch::randn({features, features}) / width;
  const at::Tensor shift = torch::randn({features, rank}).mm(torch::randn({rank, features}));
  const at::Tensor target = base + shift / (2 * width);

  const ctrlora::LoraPair pair{
      .a = (torch::randn({rank, features}) / width).requires_grad_(),
      .b = torch::zeros({features, rank}).requires_grad_(),
      .scaling = 2.0,
      .name = "layer",
  };
  const auto slot = ctrlora::register_pair(pair);
  ctrlora::Engine engine{ctrlora::Options{}};
  engine.add_pairs({pair}, /*group=*/0);

  double first = 0.0;
  double last = 0.0;
  for (int step = 0; step < 20; ++step) {
    const at::Tensor x = torch::randn({256, features});
    const at::Tensor y =
        ctrlora::lora_linear(x, base, {}, pair.a, pair.b, pair.scaling, slot, /*transposed=*/false);
    const at::Tensor loss = torch::mse_loss(y, x.mm(target.t()));
    pair.a.mutable_grad().reset();
    pair.b.mutable_grad().reset();
    loss.backward();
    engine.step({ctrlora::GroupSettings{.lr = 0.2, .initial_lr = 0.2}});
    last = loss.item<double>();
    first = step == 0 ? last : first;
  }
  std::printf("loss %.4f -> %.4f in 20 steps\n", first, last);
  return last < 0.5 * first ? 0 : 1;
}
