// A file that takes another one's place when it is whole.
#pragma once

#include <cstddef>
#include <string>

namespace ctrlora::detail {

/// Writes, syncs and renames; what is not renamed is removed. Keeps the reason of the first failure
/// instead of throwing: torch's archives end the program when a stream of theirs throws.
class NewFile {
 public:
  explicit NewFile(std::string path);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(const char* from, size_t count);
  /// Syncs it and renames it to `target`, unless something has failed.
  void become(const std::string& target);
  /// Of the first failure; "" for none.
  [[nodiscard]] const std::string& reason() const { return reason_; }

 private:
  void note(bool good);
  void close();

  std::string path_;
  int file_;
  std::string reason_;
};

}  // namespace ctrlora::detail
