#include "core/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <vector>

#include "core/check.h"

namespace hgrn {
namespace {

namespace fs = std::filesystem;
constexpr size_t kChunk = size_t(1) << 20;    // of reading for a checksum or a copy
constexpr size_t kMaxCall = size_t(1) << 30;  // Linux moves at most 2 GiB a call

std::string reason(int err) {
  return std::error_code(err, std::generic_category()).message();
}

std::string folder_of(const std::string& path) {
  const std::string parent = fs::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

[[noreturn]] void fail_write(const std::string& path, int err, uint64_t needed) {
  if (err != ENOSPC && err != EDQUOT)
    fail(Exit::failed, "cannot write {}: {}; mend the folder or write elsewhere", path,
         reason(err));
  struct statvfs disk {};
  const bool known = statvfs(folder_of(path).c_str(), &disk) == 0;
  const uint64_t room = known ? uint64_t(disk.f_bavail) * disk.f_frsize : 0;
  fail(Exit::failed,
       "cannot write {}: the disk is full ({}; {} bytes needed, {} free); free space or write "
       "elsewhere",
       path, reason(err), needed, known ? std::to_string(room) : "unknown");
}

int open_retry(const char* path, int flags, mode_t mode = 0) {
  int fd;
  do fd = ::open(path, flags | O_CLOEXEC, mode);
  while (fd < 0 && errno == EINTR);
  return fd;
}

}  // namespace

// ---- descriptors

Fd& Fd::operator=(Fd&& o) noexcept {
  if (this != &o) {
    reset();
    std::swap(fd_, o.fd_);
  }
  return *this;
}

void Fd::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Fd open_for_read(const std::string& path) {
  Fd fd(open_retry(path.c_str(), O_RDONLY));
  if (!fd) {
    const int err = errno;
    fail(Exit::data, "cannot read {}: {}; check the path and its permissions", path, reason(err));
  }
  struct stat st {};
  check(::fstat(fd.get(), &st) == 0, Exit::data, "cannot read {}: {}", path, reason(errno));
  check(!S_ISDIR(st.st_mode), Exit::data, "cannot read {}: it is a folder, a file is needed", path);
  return fd;
}

void pread_exact(const Fd& fd, const std::string& path, void* out, size_t bytes, uint64_t offset) {
  char* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t n = ::pread(fd.get(), to, std::min(bytes, kMaxCall), off_t(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int err = errno;
      fail(Exit::data, "cannot read {} at byte {}: {}", path, offset, reason(err));
    }
    check(n > 0, Exit::data, "{} ends at byte {}, {} more were expected; it is cut short", path,
          offset, bytes);
    to += n, offset += uint64_t(n), bytes -= size_t(n);
  }
}

// ---- questions and folders

bool exists(const std::string& path) {
  std::error_code ec;
  return fs::exists(path, ec);
}

bool is_folder(const std::string& path) {
  std::error_code ec;
  return fs::is_directory(path, ec);
}

uint64_t file_size(const std::string& path) {
  const Fd fd = open_for_read(path);
  struct stat st {};
  check(::fstat(fd.get(), &st) == 0, Exit::data, "cannot read {}: {}", path, reason(errno));
  return uint64_t(st.st_size);
}

void make_dirs(const std::string& path) {
  std::error_code ec;
  fs::create_directories(path, ec);
  if (ec == std::errc::no_space_on_device) fail_write(path, ENOSPC, 4096);
  check(!ec && is_folder(path), Exit::failed,
        "cannot make folder {}: {}; choose another --out or mend the folder above it", path,
        ec ? ec.message() : "something else has that name");
}

void remove_tree(const std::string& path) {
  std::error_code ec;
  fs::remove_all(path, ec);
  check(!ec, Exit::failed, "cannot remove {}: {}", path, ec.message());
}

void rename_path(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) == 0) return;
  const int err = errno;
  if (err == ENOSPC || err == EDQUOT) fail_write(to, err, 4096);
  fail(Exit::failed, "cannot rename {} to {}: {}", from, to, reason(err));
}

void fsync_path(const std::string& path) {
  const Fd fd(open_retry(path.c_str(), O_RDONLY));
  if (!fd) {
    const int err = errno;
    fail(Exit::failed, "cannot open {} to sync it: {}", path, reason(err));
  }
  if (::fsync(fd.get()) == 0) return;
  const int err = errno;
  // Some network and FUSE file systems know no fsync of a folder and say so.
  if ((err == EINVAL || err == ENOTSUP) && is_folder(path)) return;
  fail_write(path, err, 0);
}

// ---- whole files

std::string read_file(const std::string& path, uint64_t max_bytes) {
  const Fd fd = open_for_read(path);
  struct stat st {};
  check(::fstat(fd.get(), &st) == 0, Exit::data, "cannot read {}: {}", path, reason(errno));
  std::string bytes;
  bytes.reserve(size_t(std::min<uint64_t>(uint64_t(st.st_size), max_bytes)));
  std::vector<char> chunk(kChunk);
  for (;;) {  // to the end, not to st_size: pipes and /proc have none, and a file may grow
    const ssize_t n = ::read(fd.get(), chunk.data(), chunk.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int err = errno;
      fail(Exit::data, "cannot read {} at byte {}: {}", path, bytes.size(), reason(err));
    }
    if (n == 0) return bytes;
    bytes.append(chunk.data(), size_t(n));
    check(bytes.size() <= max_bytes, Exit::data,
          "{} is larger than {} bytes; this is not the kind of file that is read here", path,
          max_bytes);
  }
}

void write_file_atomic(const std::string& path, std::string_view bytes) {
  static std::atomic<uint64_t> counter{0};
  const fs::path p(path);
  const std::string temporary =
      (p.parent_path() / fmt::format(".{}.tmp-{}-{}", p.filename().string(), ::getpid(), ++counter))
          .string();
  FileWriter out(temporary, bytes.size());
  out.write(bytes.data(), bytes.size());
  out.finish();
  try {
    rename_path(temporary, path);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  fsync_path(folder_of(path));
}

uint64_t copy_file_synced(const std::string& from, const std::string& to) {
  const Fd in = open_for_read(from);
  struct stat st {};
  check(::fstat(in.get(), &st) == 0, Exit::data, "cannot read {}: {}", from, reason(errno));
  FileWriter out(to, uint64_t(st.st_size));
  std::vector<char> chunk(kChunk);
  for (;;) {
    const ssize_t n = ::read(in.get(), chunk.data(), chunk.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int err = errno;
      fail(Exit::data, "cannot read {} at byte {}: {}", from, out.size(), reason(err));
    }
    if (n == 0) break;
    out.write(chunk.data(), size_t(n));
  }
  out.finish();
  return out.hash();
}

// ---- checksums

uint64_t xxh3(const void* data, size_t bytes) {
  return XXH3_64bits(data, bytes);
}

struct FileWriter::Hasher {
  XXH3_state_t* state = XXH3_createState();
  Hasher() {
    check(state != nullptr, "no memory for a checksum");
    XXH3_64bits_reset(state);
  }
  ~Hasher() { XXH3_freeState(state); }
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;
};

uint64_t xxh3_file(const std::string& path) {
  const Fd fd = open_for_read(path);
  ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
  const std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> state(XXH3_createState(),
                                                                              XXH3_freeState);
  check(state != nullptr, "no memory for a checksum");
  XXH3_64bits_reset(state.get());
  std::vector<char> chunk(kChunk);
  for (uint64_t at = 0;;) {
    const ssize_t n = ::read(fd.get(), chunk.data(), chunk.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int err = errno;
      fail(Exit::data, "cannot read {} at byte {}: {}", path, at, reason(err));
    }
    if (n == 0) return XXH3_64bits_digest(state.get());
    XXH3_64bits_update(state.get(), chunk.data(), size_t(n));
    at += uint64_t(n);
  }
}

std::string hex16(uint64_t hash) {
  return fmt::format("{:016x}", hash);
}

// ---- streams

FileWriter::FileWriter(std::string path, uint64_t expected_bytes)
    : path_(std::move(path)), expected_(expected_bytes), hasher_(std::make_unique<Hasher>()) {
  // O_EXCL: two writers of one path is a mistake that must not pass.
  fd_ = Fd(open_retry(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666));
  if (!fd_) fail_write(path_, errno, expected_);
}

FileWriter::~FileWriter() {
  if (!fd_) return;
  fd_.reset();
  ::unlink(path_.c_str());
}

void FileWriter::write(const void* data, size_t bytes) {
  check(bool(fd_), "write to {} after finish()", path_);
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::write(fd_.get(), from, std::min(bytes, kMaxCall));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_write(path_, errno, std::max(expected_, size_ + bytes));
    XXH3_64bits_update(hasher_->state, from, size_t(n));
    from += n, size_ += uint64_t(n), bytes -= size_t(n);
  }
}

void FileWriter::finish() {
  check(bool(fd_), "finish() of {} twice", path_);
  // A delayed write error shows here; a second fsync would report success, so there is none.
  if (::fsync(fd_.get()) != 0) fail_write(path_, errno, std::max(expected_, size_));
  fd_.reset();
}

uint64_t FileWriter::hash() const {
  return XXH3_64bits_digest(hasher_->state);
}

}  // namespace hgrn
