// Shard files for the tests of readers.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "core/check.h"
#include "temp_folder.h"
#include "text/shard_format.h"

namespace hgrn::test {

inline std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

// A shard as bytes, put together here and not by ShardWriter, so that the two cannot share a
// mistake.
template <class Token>
std::string shard_bytes(const std::vector<Token>& tokens, int32_t magic, int32_t version) {
  std::vector<int32_t> header(256, 0);
  header[0] = magic, header[1] = version, header[2] = int32_t(tokens.size());
  std::string bytes(1024 + tokens.size() * sizeof(Token), '\0');
  std::memcpy(bytes.data(), header.data(), 1024);
  if (!tokens.empty())
    std::memcpy(bytes.data() + 1024, tokens.data(), tokens.size() * sizeof(Token));
  return bytes;
}
inline std::string narrow_bytes(const std::vector<uint16_t>& tokens) {
  return shard_bytes(tokens, 20240520, 1);
}

// A narrow shard of first, first+1, ..., count tokens.
inline void write_range(const std::string& path, int first, int count) {
  std::vector<uint16_t> tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), uint16_t(first));
  write_bytes(path, narrow_bytes(tokens));
}

// A shard with `count` tokens in its header and a hole behind it; false where the file system
// refuses such a file.
inline bool write_sparse(const std::string& path, int64_t count, bool wide) {
  using namespace shard_format;
  std::string header = wide ? shard_bytes<uint32_t>({}, kWideMagic, kWideVersion)
                            : shard_bytes<uint16_t>({}, kNarrowMagic, kNarrowVersion);
  std::memcpy(header.data() + 8, &count, 8);
  write_bytes(path, header);
  return ::truncate(path.c_str(), kHeaderBytes + count * token_bytes(wide)) == 0;
}
// Puts a token into a narrow one.
inline void put_token(const std::string& path, int64_t at, uint16_t token) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(std::streamoff(shard_format::kHeaderBytes + 2 * at));
  file.write(reinterpret_cast<const char*>(&token), 2);
  check(bool(file), "cannot write {}", path);
}

// The Error that `action` throws; its absence is an Error of its own.
inline Error error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  return Error(Exit::ok, "no error was thrown");
}
inline bool has(const Error& error, const std::string& text) {
  return std::string(error.what()).find(text) != std::string::npos;
}

}  // namespace hgrn::test
