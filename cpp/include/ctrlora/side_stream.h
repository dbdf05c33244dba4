// Runs work beside training: on a device's side stream, on a worker thread, or at once. The only
// file that may name streams, events or threads. cpp/README.md, section 7.
//
// Protocol, the same for all three: the caller writes, submits, goes on with work that touches none
// of the submitted tensors, joins, and then reads what the work wrote. On a device, submit() makes
// the side stream wait for an event recorded on the caller's stream, and join() makes the caller's
// stream wait for one recorded after the work; the host never waits.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ctrlora/export.h"

namespace ctrlora {

class CTRLORA_API SideStream {
 public:
  /// @param overlap "inline": submit() runs the work at once; "thread": a worker thread runs it, in
  /// order; "stream": a stream of the tensors' device, through c10's device-generic interface
  /// (CUDA, ROCm, XPU); a CPU has none and takes the worker thread; "auto": "stream" on devices,
  /// "inline" on a CPU, whose cores training needs itself.
  /// @throws c10::ValueError for any other name.
  explicit SideStream(const std::string& overlap = "inline");
  ~SideStream();
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  /// Whether work on this device runs beside the caller at all.
  [[nodiscard]] bool overlaps(at::Device device) const;
  /// Whether work on this device runs on another host thread than its caller's: such work must not
  /// call collectives, whose order would be chance.
  [[nodiscard]] static bool on_worker(const std::string& overlap, at::Device device);

  /// @param work runs under no-grad and may throw. @param tensors what it reads or writes: kept
  /// alive until it is done, and made known to a caching allocator.
  void submit(at::Device device, std::vector<at::Tensor> tensors, std::function<void()> work);

  /// Orders all submitted work before whatever the caller does next.
  void join();

  /// After join(): the message of the first exception that work threw since this was last asked, ""
  /// for none.
  std::string take_error();

 private:
  struct DeviceSide;
  class Worker;
  void run(const std::function<void()>& work) noexcept;
  void submit_to_stream(at::Device device,
                        std::vector<at::Tensor> tensors,
                        const std::function<void()>& work);
  DeviceSide& side_of(at::Device device);

  std::string overlap_;
  std::unique_ptr<Worker> worker_;  // started by the first work for it
  std::vector<std::unique_ptr<DeviceSide>> sides_;
  std::string error_;
};

}  // namespace ctrlora
