#include "launch/child.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/check.h"

namespace hgrn {
namespace {

[[noreturn]] void become(const ChildSpec& spec, std::vector<char*>& argv, const SignalFd& signals,
                         pid_t parent) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(1);  // it died before the line above
  sigprocmask(SIG_SETMASK, &signals.before(), nullptr);
  std::signal(SIGPIPE, SIG_DFL);
  const int null = ::open("/dev/null", O_RDONLY);
  if (null >= 0) ::dup2(null, STDIN_FILENO);
  ::dup2(spec.out, STDOUT_FILENO);
  ::dup2(spec.err, STDERR_FILENO);
  for (const std::string& name : spec.unset) ::unsetenv(name.c_str());
  for (const auto& [name, value] : spec.set) ::setenv(name.c_str(), value.c_str(), 1);
  ::execv(argv[0], argv.data());
  std::fprintf(stderr, "error: %s: %s\n", argv[0], std::strerror(errno));
  ::_exit(1);
}

}  // namespace

std::string own_program() {
  char path[4096];
  const ssize_t n = ::readlink("/proc/self/exe", path, sizeof path);
  check(n > 0 && size_t(n) < sizeof path, "/proc/self/exe cannot be read; is /proc mounted?");
  return {path, size_t(n)};
}

SignalFd::SignalFd() {
  sigset_t set;
  sigemptyset(&set);
  for (int s : {SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGCHLD}) sigaddset(&set, s);
  sigprocmask(SIG_BLOCK, &set, &before_);
  fd_ = Fd(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  check(bool(fd_), "signalfd: {}", std::strerror(errno));
  std::signal(SIGPIPE, SIG_IGN);
}

SignalFd::~SignalFd() {
  sigprocmask(SIG_SETMASK, &before_, nullptr);
}

int SignalFd::next() const {
  signalfd_siginfo info;
  return ::read(fd_.get(), &info, sizeof info) == ssize_t(sizeof info) ? int(info.ssi_signo) : 0;
}

pid_t start_child(const ChildSpec& spec, const SignalFd& signals) {
  std::vector<std::string> words = {own_program()};
  words.insert(words.end(), spec.words.begin(), spec.words.end());
  std::vector<char*> argv;
  for (std::string& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  const pid_t parent = ::getpid(), pid = ::fork();
  check(pid >= 0, "a process cannot be started: {}", std::strerror(errno));
  if (pid == 0) become(spec, argv, signals, parent);
  return pid;
}

}  // namespace hgrn
