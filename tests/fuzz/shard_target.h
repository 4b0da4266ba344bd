// What the shard fuzzer feeds; the test that replays its corpus shares it. A file may be refused
// with Exit::data; anything else that is thrown, and any broken invariant, is a finding.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/check.h"
#include "text/shard.h"

namespace hgrn::fuzz {

inline void shard(const uint8_t* data, size_t size) {
  const auto require = [](bool ok) {
    if (!ok) std::abort();
  };
  const int fd = ::memfd_create("shard", MFD_CLOEXEC);
  require(fd >= 0 && ::write(fd, data, size) == ssize_t(size));
  try {
    const Shard opened("/proc/self/fd/" + std::to_string(fd));
    const int64_t count = opened.count(), width = opened.wide() ? 4 : 2;
    require(count >= 0 && size_t(1024 + count * width) == size);
    const int64_t first = count / 3, n = count - first;
    std::vector<int32_t> tokens(size_t(n) + 1, -5), small(tokens);
    opened.read(first, n, tokens.data());
    require(tokens.back() == -5);
    for (int64_t i = 0; i < n; ++i) {
      uint32_t raw = 0;
      std::memcpy(&raw, data + 1024 + (first + i) * width, size_t(width));
      require(tokens[size_t(i)] >= 0 && uint32_t(tokens[size_t(i)]) == raw);
    }
    const int32_t vocab = 257;
    opened.read(first, n, small.data(), vocab);  // throws where a token is outside
    require(std::all_of(small.begin(), small.end() - 1, [&](int32_t t) { return t < vocab; }));
  } catch (const Error& error) {
    require(error.code() == Exit::data);
  }
  ::close(fd);
}

}  // namespace hgrn::fuzz
