// The live view on a real pseudo-terminal: what stays on the screen after a run.
#include <pty.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "catch.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int kNoTerminal = -2;

// The lines that a terminal shows after these bytes, for the controls that the program uses.
class Screen {
 public:
  explicit Screen(size_t columns) : columns_(columns) {}
  void feed(const std::string& bytes) {
    for (size_t i = 0; i < bytes.size(); ++i) {
      const char c = bytes[i];
      if (c == '\r') {
        column_ = 0;
      } else if (c == '\n') {
        ++row_;
      } else if (c == '\x1b') {
        size_t end = i + 2;
        while (end < bytes.size() && (bytes[end] < '@' || bytes[end] > '~')) ++end;
        const std::string parameter = bytes.substr(i + 2, end - i - 2);
        if (end < bytes.size()) control(bytes[end], parameter);
        i = end;
      } else if ((c & 0xC0) != 0x80) {  // one column a character
        if (column_ == columns_) column_ = 0, ++row_;
        cell() = std::string(1, c);
        ++column_;
      } else {
        --column_;
        cell() += c;
        ++column_;
      }
    }
  }
  std::vector<std::string> lines() const {
    std::vector<std::string> out;
    for (const auto& row : rows_) {
      std::string line;
      for (const std::string& c : row) line += c;
      while (!line.empty() && line.back() == ' ') line.pop_back();
      out.push_back(line);
    }
    while (!out.empty() && out.back().empty()) out.pop_back();
    return out;
  }
  std::string unknown;  // controls that it does not know

 private:
  std::string& cell() {
    if (rows_.size() <= row_) rows_.resize(row_ + 1);
    if (rows_[row_].size() <= column_) rows_[row_].resize(column_ + 1, " ");
    return rows_[row_][column_];
  }
  void control(char letter, const std::string& parameter) {
    if (letter == 'A') {
      row_ -= std::min(row_, size_t(std::max(1, std::atoi(parameter.c_str()))));
    } else if (letter == 'J') {
      if (rows_.size() > row_) rows_.resize(row_ + 1), rows_[row_].resize(column_, " ");
    } else if (letter != 'm') {
      unknown += letter;
    }
  }
  const size_t columns_;
  std::vector<std::vector<std::string>> rows_;
  size_t row_ = 0, column_ = 0;
};

struct Session {
  int code = kNoTerminal;
  std::string bytes;
};

// `at` is sent once the output holds `when`.
Session in_terminal(const std::vector<std::string>& words, int columns,
                    const std::vector<std::pair<std::string, std::string>>& environment,
                    const std::string& when = "", const std::string& send = "") {
  winsize size{};
  size.ws_col = static_cast<unsigned short>(columns);
  size.ws_row = 24;
  int terminal = -1;
  const pid_t pid = ::forkpty(&terminal, nullptr, nullptr, &size);
  if (pid < 0) {
    WARN("skipped: no pseudo-terminal here (" << std::strerror(errno) << ")");
    return {};
  }
  if (pid == 0) {
    ::setenv("TERM", "xterm", 1);
    ::setenv("LC_ALL", "C.UTF-8", 1);
    ::setenv("OMP_NUM_THREADS", "1", 1);
    ::unsetenv("NO_COLOR");
    for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
    std::vector<char*> argv = {const_cast<char*>(HGRN_BINARY)};
    for (const std::string& w : words) argv.push_back(const_cast<char*>(w.c_str()));
    argv.push_back(nullptr);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  Session s;
  bool sent = send.empty();
  char chunk[4096];
  for (ssize_t n; (n = ::read(terminal, chunk, sizeof chunk)) > 0;) {
    s.bytes.append(chunk, size_t(n));
    if (!sent && s.bytes.find(when) != std::string::npos)
      sent = ::write(terminal, send.data(), send.size()) > 0;
  }
  ::close(terminal);
  int status = 0;
  ::waitpid(pid, &status, 0);
  s.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return s;
}

std::vector<std::string> train_words(const RunFolder& r, const std::string& out, int64_t steps) {
  return {"train",
          "--config",
          r.folder / "config.json",
          "--out",
          r.folder / out,
          "--device",
          "cpu",
          "--set",
          "train.steps=" + std::to_string(steps),
          "--set",
          "train.eval_every=50",
          "--set",
          "train.checkpoint_every=100",
          "--set",
          "optim.lr=1e-3"};
}

// Every line must be a whole log line (they begin with the time of day).
void check_log_lines(const std::vector<std::string>& lines) {
  for (const std::string& line : lines) {
    INFO(line);
    CHECK(line.size() > 9);
    CHECK(line[2] == ':');
    CHECK(line[5] == ':');
  }
}

std::string joined(const std::vector<std::string>& lines) {
  std::string all;
  for (const std::string& line : lines) all += line + "\n";
  return all;
}

}  // namespace

TEST_CASE("view: after a run the terminal holds the log lines and nothing else", "[cli]") {
  const RunFolder r;
  const Session s = in_terminal(train_words(r, "view", 250), 160, {});
  if (s.code == kNoTerminal) return;
  CHECK(s.code == 0);
  Screen screen(160);
  screen.feed(s.bytes);
  INFO(joined(screen.lines()));
  CHECK(screen.unknown.empty());
  check_log_lines(screen.lines());
  const std::string all = joined(screen.lines());
  for (const char* part : {"parameters,", "step 50  valid loss", "step 250  valid loss",
                           "checkpoint of step 200", "step 250/250", "done: step 250"})
    CHECK(all.find(part) != std::string::npos);
  CHECK(all.find("step 100/250") == std::string::npos);  // the block showed it
  CHECK(s.bytes.find("\x1b[3A\x1b[J") != std::string::npos);
  CHECK(s.bytes.find("\xe2\x94\x81") != std::string::npos);  // a bar
  CHECK(s.bytes.find("elapsed 0:0") != std::string::npos);
  CHECK(slurp(r.folder / "view/log.txt").find("step 100/250") != std::string::npos);
}

TEST_CASE("view: Ctrl-C leaves the terminal clean", "[cli]") {
  const RunFolder r;
  const Session s = in_terminal(train_words(r, "stop", 100000000), 70, {}, "step 100  v", "\x03");
  if (s.code == kNoTerminal) return;
  CHECK(s.code == 75);
  Screen screen(70);
  screen.feed(s.bytes);
  const auto lines = screen.lines();
  INFO(joined(lines));
  CHECK(joined(lines).find("stopped by signal 2") != std::string::npos);
  CHECK(joined(lines).find("elapsed") == std::string::npos);
  CHECK(joined(lines).find("tok/s") == std::string::npos);
  CHECK(s.bytes.find("\x1b[?") == std::string::npos);  // no mode that would have to be undone
}

TEST_CASE("view: NO_COLOR, dumb terminals and --plain", "[cli]") {
  const RunFolder r;
  const Session grey = in_terminal(train_words(r, "grey", 60), 100, {{"NO_COLOR", "1"}});
  if (grey.code == kNoTerminal) return;
  CHECK(grey.code == 0);
  CHECK(grey.bytes.find("m") != std::string::npos);
  CHECK(grey.bytes.find("\x1b[0m") == std::string::npos);
  CHECK(grey.bytes.find("\x1b[J") != std::string::npos);  // the block is there
  const Session dumb = in_terminal(train_words(r, "dumb", 60), 100, {{"TERM", "dumb"}});
  CHECK(dumb.bytes.find('\x1b') == std::string::npos);
  CHECK(dumb.bytes.find("step 30/60") != std::string::npos);
  auto words = train_words(r, "plain", 60);
  words.push_back("--plain");
  const Session plain = in_terminal(words, 100, {});
  CHECK(plain.bytes.find("\x1b[J") == std::string::npos);
  CHECK(plain.bytes.find("step 30/60") != std::string::npos);
}
