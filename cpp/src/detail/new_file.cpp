#include "detail/new_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

namespace ctrlora::detail {

namespace {

constexpr int kMode = 0666;  // less the process' mask

}  // namespace

NewFile::NewFile(std::string path)
    : path_(std::move(path)),
      file_(::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, kMode)) {
  note(file_ >= 0);
}

NewFile::~NewFile() {
  close();
  ::unlink(path_.c_str());  // there is none after the rename
}

void NewFile::write(const char* from, size_t count) {
  while (count > 0 && reason_.empty()) {
    const ssize_t written = ::write(file_, from, count);
    note(written >= 0 || errno == EINTR);
    const auto done = static_cast<size_t>(std::max<ssize_t>(written, 0));
    from += done;
    count -= done;
  }
}

void NewFile::become(const std::string& target) {
  note(file_ < 0 || ::fsync(file_) == 0);
  close();
  if (!reason_.empty()) {
    return;
  }
  note(std::rename(path_.c_str(), target.c_str()) == 0);
  const std::filesystem::path parent = std::filesystem::path(target).parent_path();
  const std::string folder = parent.empty() ? "." : parent.string();
  const int handle = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);  // the rename must last, too
  if (handle >= 0) {
    ::fsync(handle);
    ::close(handle);
  }
}

void NewFile::note(bool good) {
  if (!good && reason_.empty()) {
    reason_ = std::strerror(errno);
  }
}

void NewFile::close() {
  if (file_ >= 0) {
    note(::close(file_) == 0);
    file_ = -1;
  }
}

}  // namespace ctrlora::detail
