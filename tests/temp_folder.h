// Tests of files: a folder that removes itself, and code that runs (and may be killed) in a child.
#pragma once
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "core/check.h"

namespace hgrn::test {

class TempFolder {
 public:
  // The name has a space and non-ASCII letters, so that every test of files covers them.
  TempFolder() {
    std::string path = (std::filesystem::temp_directory_path() / "hgrn tést ж-XXXXXX").string();
    hgrn::check(::mkdtemp(path.data()) != nullptr, "no temporary folder {}", path);
    path_ = path;
  }
  ~TempFolder() {
    std::error_code ec;
    std::filesystem::remove_all(path_, ec);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  size_t files() const {
    return size_t(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::string path_;
};

inline std::string slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void spill(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << bytes;
}

// What a call threw: its exit code and text; Exit::ok if nothing.
struct Thrown {
  Exit code = Exit::ok;
  std::string text;
  bool has(const std::string& part) const { return text.find(part) != std::string::npos; }
};

template <class F>
Thrown thrown_by(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return {e.code(), e.what()};
  }
  return {};
}

// Runs f in a forked child. What it threw comes back through a pipe.
struct Child {
  int status = 0;
  Thrown thrown;
  bool killed() const { return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL; }
  bool exited() const { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }
};

template <class F>
Child run_in_child(F&& f) {
  int pipe_fd[2];
  hgrn::check(::pipe(pipe_fd) == 0, "no pipe");
  const pid_t pid = ::fork();
  hgrn::check(pid >= 0, "no fork");
  if (pid == 0) {
    Thrown t;
    try {
      t = thrown_by(f);
    } catch (...) {
      ::_exit(99);
    }
    const std::string message = std::to_string(int(t.code)) + " " + t.text;
    if (::write(pipe_fd[1], message.data(), message.size()) < 0) ::_exit(98);
    ::_exit(0);
  }
  ::close(pipe_fd[1]);
  Child child;
  std::string message;
  char chunk[4096];
  for (ssize_t n; (n = ::read(pipe_fd[0], chunk, sizeof chunk)) > 0;) message.append(chunk, n);
  ::close(pipe_fd[0]);
  ::waitpid(pid, &child.status, 0);
  if (const size_t space = message.find(' '); space != std::string::npos)
    child.thrown = {Exit(std::stoi(message)), message.substr(space + 1)};
  return child;
}

}  // namespace hgrn::test
