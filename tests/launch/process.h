// The built program in processes of its own, for tests of ranks: started, watched, signalled, and
// never left behind.
#pragma once
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "launch/sockets.h"
#include "temp_folder.h"

namespace hgrn::test {

using Env = std::map<std::string, std::string>;

inline void sleep_ms(int ms) {
  std::this_thread::sleep_for(std::chrono::milliseconds(ms));
}

inline bool eventually(double seconds, const std::function<bool()>& is) {
  const double until = monotonic_s() + seconds;
  while (!is()) {
    if (monotonic_s() > until) return false;
    sleep_ms(5);
  }
  return true;
}

// The built program; HGRN names it where the tests run on another machine than built them.
inline std::string program() {
  const char* set = std::getenv("HGRN");
  return set && *set ? set : HGRN_BINARY;
}

inline bool has_program(const std::string& name) {
  return std::system(("command -v " + name + " >/dev/null 2>&1").c_str()) == 0;
}

inline int free_port() {
  return port_of(listen_on("127.0.0.1", 0));
}

// stdout and stderr go to one file.
class Process {
 public:
  Process(const std::string& file, const std::vector<std::string>& words, const Env& env,
          const std::string& output)
      : output_(output) {
    std::vector<std::string> all = {file};
    all.insert(all.end(), words.begin(), words.end());
    std::vector<char*> argv;
    for (std::string& w : all) argv.push_back(w.data());
    argv.push_back(nullptr);
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    hgrn::check(pid_ >= 0, "no fork");
    if (pid_ != 0) return;
    ::setpgid(0, 0);
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);
    const int out = ::open(output.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
    ::dup2(::open("/dev/null", O_RDONLY), 0);
    ::dup2(out, 1);
    ::dup2(out, 2);
    ::setenv("OMP_NUM_THREADS", "1", 1);
    for (const auto& [name, value] : env) ::setenv(name.c_str(), value.c_str(), 1);
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  ~Process() {
    if (!running()) return;
    ::kill(-pid_, SIGKILL);
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  Process(Process&& o) noexcept
      : pid_(o.pid_), done_(o.done_), status_(o.status_), output_(std::move(o.output_)) {
    o.done_ = true;
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  std::string output() const { return slurp(output_); }
  bool says(const std::string& part) const { return output().find(part) != std::string::npos; }
  void signal(int number) const { ::kill(pid_, number); }

  bool running() {
    if (!done_ && ::waitpid(pid_, &status_, WNOHANG) == pid_) done_ = true;
    return !done_;
  }
  // The exit code, -signal, or -1000 where it still runs after `seconds`.
  int wait(double seconds = 60) {
    if (!eventually(seconds, [&] { return !running(); })) return -1000;
    return WIFEXITED(status_) ? WEXITSTATUS(status_) : -WTERMSIG(status_);
  }
  bool wait_for_text(const std::string& part, double seconds = 30) {
    return eventually(seconds, [&] { return says(part) || !running(); }) && says(part);
  }

 private:
  pid_t pid_ = -1;
  bool done_ = false;
  int status_ = 0;
  std::string output_;
};

// Processes whose command line holds this text, but for this one.
inline std::vector<pid_t> processes_with(const std::string& text) {
  std::vector<pid_t> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename().string();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    std::string line = slurp(entry.path().string() + "/cmdline");
    for (char& c : line)
      if (c == '\0') c = ' ';
    const pid_t pid = pid_t(std::stol(name));
    if (line.find(text) != std::string::npos && pid != ::getpid()) found.push_back(pid);
  }
  return found;
}

// The ranks (not the launcher) of the run that writes to `out`, by rank.
inline std::map<int, pid_t> rank_pids(const std::string& out) {
  std::map<int, pid_t> ranks;
  for (pid_t pid : processes_with(out)) {
    const std::string env = slurp("/proc/" + std::to_string(pid) + "/environ");
    const std::string key = std::string(1, '\0') + "RANK=";
    const size_t at = (std::string(1, '\0') + env).find(key);
    if (at != std::string::npos) ranks[std::atoi(env.c_str() + at + key.size() - 1)] = pid;
  }
  return ranks;
}

}  // namespace hgrn::test
