// A file mapped read-only. Bytes are only reached through copy(): where another process shortens
// the file, touching the mapping raises SIGBUS, and copy() turns that into an Error instead of
// letting it end the program.
#pragma once
#include <cstdint>
#include <string>

namespace hgrn {

class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // Exit::data with the reason when it cannot
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  int64_t size() const { return size_; }  // bytes, when it was opened

  // Bytes [offset, offset+bytes) to `to`. Exit::data where the file is shorter by now, or the disk
  // cannot read them. Any number of threads may copy at once.
  void copy(void* to, int64_t offset, int64_t bytes) const;

 private:
  std::string path_;
  const char* data_ = nullptr;
  int64_t size_ = 0;
  uint64_t device_ = 0, inode_ = 0;  // tell a shortened file from a replaced one
};

}  // namespace hgrn
