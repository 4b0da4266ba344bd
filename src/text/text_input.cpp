#include "text/text_input.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/check.h"

namespace hgrn {
namespace {

bool is_stdin(const std::string& path) {
  return path == "-";
}

}  // namespace

TextInput::TextInput(const std::string& path)
    : name_(is_stdin(path) ? "standard input" : path),
      fd_(is_stdin(path) ? STDIN_FILENO : ::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  check(fd_ >= 0, Exit::data, "cannot open {}: {}; check the path and its permissions", path,
        std::strerror(errno));
}

TextInput::~TextInput() {
  if (fd_ != STDIN_FILENO) ::close(fd_);
}

std::string_view TextInput::read(std::vector<char>& buffer, size_t bytes,
                                 const std::function<void()>& interrupted) {
  buffer.resize(bytes);
  ssize_t n;
  while ((n = ::read(fd_, buffer.data(), buffer.size())) < 0 && errno == EINTR)
    if (interrupted) interrupted();
  check(n >= 0, Exit::data, "cannot read {}: {}", name_, std::strerror(errno));
  return {buffer.data(), size_t(n)};
}

int64_t text_input_size(const std::string& path) {
  struct stat info;
  if (is_stdin(path)) {
    check(::fstat(STDIN_FILENO, &info) == 0, Exit::data,
          "-: standard input is closed; pipe a text into it, or name a file");
    return S_ISREG(info.st_mode) ? int64_t(info.st_size) : -1;
  }
  const bool found = ::stat(path.c_str(), &info) == 0 && ::access(path.c_str(), R_OK) == 0;
  check(found, Exit::data, "cannot open {}: {}; check the path and its permissions", path,
        std::strerror(errno));
  check(!S_ISDIR(info.st_mode), Exit::data, "{} is a folder; name the files in it", path);
  return S_ISREG(info.st_mode) ? int64_t(info.st_size) : -1;
}

}  // namespace hgrn
