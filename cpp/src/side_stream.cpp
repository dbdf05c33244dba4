#include "ctrlora/side_stream.h"

namespace ctrlora {

void SideStream::submit(const std::function<void()>& work) {
  work();
}

void SideStream::join() {}

}  // namespace ctrlora
