#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <ctime>
#include <fstream>
#include <sstream>
#include <system_error>

#include "core/check.h"
#include "core/file.h"

namespace hgrn {
namespace {

// What .lock holds, one "key value" a line. `born` is the process's start in clock ticks since
// boot: a pid alone may have been given to another process since.
struct Owner {
  int64_t pid = 0;
  std::string host, started, born;
};

std::string host_name() {
  char name[256] = {};
  return ::gethostname(name, sizeof name - 1) == 0 ? name : "unknown";
}

std::string process_birth(int64_t pid) {  // field 22 of /proc/PID/stat; empty if unknown
  std::ifstream in("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(in)), {});
  const size_t close = text.rfind(')');  // field 2, the name, may hold spaces
  if (close == std::string::npos) return "";
  std::istringstream fields(text.substr(close + 1));
  std::string field;
  for (int i = 3; i <= 22; ++i)
    if (!(fields >> field)) return "";
  return field;
}

std::string describe_self() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm utc{};
  ::gmtime_r(&now, &utc);
  char time[32];
  std::strftime(time, sizeof time, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return fmt::format("pid {}\nhost {}\nstarted {}\nborn {}\n", ::getpid(), host_name(), time,
                     process_birth(::getpid()));
}

Owner read_owner(const std::string& path) {
  Owner owner;
  std::ifstream in(path);
  std::string key;
  while (in >> key) {
    if (key == "pid")
      in >> owner.pid;
    else if (key == "host")
      in >> owner.host;
    else if (key == "started")
      in >> owner.started;
    else if (key == "born")
      in >> owner.born;
    if (!in) break;
  }
  return owner;
}

[[noreturn]] void refuse(const std::string& path, const std::string& hint) {
  const Owner owner = read_owner(path);
  const std::string who = owner.pid > 0 ? fmt::format("process {} on {} (started {})", owner.pid,
                                                      owner.host, owner.started)
                                        : "another process";
  fail(Exit::failed, "the run folder is in use: {} is held by {}; {}", path, who, hint);
}

bool is_alive(const Owner& owner) {
  if (owner.pid <= 0) return false;
  if (::kill(pid_t(owner.pid), 0) != 0 && errno != EPERM) return false;
  const std::string born = process_birth(owner.pid);
  return born.empty() || owner.born.empty() || born == owner.born;
}

void write_owner(const Fd& fd, const std::string& path) {
  const std::string text = describe_self();
  const bool ok = ::ftruncate(fd.get(), 0) == 0 &&
                  ::pwrite(fd.get(), text.data(), text.size(), 0) == ssize_t(text.size());
  const int err = errno;
  check(ok, Exit::failed, "cannot write {}: {}", path,
        std::error_code(err, std::generic_category()).message());
}

Fd open_lock(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
  const int err = errno;
  check(bool(fd), Exit::failed, "cannot make the lock {}: {}; is the run folder writable?", path,
        std::error_code(err, std::generic_category()).message());
  return fd;
}

}  // namespace

FileLock::FileLock(const std::string& folder, Method method)
    : path_(folder + "/.lock"), method_(method) {
  if (method_ == Method::flock) {
    fd_ = open_lock(path_);
    int rc;
    do rc = ::flock(fd_.get(), LOCK_EX | LOCK_NB);
    while (rc != 0 && errno == EINTR);
    const int err = errno;
    if (rc == 0) {
      write_owner(fd_, path_);
      return;
    }
    fd_.reset();
    if (err == EWOULDBLOCK) refuse(path_, "wait for it, stop it, or choose another --out");
    method_ = Method::pid;  // ENOLCK, EOPNOTSUPP, ...: a file system without flock
  }
  lock_by_pid();
}

// The file appears with its content by link(2), which refuses an existing name.
void FileLock::lock_by_pid() {
  const std::string mine = fmt::format("{}-{}-{}", path_, host_name(), ::getpid());
  const std::string stale = mine + "-stale";
  write_file_atomic(mine, describe_self());
  for (int attempt = 0; attempt < 2 && !fd_; ++attempt) {
    if (::link(mine.c_str(), path_.c_str()) == 0) {
      fd_ = open_lock(path_);
      break;
    }
    const int err = errno;
    const Owner owner = read_owner(path_);
    const bool elsewhere = owner.pid > 0 && owner.host != host_name();
    if (err != EEXIST || elsewhere || is_alive(owner)) {
      ::unlink(mine.c_str());
      check(err == EEXIST, Exit::failed, "cannot make the lock {}: {}", path_,
            std::error_code(err, std::generic_category()).message());
      refuse(path_, elsewhere ? "if it no longer runs there, remove the file; else choose another "
                                "--out"
                              : "wait for it, stop it, or choose another --out");
    }
    // Moved away rather than removed: where another process took over since, it is put back.
    if (::rename(path_.c_str(), stale.c_str()) == 0) {
      if (read_owner(stale).pid != owner.pid) (void)!::link(stale.c_str(), path_.c_str());
      ::unlink(stale.c_str());
    }
  }
  ::unlink(mine.c_str());
  if (!fd_) refuse(path_, "it was taken just now; choose another --out");
}

FileLock::~FileLock() {
  if (!fd_) return;
  if (method_ == Method::pid) {
    ::unlink(path_.c_str());
    return;
  }
  // The file stays: removing it would let a waiting opener lock a file that no longer has a name.
  (void)!::ftruncate(fd_.get(), 0);
  ::flock(fd_.get(), LOCK_UN);  // also where a forked child still has the descriptor
}

}  // namespace hgrn
