#include "ctrlora/side_stream.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/ParallelGuard.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "detail/check.h"
#include "detail/tensor_math.h"

namespace ctrlora {

/// One device's side stream: work on it runs in the order of submission.
struct SideStream::DeviceSide {
  explicit DeviceSide(at::Device own)
      : device(own),
        guard(own.type()),
        stream(guard.getStreamFromGlobalPool(own, /*isHighPriority=*/false)),
        done(own.type()) {}

  at::Device device;
  c10::impl::VirtualGuardImpl guard;
  c10::Stream stream;
  c10::Event done;                  // after the last work
  bool waiting = false;             // the caller's stream has not waited for it yet
  std::vector<at::Tensor> tensors;  // alive until then
};

/// One thread that runs work in the order of submission.
class SideStream::Worker {
 public:
  Worker() : thread_([this] { loop(); }) {}

  ~Worker() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();  // what was submitted is done first
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void submit(std::function<void()> work) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(work));
    }
    changed_.notify_all();
  }

  void join() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return queue_.empty(); });
  }

 private:
  void loop() {
    // The cores belong to training: nothing here opens a parallel region of its own.
    const c10::ParallelGuard serial(true);
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) {
        return;
      }
      const std::function<void()>& work = queue_.front();  // stays there until it is done
      lock.unlock();
      work();
      lock.lock();
      queue_.pop_front();
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

SideStream::SideStream(const std::string& overlap) : overlap_(overlap) {
  CTRLORA_CHECK(
      overlap == "inline" || overlap == "thread" || overlap == "stream" || overlap == "auto",
      "ctrlora::SideStream", "overlap = '", overlap,
      "'. Violated constraint: 'inline', 'thread', 'stream' or 'auto'.");
}

SideStream::~SideStream() = default;

bool SideStream::overlaps(at::Device device) const {
  return overlap_ == "thread" || overlap_ == "stream" || (overlap_ == "auto" && !device.is_cpu());
}

bool SideStream::on_worker(const std::string& overlap, at::Device device) {
  return overlap == "thread" || (overlap == "stream" && device.is_cpu());
}

void SideStream::run(const std::function<void()>& work) noexcept {
  std::string error;
  try {
    const detail::NumericsGuard guard;
    work();
    return;
  } catch (const c10::Error& thrown) {
    error = thrown.what_without_backtrace();
  } catch (const std::exception& thrown) {
    error = thrown.what();
  } catch (...) {
    error = "unknown exception";
  }
  if (error_.empty()) {
    error_ = error.empty() ? "unknown exception" : error;
  }
}

void SideStream::submit(at::Device device,
                        std::vector<at::Tensor> tensors,
                        std::function<void()> work) {
  if (!overlaps(device)) {
    run(work);
  } else if (on_worker(overlap_, device)) {
    if (worker_ == nullptr) {
      worker_ = std::make_unique<Worker>();
    }
    worker_->submit([this, kept = std::move(tensors), own = std::move(work)] { run(own); });
  } else {
    submit_to_stream(device, std::move(tensors), work);
  }
}

SideStream::DeviceSide& SideStream::side_of(at::Device device) {
  for (const auto& side : sides_) {
    if (side->device == device) {
      return *side;
    }
  }
  sides_.push_back(std::make_unique<DeviceSide>(device));
  return *sides_.back();
}

void SideStream::submit_to_stream(at::Device device,
                                  std::vector<at::Tensor> tensors,
                                  const std::function<void()>& work) {
  DeviceSide& side = side_of(device);
  const c10::Stream caller = side.guard.getStream(device);
  c10::Event written(device.type());
  written.record(caller);
  written.block(side.stream);
  for (at::Tensor& tensor : tensors) {
    side.guard.recordDataPtrOnStream(tensor.storage().data_ptr(), side.stream);
    side.tensors.push_back(std::move(tensor));
  }
  side.guard.exchangeStream(side.stream);
  run(work);
  side.guard.exchangeStream(caller);
  side.done.record(side.stream);
  side.waiting = true;
}

void SideStream::join() {
  for (const auto& side : sides_) {
    if (side->waiting) {
      side->done.block(side->guard.getStream(side->device));
      side->tensors.clear();
      side->waiting = false;
    }
  }
  if (worker_ != nullptr) {
    worker_->join();
  }
}

std::string SideStream::take_error() {
  return std::exchange(error_, {});
}

}  // namespace ctrlora
