#include "launch/child.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/check.h"

namespace hgrn {
namespace {

int g_signals = -1;  // where the handler writes; a pipe's end that never blocks

void on_signal(int number) {
  const int before = errno;
  const auto byte = static_cast<unsigned char>(number);
  // A full pipe holds enough of them to wake whoever reads.
  if (::write(g_signals, &byte, 1) < 0) {
  }
  errno = before;
}

[[noreturn]] void become(const ChildSpec& spec, std::vector<char*>& argv, pid_t parent) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(1);  // it died before the line above
  // All signals are blocked here: none may reach the handler, which would tell the parent.
  for (const int number : SignalFd::kSignals) std::signal(number, SIG_DFL);
  std::signal(SIGPIPE, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  pthread_sigmask(SIG_SETMASK, &none, nullptr);
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
  int ends[2];
  check(::pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0, "a pipe for signals: {}", std::strerror(errno));
  read_ = Fd(ends[0]), write_ = Fd(ends[1]);
  g_signals = ends[1];
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigfillset(&action.sa_mask);
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before_[i]);
  std::signal(SIGPIPE, SIG_IGN);
}

SignalFd::~SignalFd() {
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before_[i], nullptr);
  g_signals = -1;
}

int SignalFd::next() const {
  unsigned char byte = 0;
  return ::read(read_.get(), &byte, 1) == 1 ? byte : 0;
}

pid_t start_child(const ChildSpec& spec) {
  std::vector<std::string> words = {own_program()};
  words.insert(words.end(), spec.words.begin(), spec.words.end());
  std::vector<char*> argv;
  for (std::string& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const pid_t parent = ::getpid(), pid = ::fork();
  if (pid == 0) become(spec, argv, parent);
  const int error = errno;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  check(pid >= 0, "a process cannot be started: {}", std::strerror(error));
  return pid;
}

}  // namespace hgrn
