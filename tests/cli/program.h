// The built program as a process of its own, for tests that send it signals, take its files away
// or let it die.
#pragma once
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.h"
#include "temp_folder.h"

namespace hgrn::test {

struct Ended {
  int code = -1;    // exit code, -1 if a signal ended it
  int signal = 0;   // that signal
  std::string err;  // stderr
  bool says(const std::string& part) const { return err.find(part) != std::string::npos; }
  int errors() const {  // "error: " lines
    int n = 0;
    for (size_t at = 0; (at = err.find("error: ", at)) != std::string::npos; ++at) ++n;
    return n;
  }
};

class Program {
 public:
  using Environment = std::vector<std::pair<std::string, std::string>>;

  // `words`: the arguments behind the program's name, or, where `command` is given, behind that.
  // stderr goes to a file in `tmp`.
  Program(const TempFolder& tmp, const std::vector<std::string>& words,
          const Environment& environment = {}, const std::string& command = HGRN_BINARY) {
    static int counter = 0;
    err_ = tmp / ("stderr-" + std::to_string(++counter));
    std::vector<char*> argv = {const_cast<char*>(command.c_str())};
    for (const std::string& w : words) argv.push_back(const_cast<char*>(w.c_str()));
    argv.push_back(nullptr);
    pid_ = ::fork();
    check(pid_ >= 0, "no fork");
    if (pid_ > 0) return;
    const int null = ::open("/dev/null", O_RDWR);
    const int err = ::open(err_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    ::dup2(null, 0), ::dup2(null, 1), ::dup2(err, 2);
    for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  ~Program() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void send(int number) const { ::kill(pid_, number); }
  bool running() const {  // does not take the exit status away
    siginfo_t info = {};
    return ::waitid(P_PID, id_t(pid_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0;
  }
  std::string err() const { return slurp(err_); }

  Ended wait() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    Ended e;
    if (WIFEXITED(status)) e.code = WEXITSTATUS(status);
    if (WIFSIGNALED(status)) e.signal = WTERMSIG(status);
    e.err = slurp(err_);
    return e;
  }

 private:
  pid_t pid_ = -1;
  std::string err_;
};

// Looks every few milliseconds; false after a minute, or once the program has ended.
inline bool eventually(const Program& program, const std::function<bool()>& condition) {
  for (int i = 0; i < 12000; ++i) {
    if (condition()) return true;
    if (!program.running()) return condition();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

}  // namespace hgrn::test
