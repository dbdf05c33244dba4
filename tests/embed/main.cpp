// A C++ training program: a byte-level language model whose adapters learn a text, without Python.
//
//   ctrlora_embed TEXT CHECKPOINT STEPS [SECONDS]
//
// Trains up to STEPS steps and prints "step loss", the loss as its float's bits. A checkpoint after
// every step; if there is one, the run goes on from it. SECONDS to sleep after each step, so that
// somebody has the time to kill it.
#include <ctrlora/ctrlora.h>
#include <torch/torch.h>

#include <bit>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>

namespace {

constexpr int64_t kWidth = 32, kContext = 8, kBatch = 32, kSymbols = 256;

// Predicts a byte from the eight before it: frozen layers with adapters, a trained head.
struct ModelImpl : torch::nn::Module {
  torch::nn::Embedding table;
  ctrlora::LoRALinear hidden, deep;
  torch::nn::Linear head;

  // One after the other: Python's twin in test_embed.py draws its numbers in this order.
  ModelImpl() : table(nullptr), hidden(nullptr), deep(nullptr), head(nullptr) {
    table = register_module("table", torch::nn::Embedding(kSymbols, kWidth));
    table->weight.requires_grad_(false);
    const torch::nn::Linear first(kContext * kWidth, kWidth);
    hidden = register_module("hidden", ctrlora::LoRALinear(first, 4, 8.0, "hidden"));
    const torch::nn::Linear second(kWidth, kWidth);
    deep = register_module("deep", ctrlora::LoRALinear(second, 4, 8.0, "deep"));
    head = register_module("head", torch::nn::Linear(kWidth, kSymbols));
    ctrlora::register_head(head->weight);  // steps heed what it knows; before the optimizer
  }
  at::Tensor forward(const at::Tensor& bytes) {
    const at::Tensor x = table(bytes).flatten(1);
    const at::Tensor read = torch::tanh(deep(torch::tanh(hidden(x))));
    return ctrlora::watch_head(head->weight, read, head(read));
  }
};
TORCH_MODULE(Model);

at::Tensor read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  TORCH_CHECK(text.size() > kContext + 1, "expected a text longer than nine bytes in ", path);
  const auto options = torch::TensorOptions().dtype(torch::kUInt8);
  return torch::from_blob(const_cast<char*>(text.data()), {static_cast<int64_t>(text.size())},
                          options)
      .to(torch::kLong);
}

at::Tensor loss_at(Model& model, const at::Tensor& text, int64_t step) {
  auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(step));
  const at::Tensor at = torch::randint(text.size(0) - kContext, {kBatch}, generator);
  const at::Tensor window = text.index({at.unsqueeze(1) + torch::arange(kContext + 1)});
  return torch::nn::functional::cross_entropy(model(window.narrow(1, 0, kContext)),
                                              window.select(1, kContext));
}

void save(const std::string& path, Model& model, ctrlora::CTROptimizer& opt, int64_t step) {
  torch::serialize::OutputArchive archive, weights, optimizer;
  model->save(weights);
  opt.save(optimizer);
  archive.write("model", weights);
  archive.write("optimizer", optimizer);
  archive.write("step", c10::IValue(step));
  ctrlora::save_atomically(archive, path);
}

int64_t resume(const std::string& path, Model& model, ctrlora::CTROptimizer& opt) {
  if (!std::filesystem::exists(path)) {
    return 0;
  }
  torch::serialize::InputArchive archive, weights, optimizer;
  archive.load_from(path);
  archive.read("model", weights);
  archive.read("optimizer", optimizer);
  model->load(weights);
  opt.load(optimizer);
  c10::IValue step;
  archive.read("step", step);
  return step.toInt();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: ctrlora_embed TEXT CHECKPOINT STEPS [SECONDS]\n");
    return 2;
  }
  torch::set_num_threads(1);
  const at::Tensor text = read_text(argv[1]);
  const std::string checkpoint = argv[2];
  const int64_t steps = std::atoll(argv[3]);
  const double pause = argc > 4 ? std::atof(argv[4]) : 0.0;

  torch::manual_seed(0);
  Model model;
  ctrlora::CTROptimizer opt(model->parameters(), ctrlora::CTROptions(0.1).total_steps(steps));
  for (int64_t step = resume(checkpoint, model, opt); step < steps; ++step) {
    opt.zero_grad();
    const at::Tensor loss = loss_at(model, text, step);
    loss.backward();
    opt.step();
    save(checkpoint, model, opt, step + 1);
    const auto value = loss.item<float>();
    std::printf("%lld %08x %.6f\n", static_cast<long long>(step), std::bit_cast<uint32_t>(value),
                static_cast<double>(value));
    std::fflush(stdout);
    std::this_thread::sleep_for(std::chrono::duration<double>(pause));
  }
  return 0;
}
