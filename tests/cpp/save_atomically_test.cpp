// save_atomically: the old file or the new one, whatever happens in between.
#include <ATen/ops/full.h>
#include <torch/serialize.h>

#include <sys/resource.h>

#include <csignal>
#include <filesystem>

#include "ctrlora/ctr_optimizer.h"
#include "problems.h"

TEST_CASE("save_atomically leaves the old file or the new one") {
  const auto folder = std::filesystem::temp_directory_path() / "ctrlora_save_test";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  const std::string path = (folder / "run.pt").string();
  const auto write = [&](double value) {
    torch::serialize::OutputArchive archive;
    archive.write("value", at::full({3}, value), /*is_buffer=*/true);
    ctrlora::save_atomically(archive, path);
  };
  write(1.0);
  write(2.0);
  torch::serialize::InputArchive archive;
  archive.load_from(path);
  at::Tensor value;
  archive.read("value", value, /*is_buffer=*/true);
  CHECK(value[0].item<double>() == 2.0);
  CHECK(std::distance(std::filesystem::directory_iterator(folder), {}) == 1);  // nothing left over
  std::signal(SIGXFSZ, SIG_IGN);  // a full disk: write() fails instead
  for (const rlim_t room : {0, 100, 700}) {
    rlimit limit{};
    ::getrlimit(RLIMIT_FSIZE, &limit);
    const rlimit small{room, limit.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &small);
    CHECK_THROWS_WITH_AS(write(3.0), doctest::Contains("File too large. Remedy: free space"),
                         c10::Error);
    ::setrlimit(RLIMIT_FSIZE, &limit);
    torch::serialize::InputArchive old;
    old.load_from(path);
    old.read("value", value, /*is_buffer=*/true);
    CHECK(value[0].item<double>() == 2.0);
    CHECK(std::distance(std::filesystem::directory_iterator(folder), {}) == 1);
  }
  torch::serialize::OutputArchive lost;
  CHECK_THROWS(ctrlora::save_atomically(lost, (folder / "none" / "run.pt").string()));
  std::filesystem::remove_all(folder);
}
