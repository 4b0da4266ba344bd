// Text files as streams of bytes; "-" is standard input.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace hgrn {

class TextInput {
 public:
  explicit TextInput(const std::string& path);  // Exit::data where it cannot be opened
  ~TextInput();
  TextInput(const TextInput&) = delete;
  TextInput& operator=(const TextInput&) = delete;

  // Up to `bytes` bytes into `buffer`; empty at the end. A signal that arrives while it waits calls
  // `interrupted`, which may throw.
  std::string_view read(std::vector<char>& buffer, size_t bytes,
                        const std::function<void()>& interrupted);
  const std::string& name() const { return name_; }  // for people

 private:
  std::string name_;
  int fd_;
};

// Bytes of a file that can be read, -1 for a pipe; Exit::data otherwise. Does not open it: a pipe
// can be opened once only.
int64_t text_input_size(const std::string& path);

}  // namespace hgrn
