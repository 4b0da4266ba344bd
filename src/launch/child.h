// Children that never outlive their parent, and the parent's signals as something to poll.
#pragma once
#include <sys/types.h>

#include <csignal>
#include <string>
#include <utility>
#include <vector>

#include "core/file.h"

namespace hgrn {

std::string own_program();  // the path of this executable

// SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGCHLD come through a descriptor while this lives; children
// start with them unblocked. SIGPIPE is ignored from then on.
class SignalFd {
 public:
  SignalFd();
  ~SignalFd();
  SignalFd(const SignalFd&) = delete;
  SignalFd& operator=(const SignalFd&) = delete;
  int get() const { return fd_.get(); }
  const sigset_t& before() const { return before_; }
  int next() const;  // the next signal; 0: none waits

 private:
  Fd fd_;
  sigset_t before_;
};

struct ChildSpec {
  std::vector<std::string> words;                        // arguments of own_program()
  std::vector<std::pair<std::string, std::string>> set;  // environment
  std::vector<std::string> unset;
  int out = -1, err = -1;  // descriptors that become stdout and stderr; stdin is /dev/null
};

// The kernel kills the child when this thread ends. It leads a process group of its own, so that a
// Ctrl-C on the terminal reaches it once, from its parent. Exit::failed where it cannot start.
pid_t start_child(const ChildSpec& spec, const SignalFd& signals);

}  // namespace hgrn
