#include "launch/launcher.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <thread>

#include "core/file.h"
#include "core/log.h"
#include "launch/child.h"
#include "launch/sockets.h"

namespace hgrn {
namespace {

constexpr double kGraceSeconds = 1.5;  // after a failure, for the others to end by themselves
constexpr double kTermSeconds = 6;     // from then: SIGTERM, then SIGKILL
constexpr double kDrainSeconds = 2;    // for the last output of ranks that have ended
constexpr size_t kMaxLine = 1 << 16;
constexpr int kDefaultPort = 29500;

// Whole lines of one stream of one rank, with the rank in front; the log file gets them bare.
class LineWriter {
 public:
  LineWriter(Fd from, int to, std::string prefix, int log)
      : from_(std::move(from)), to_(to), prefix_(std::move(prefix)), log_(log) {}
  int fd() const { return from_.get(); }
  bool open() const { return bool(from_); }

  void pump() {
    char chunk[16384];
    const ssize_t n = ::read(from_.get(), chunk, sizeof chunk);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) return;
    if (n <= 0) return finish();
    buffer_.append(chunk, size_t(n));
    size_t done = 0;
    for (size_t end; (end = buffer_.find('\n', done)) != std::string::npos; done = end + 1)
      line(buffer_.substr(done, end - done));
    buffer_.erase(0, done);
    if (buffer_.size() > kMaxLine) {
      line(buffer_);
      buffer_.clear();
    }
  }
  void finish() {
    if (!buffer_.empty()) line(buffer_);
    buffer_.clear();
    from_.reset();
  }

 private:
  void line(const std::string& text) {
    write_all(to_, prefix_ + text + "\n");
    if (log_ >= 0) write_all(log_, text + "\n");
  }
  static void write_all(int fd, const std::string& bytes) {  // a reader that is gone is no error
    for (size_t at = 0; at < bytes.size();) {
      const ssize_t n = ::write(fd, bytes.data() + at, bytes.size() - at);
      if (n < 0 && errno == EAGAIN) {
        pollfd p = {fd, POLLOUT, 0};
        ::poll(&p, 1, 1000);
      } else if (n < 0 && errno != EINTR) {
        return;
      } else if (n > 0) {
        at += size_t(n);
      }
    }
  }
  Fd from_;
  int to_;
  std::string prefix_, buffer_;
  int log_;
};

struct Process {
  int rank = 0;
  pid_t pid = -1;
  bool running = false, ended_by_us = false;
  int status = 0;
};

std::string random_token() {
  unsigned char bytes[16];
  check(::getrandom(bytes, sizeof bytes, 0) == ssize_t(sizeof bytes), "no random numbers");
  std::string text;
  for (unsigned char b : bytes) text += fmt::format("{:02x}", b);
  return text;
}

// One start of all ranks of this machine, to the end of the last.
class Attempt {
 public:
  Attempt(const LaunchOptions& o, const SignalFd& signals, const std::string& token, int restarts)
      : o_(o), signals_(signals), token_(token), restarts_(restarts) {}
  ~Attempt() {  // only after an error of our own is anything still there
    kill_all(SIGKILL);
    for (Process& p : processes_)
      if (p.running) ::waitpid(p.pid, nullptr, 0);
  }

  void start();
  Exit run();
  bool stopping() const { return stopping_; }

 private:
  void start_rank(int local_rank, const std::string& address, int port);
  void on_signal(int number);
  void reap();
  void note_end(Process& p);
  void kill_all(int number);
  bool any_running() const {
    return std::any_of(processes_.begin(), processes_.end(),
                       [](const Process& p) { return p.running; });
  }

  const LaunchOptions& o_;
  const SignalFd& signals_;
  const std::string& token_;
  const int restarts_;
  std::vector<Process> processes_;
  std::vector<Fd> logs_;
  std::vector<LineWriter> lines_;
  bool stopping_ = false, stopped_ = false;
  std::optional<Exit> failure_;
  double failed_at_ = 0;
};

void Attempt::start() {
  const bool one = o_.nnodes == 1;
  const std::string address = one && o_.master_addr.empty() ? "127.0.0.1" : o_.master_addr;
  int port = o_.master_port;
  if (port == 0) port = one ? port_of(listen_on(address, 0)) : kDefaultPort;
  if (!o_.log_dir.empty()) make_dirs(o_.log_dir);
  for (int r = 0; r < o_.nproc_per_node; ++r) start_rank(r, address, port);
}

void Attempt::start_rank(int local_rank, const std::string& address, int port) {
  const int rank = o_.node_rank * o_.nproc_per_node + local_rank;
  int out[2], err[2];
  check(::pipe2(out, O_CLOEXEC) == 0 && ::pipe2(err, O_CLOEXEC) == 0, "no pipe: {}",
        std::strerror(errno));
  Fd out_read(out[0]), out_write(out[1]), err_read(err[0]), err_write(err[1]);
  ChildSpec child;
  child.words = o_.command;
  child.out = out_write.get();
  child.err = err_write.get();
  child.unset = {"TORCHELASTIC_USE_AGENT_STORE", "HGRN_MASTER_PORT"};
  child.set = {
      {"RANK", std::to_string(rank)},
      {"WORLD_SIZE", std::to_string(o_.nnodes * o_.nproc_per_node)},
      {"LOCAL_RANK", std::to_string(local_rank)},
      {"LOCAL_WORLD_SIZE", std::to_string(o_.nproc_per_node)},
      {"MASTER_ADDR", address},
      {"MASTER_PORT", std::to_string(port)},
      {"HGRN_JOB_TOKEN", token_},
      {"HGRN_RESTARTS", std::to_string(restarts_)},
      {"HGRN_LAUNCHED", "1"},
  };
  if (!std::getenv("OMP_NUM_THREADS"))
    child.set.push_back(
        {"OMP_NUM_THREADS", std::to_string(std::max(
                                1, int(std::thread::hardware_concurrency()) / o_.nproc_per_node))});
  const pid_t pid = start_child(child);
  processes_.push_back({rank, pid, true, false, 0});
  int log = -1;
  if (!o_.log_dir.empty()) {
    const std::string path = fmt::format("{}/rank-{}.log", o_.log_dir, rank);
    logs_.emplace_back(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
    log = logs_.back().get();
    check(log >= 0, "{}: {}; choose another --log-dir", path, std::strerror(errno));
  }
  const std::string prefix = fmt::format("[rank {}] ", rank);
  lines_.emplace_back(std::move(out_read), STDOUT_FILENO, prefix, log);
  lines_.emplace_back(std::move(err_read), STDERR_FILENO, prefix, log);
}

void Attempt::kill_all(int number) {
  for (Process& p : processes_)
    if (p.running) ::kill(-p.pid, number) == 0 || ::kill(p.pid, number) == 0;
}

void Attempt::on_signal(int number) {
  if (number == SIGCHLD) return reap();
  if (!stopping_) log_warn("launch: signal {}: the ranks save and end", number);
  stopping_ = true;
  kill_all(number == SIGHUP ? SIGTERM : number);
}

void Attempt::reap() {
  for (Process& p : processes_) {
    if (!p.running || ::waitpid(p.pid, &p.status, WNOHANG) != p.pid) continue;
    p.running = false;
    ::kill(-p.pid, SIGKILL);  // whatever it may have started
    note_end(p);
  }
}

void Attempt::note_end(Process& p) {
  if (WIFEXITED(p.status)) {
    const auto code = Exit(WEXITSTATUS(p.status));
    if (code == Exit::ok) return;
    if (code == Exit::stopped) {
      stopped_ = true;
      return;
    }
    // The code of a rank that knows why beats 1, which the others end with when they lose it.
    if (!failure_ || (*failure_ == Exit::failed && !p.ended_by_us)) failure_ = code;
    if (!p.ended_by_us) log_warn("launch: rank {} ended with code {}", p.rank, int(code));
  } else {
    if (p.ended_by_us) return;
    const int number = WTERMSIG(p.status);
    if (stopping_ && (number == SIGTERM || number == SIGINT || number == SIGUSR1)) {
      stopped_ = true;  // it had not begun: there is nothing to save
      return;
    }
    log_warn("launch: rank {} (pid {}) was killed by signal {} ({})", p.rank, p.pid, number,
             ::strsignal(number));
    if (!failure_) failure_ = Exit::failed;
  }
  if (failed_at_ == 0) failed_at_ = monotonic_s();
}

Exit Attempt::run() {
  double all_ended_at = 0;
  int sent = 0;
  for (;;) {
    std::vector<pollfd> polled = {{signals_.get(), POLLIN, 0}};
    for (const LineWriter& l : lines_) polled.push_back({l.fd(), POLLIN, 0});
    ::poll(polled.data(), polled.size(), 100);
    for (size_t i = 0; i < lines_.size(); ++i)
      if (lines_[i].open() && polled[i + 1].revents != 0) lines_[i].pump();
    while (const int number = signals_.next()) on_signal(number);
    reap();
    const double now = monotonic_s();
    if (!any_running()) {
      if (all_ended_at == 0) all_ended_at = now;
      const bool drained =
          std::none_of(lines_.begin(), lines_.end(), [](const LineWriter& l) { return l.open(); });
      if (drained || now - all_ended_at > kDrainSeconds) break;
      continue;
    }
    if (failed_at_ == 0) continue;
    const int due = now - failed_at_ > kGraceSeconds + kTermSeconds ? SIGKILL
                    : now - failed_at_ > kGraceSeconds              ? SIGTERM
                                                                    : 0;
    if (due == sent) continue;
    sent = due;
    for (Process& p : processes_) p.ended_by_us |= p.running;
    kill_all(due);
  }
  for (LineWriter& l : lines_) l.finish();
  if (failure_) return *failure_;
  return stopped_ ? Exit::stopped : Exit::ok;
}

void check_options(const LaunchOptions& o) {
  check(!o.command.empty() && o.command[0] == "train", Exit::usage,
        "hgrn launch: give the command to start after --, for example -- train --config FILE");
  check(!o.standalone || (o.nnodes == 1 && o.node_rank == 0 && o.master_addr.empty()), Exit::usage,
        "hgrn launch: --standalone means one machine; leave out --nnodes, --node-rank and "
        "--master-addr");
  check(o.node_rank < o.nnodes, Exit::usage,
        "hgrn launch: --node-rank {} of --nnodes {}: it counts from 0", o.node_rank, o.nnodes);
  check(o.nnodes == 1 || !o.master_addr.empty(), Exit::usage,
        "hgrn launch: {} machines need --master-addr, the address of the one with --node-rank 0",
        o.nnodes);
}

}  // namespace

Exit launch(const LaunchOptions& o) {
  check_options(o);
  const char* given = std::getenv("HGRN_JOB_TOKEN");
  const std::string token = given && *given ? given : o.nnodes == 1 ? random_token() : "";
  if (token.empty())
    log_warn(
        "launch: no secret guards {}; set HGRN_JOB_TOKEN to the same random text on all "
        "machines",
        o.master_addr);
  const SignalFd signals;
  for (int restarts = 0;; ++restarts) {
    Attempt attempt(o, signals, token, restarts);
    attempt.start();
    const Exit code = attempt.run();
    if (code != Exit::failed || attempt.stopping() || restarts >= o.max_restarts) return code;
    log_warn("launch: restart {} of {}, from the newest checkpoint", restarts + 1, o.max_restarts);
  }
}

}  // namespace hgrn
