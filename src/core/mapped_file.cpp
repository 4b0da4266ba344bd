#include "core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <mutex>
#include <utility>

#include "core/check.h"

namespace hgrn {
namespace {

// ---- the SIGBUS guard. A fault is synchronous, so it arrives on the thread that copies, and the
// handler finds that thread's guard. A fault at any other address is not ours: it goes on to the
// handler that was there before.
struct Guard {
  sigjmp_buf back;
  const char *begin, *end;
};
thread_local Guard* volatile t_guard = nullptr;
struct sigaction g_previous;

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const char* at = static_cast<const char*>(info->si_addr);
  Guard* guard = t_guard;
  if (guard && at >= guard->begin && at < guard->end) siglongjmp(guard->back, 1);
  if (g_previous.sa_flags & SA_SIGINFO) {
    g_previous.sa_sigaction(signal, info, context);
  } else if (g_previous.sa_handler != SIG_DFL && g_previous.sa_handler != SIG_IGN) {
    g_previous.sa_handler(signal);
  } else {
    ::signal(SIGBUS, SIG_DFL);  // the instruction runs again, and now the default action ends us
  }
}

void install_guard() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &g_previous);
  });
}

// False where reading `from` faulted.
__attribute__((noinline)) bool guarded_copy(void* to, const char* from, size_t bytes) {
  Guard guard;
  guard.begin = from;
  guard.end = from + bytes;
  t_guard = &guard;
  if (sigsetjmp(guard.back, 1) != 0) {  // 1: the jump also unblocks what the handler blocked
    t_guard = nullptr;
    return false;
  }
  std::memcpy(to, from, bytes);
  std::atomic_signal_fence(std::memory_order_seq_cst);  // the copy ends before the guard does
  t_guard = nullptr;
  return true;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  install_guard();
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  check(fd >= 0, Exit::data, "cannot open {}: {}; check the path and its permissions", path,
        std::strerror(errno));
  struct stat info;
  int error = ::fstat(fd, &info) == 0 ? 0 : errno;
  const bool regular = error == 0 && S_ISREG(info.st_mode);
  if (regular && info.st_size > 0) {
    void* data = ::mmap(nullptr, size_t(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) {
      error = errno;
    } else {
      data_ = static_cast<const char*>(data);
      size_ = info.st_size;
      device_ = info.st_dev;
      inode_ = info.st_ino;
    }
  }
  ::close(fd);  // the mapping keeps the file; thousands of shards need no descriptors
  check(error == 0, Exit::data, "cannot map {}: {}", path, std::strerror(error));
  check(regular, Exit::data, "{} is not a regular file", path);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<char*>(data_), size_t(size_));
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      device_(other.device_),
      inode_(other.inode_) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(device_, other.device_);
  std::swap(inode_, other.inode_);
  return *this;
}

void MappedFile::copy(void* to, int64_t offset, int64_t bytes) const {
  check(offset >= 0 && bytes >= 0 && offset <= size_ - bytes, Exit::data,
        "{}: {} bytes from offset {} were asked for, but it has {}", path_, bytes, offset, size_);
  if (bytes == 0) return;
  const bool copied = guarded_copy(to, data_ + offset, size_t(bytes));
  // Behind a new end inside its last page a shortened file reads as zeros, without a fault: only
  // its size tells. A file replaced under this name is another inode, and ours is then whole.
  struct stat info;
  const bool same_file = ::stat(path_.c_str(), &info) == 0 && uint64_t(info.st_dev) == device_ &&
                         uint64_t(info.st_ino) == inode_;
  check(!(same_file && info.st_size < offset + bytes), Exit::data,
        "{} shrank while it was read: {} bytes when it was opened, {} now, bytes [{}, {}) are "
        "wanted; restore the file and start again",
        path_, size_, int64_t(info.st_size), offset, offset + bytes);
  check(copied, Exit::data,
        "{}: bytes [{}, {}) could not be read: it shrank while it was read and was removed, or "
        "its disk failed",
        path_, offset, offset + bytes);
}

}  // namespace hgrn
