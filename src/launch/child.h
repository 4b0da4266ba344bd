// Children that never outlive their parent, and the parent's signals as something to poll.
#pragma once
#include <sys/types.h>

#include <csignal>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "core/file.h"

namespace hgrn {

std::string own_program();  // the path of this executable

// SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGCHLD come through a descriptor while this lives; children
// start without. SIGPIPE is ignored from then on. One at a time.
//
// By handlers and not by signalfd(2): that needs the signals blocked in every thread, and libraries
// that start threads of their own before main() (drivers, profilers) leave them open.
class SignalFd {
 public:
  SignalFd();
  ~SignalFd();
  SignalFd(const SignalFd&) = delete;
  SignalFd& operator=(const SignalFd&) = delete;
  int get() const { return read_.get(); }
  int next() const;  // the next signal; 0: none waits

  static constexpr int kSignals[] = {SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGCHLD};

 private:
  Fd read_, write_;
  struct sigaction before_[std::size(kSignals)];
};

struct ChildSpec {
  std::vector<std::string> words;                        // arguments of own_program()
  std::vector<std::pair<std::string, std::string>> set;  // environment
  std::vector<std::string> unset;
  int out = -1, err = -1;  // descriptors that become stdout and stderr; stdin is /dev/null
};

// The kernel kills the child when this thread ends. It leads a process group of its own, so that a
// Ctrl-C on the terminal reaches it once, from its parent. Exit::failed where it cannot start.
pid_t start_child(const ChildSpec& spec);

}  // namespace hgrn
