#include "ctrlora/side_stream.h"

#include <stdexcept>
#include <thread>
#include <vector>

#include "problems.h"

TEST_CASE("work runs in order, sees what was written before, and is done after join") {
  ctrlora::SideStream stream;
  at::Tensor shared = at::zeros({3});
  std::vector<int> order;
  shared.fill_(1.0);
  stream.submit([&] {
    order.push_back(1);
    shared.mul_(2.0);
  });
  stream.submit([&] {
    order.push_back(2);
    shared.add_(1.0);
  });
  stream.join();
  CHECK(order == std::vector<int>{1, 2});
  CHECK(problems::same_bits(shared, at::full({3}, 3.0)));
  stream.join();  // nothing left: returns
}

TEST_CASE("the inline path runs at once on the caller's thread") {
  ctrlora::SideStream stream;
  std::thread::id worker;
  stream.submit([&] { worker = std::this_thread::get_id(); });
  CHECK(worker == std::this_thread::get_id());
}

TEST_CASE("an error of the work reaches the caller and the stream stays usable") {
  ctrlora::SideStream stream;
  CHECK_THROWS_AS(stream.submit([] { throw std::runtime_error("no memory"); }), std::runtime_error);
  bool ran = false;
  stream.submit([&] { ran = true; });
  stream.join();
  CHECK(ran);
}
