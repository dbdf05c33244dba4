// Runs work beside training. The only file that may name streams, events or threads.
//
// Now: inline. submit() runs the work at once on the caller's stream; publish points stay where
// they are when a device stream or a worker thread does the work (cpp/README.md, section 7).
#pragma once

#include <functional>

#include "ctrlora/export.h"

namespace ctrlora {

class CTRLORA_API SideStream {
 public:
  SideStream() = default;

  /// Runs `work` so that everything the caller wrote before is visible to it.
  void submit(const std::function<void()>& work);

  /// Returns when all submitted work is done and visible to the caller.
  void join();
};

}  // namespace ctrlora
