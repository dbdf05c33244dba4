#include "ctrlora/side_stream.h"

#include <atomic>
#include <chrono>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "problems.h"
#include "recording_guard.h"

using ctrlora::SideStream;

namespace recording {
C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl);
}

TEST_CASE("work runs in order, sees what was written before, and is done after join") {
  for (const char* overlap : {"inline", "thread", "stream", "auto"}) {
    SideStream side(overlap);
    at::Tensor shared = at::zeros({3});
    std::vector<int> order;
    for (int round = 0; round < 20; ++round) {
      shared.fill_(1.0);
      side.submit(at::kCPU, {shared}, [&] {
        order.push_back(1);
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        shared.mul_(2.0);
      });
      side.submit(at::kCPU, {shared}, [&] {
        order.push_back(2);
        shared.add_(1.0);
      });
      side.join();
      CHECK(order == std::vector<int>{1, 2});
      CHECK(problems::same_bits(shared, at::full({3}, 3.0)));
      order.clear();
    }
    side.join();  // nothing left: returns
    CHECK(side.take_error().empty());
  }
}

TEST_CASE("inline work runs at once on the caller's thread; a worker runs beside it") {
  SideStream here("inline"), there("thread");
  std::thread::id worker;
  const auto look = [&] { worker = std::this_thread::get_id(); };
  here.submit(at::kCPU, {}, look);
  CHECK(worker == std::this_thread::get_id());
  std::atomic<bool> go{false};
  there.submit(at::kCPU, {}, [&] {
    while (!go.load()) {
      std::this_thread::yield();
    }
    look();
  });
  go = true;  // reached although the work waits for it
  there.join();
  CHECK(worker != std::this_thread::get_id());
  CHECK_FALSE(here.overlaps(at::kCPU));
  CHECK(there.overlaps(at::kCPU));
  CHECK_FALSE(SideStream("auto").overlaps(at::kCPU));
  CHECK(SideStream("auto").overlaps(at::kCUDA));
}

TEST_CASE("what work throws is told after join, once, and the stream stays usable") {
  for (const char* overlap : {"inline", "thread"}) {
    SideStream side(overlap);
    side.submit(at::kCPU, {}, [] { throw std::runtime_error("no memory"); });
    side.submit(at::kCPU, {}, [] { throw std::runtime_error("second"); });
    bool ran = false;
    side.submit(at::kCPU, {}, [&] { ran = true; });
    side.join();
    CHECK(ran);
    CHECK(side.take_error() == "no memory");
    CHECK(side.take_error().empty());
  }
}

TEST_CASE("work submitted but never joined is done when the stream goes; tensors live until then") {
  const at::Tensor result = at::zeros({1});
  {
    SideStream side("thread");
    at::Tensor only_reference = at::ones({1000});
    side.submit(at::kCPU, {only_reference}, [own = only_reference, result] {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      result.copy_(own.sum());
    });
    only_reference.reset();
  }
  CHECK(result.item<float>() == 1000.0F);
}

TEST_CASE("another name is refused") {
  CHECK(problems::error_of([] { SideStream side("later"); }) ==
        "[ctrlora::SideStream] overlap = 'later'. Violated constraint: 'inline', 'thread', "
        "'stream' or 'auto'.");
}

// ---- The device protocol, by happens-before ----

namespace {

const at::Device kDevice(at::kPrivateUse1, 0);

/// Some steps as the engine takes them: sums are written, a refresh reads them and writes the back
/// copy, the next step reads it. `left_out` takes out one wait for an event; -1: none.
/// @return data races found, and the number of waits.
std::pair<size_t, int> run_protocol(int left_out) {
  recording::Recorder& recorder = recording::Recorder::start(left_out);
  {
    SideStream side("stream");
    const at::Tensor sums = at::zeros({1}), back = at::zeros({1});
    for (int step = 0; step < 3; ++step) {
      recorder.read("back");  // publish the refresh of the step before
      recorder.write("back");
      recorder.write("sums");  // backward
      side.submit(kDevice, {sums, back}, [&] {
        recorder.read("sums");
        recorder.write("back");
      });
      side.submit(kDevice, {back}, [&] { recorder.write("back"); });  // in order with the first
      recorder.write("parameters");                                   // the rest of the step
      side.join();
    }
    recorder.read("back");
  }
  return {recorder.races().size(), recorder.waits()};
}

}  // namespace

TEST_CASE("every access to the other stream's data follows a wait for an event recorded after it") {
  const auto [races, waits] = run_protocol(-1);
  CHECK(races == 0);
  CHECK(waits == 9);  // 3 steps: two submissions and a join each
  CHECK(recording::Recorder::current().recorded_tensors() == 9);  // told to the allocator
  CHECK(recording::Recorder::current().stream() == 0);            // the caller's stream is restored
}

TEST_CASE("the checker finds a race when a wait is taken out") {
  const int waits = run_protocol(-1).second;
  int found = 0;
  for (int left_out = 0; left_out < waits; ++left_out) {
    found += run_protocol(left_out).first > 0 ? 1 : 0;
  }
  // Only the wait of each step's second submission is implied by the first's: one stream, in order.
  CHECK(found == waits - 3);
}

TEST_CASE("the caller's stream comes back and the protocol holds when work throws") {
  recording::Recorder& recorder = recording::Recorder::start(-1);
  SideStream side("stream");
  side.submit(kDevice, {at::zeros({1})}, [&] {
    recorder.write("back");
    throw std::runtime_error("lost");
  });
  CHECK(recorder.stream() == 0);
  side.join();
  recorder.read("back");
  CHECK(recorder.races().empty());
  CHECK(side.take_error() == "lost");
}
