// A device guard for PrivateUse1 that computes nothing: it records what streams and events order,
// and finds accesses that nothing orders (vector clocks; Mattern 1989). Checks stream code on any
// machine.
#pragma once

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace recording {

/// What every stream knows of every other one: number of its accesses that are ordered before.
using Clock = std::map<c10::StreamId, int64_t>;

class Recorder {
 public:
  static Recorder& current() { return *instance(); }
  /// A fresh one. @param left_out number of the wait that does nothing; -1: all work.
  static Recorder& start(int left_out) {
    instance() = std::make_unique<Recorder>();
    instance()->left_out_ = left_out;
    return current();
  }

  void read(const std::string& name) { access(name, false); }
  void write(const std::string& name) { access(name, true); }
  [[nodiscard]] const std::vector<std::string>& races() const { return races_; }
  [[nodiscard]] int waits() const { return waits_; }
  [[nodiscard]] int recorded_tensors() const { return recorded_tensors_; }
  [[nodiscard]] c10::StreamId stream() const { return stream_; }

  c10::StreamId exchange_stream(c10::StreamId id) { return std::exchange(stream_, id); }
  c10::StreamId new_stream() { return ++streams_; }
  void record(const void* event, c10::StreamId id) { events_[event] = clocks_[id]; }
  void wait(const void* event, c10::StreamId id) {
    if (waits_++ == left_out_) {
      return;
    }
    for (const auto& [other, time] : events_[event]) {
      clocks_[id][other] = std::max(clocks_[id][other], time);
    }
  }
  void record_tensor() { ++recorded_tensors_; }

 private:
  struct Access {
    c10::StreamId stream;
    int64_t time;
    bool write;
  };

  static std::unique_ptr<Recorder>& instance() {
    static std::unique_ptr<Recorder> recorder = std::make_unique<Recorder>();
    return recorder;
  }
  void access(const std::string& name, bool write) {
    Clock& own = clocks_[stream_];
    for (const Access& earlier : accesses_[name]) {
      if ((write || earlier.write) && earlier.stream != stream_ &&
          own[earlier.stream] < earlier.time) {
        races_.push_back(name);
      }
    }
    accesses_[name].push_back({stream_, ++own[stream_], write});
  }

  int left_out_ = -1, waits_ = 0, recorded_tensors_ = 0;
  c10::StreamId stream_ = 0, streams_ = 0;
  std::map<c10::StreamId, Clock> clocks_;
  std::map<const void*, Clock> events_;
  std::map<std::string, std::vector<Access>> accesses_;
  std::vector<std::string> races_;
};

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
  static c10::Stream stream_of(c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, 0), id);
  }

  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device /*device*/) const override { return {kType, 0}; }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device /*device*/) const override {}
  void uncheckedSetDevice(c10::Device /*device*/) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device /*device*/) const override {
    return stream_of(Recorder::current().stream());
  }
  c10::Stream getStreamFromGlobalPool(c10::Device /*device*/, bool /*high*/) const override {
    return stream_of(Recorder::current().new_stream());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(Recorder::current().exchange_stream(stream.id()));
  }
  void record(void** event,
              const c10::Stream& stream,
              const c10::DeviceIndex /*index*/,
              const c10::EventFlag /*flag*/) const override {
    if (*event == nullptr) {
      *event = new char;
    }
    Recorder::current().record(*event, stream.id());
  }
  void block(void* event, const c10::Stream& stream) const override {
    Recorder::current().wait(event, stream.id());
  }
  void destroyEvent(void* event, const c10::DeviceIndex /*index*/) const noexcept override {
    delete static_cast<char*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& /*data*/,
                             const c10::Stream& /*stream*/) const override {
    Recorder::current().record_tensor();
  }
};

}  // namespace recording
