// Reading and writing files so that neither a crash nor a full disk leaves a wrong file behind.
// Errors: missing or damaged is Exit::data, cannot write is Exit::failed; the text holds the path,
// the system's reason, and the bytes needed where the disk is full.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace hgrn {

bool exists(const std::string& path);     // follows symbolic links
bool is_folder(const std::string& path);  // false where nothing is
uint64_t file_size(const std::string& path);
void make_dirs(const std::string& path);    // like mkdir -p
void remove_tree(const std::string& path);  // nothing there: no error

// The whole file. More than max_bytes is Exit::data: a wrong path must not eat all memory.
std::string read_file(const std::string& path, uint64_t max_bytes);

// After it returns the file holds `bytes`; after a crash or an error, the old or the new content.
// (Temporary file in the same folder, fsync, rename, fsync of the folder.)
void write_file_atomic(const std::string& path, std::string_view bytes);

// Copies into a new file and fsyncs it; returns the XXH3 of what was copied.
uint64_t copy_file_synced(const std::string& from, const std::string& to);

void rename_path(const std::string& from, const std::string& to);  // does not fsync the folder
void fsync_path(const std::string& path);                          // a file or a folder

uint64_t xxh3(const void* data, size_t bytes);  // 64-bit XXH3, seed 0
uint64_t xxh3_file(const std::string& path);
std::string hex16(uint64_t hash);  // 16 lower-case digits

// An open file descriptor that closes itself.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& o) noexcept : fd_(o.fd_) { o.fd_ = -1; }
  Fd& operator=(Fd&& o) noexcept;
  ~Fd() { reset(); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset();

 private:
  int fd_ = -1;
};

Fd open_for_read(const std::string& path);  // Exit::data where it cannot
// Exactly `bytes` bytes from `offset`; an end of file before that is Exit::data.
void pread_exact(const Fd& fd, const std::string& path, void* out, size_t bytes, uint64_t offset);

// Writes a new file from front to back and hashes it on the way. Without finish() the file is
// removed again. `expected_bytes` only serves the message on a full disk.
class FileWriter {
 public:
  explicit FileWriter(std::string path, uint64_t expected_bytes = 0);
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;
  void write(const void* data, size_t bytes);
  void finish();  // fsync and close
  uint64_t size() const { return size_; }
  uint64_t hash() const;  // XXH3 of what was written so far

 private:
  struct Hasher;
  std::string path_;
  uint64_t expected_ = 0, size_ = 0;
  Fd fd_;
  std::unique_ptr<Hasher> hasher_;
};

// One writer a run folder: DIR/.lock, held until destruction or the end of the process. A lock
// whose owner died does not hold. A second writer gets Exit::failed, saying who holds it.
// flock(2) decides; where the file system has none, the process named in the file is looked for.
class FileLock {
 public:
  enum class Method { flock, pid };  // pid is the fallback; named here so that it can be tested
  explicit FileLock(const std::string& folder, Method method = Method::flock);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;
  const std::string& path() const { return path_; }

 private:
  void lock_by_pid();
  std::string path_;
  Method method_;
  Fd fd_;
};

}  // namespace hgrn
