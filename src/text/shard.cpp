#include "text/shard.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "core/check.h"
#include "text/shard_format.h"

namespace hgrn {

using namespace shard_format;
static_assert(std::endian::native == std::endian::little,
              "shards are read as they lie on the disk");

// ---- reading

Shard::Shard(const std::string& path) : file_(path) {
  const int64_t size = file_.size();
  check(size >= kHeaderBytes, Exit::data,
        "{}: {} bytes are fewer than the {} of a token shard's header (offset {}); make shards "
        "with `hgrn tokenize`",
        path, size, kHeaderBytes, size);
  int32_t head[4];
  file_.copy(head, 0, sizeof head);
  check(head[0] == kNarrowMagic || head[0] == kWideMagic, Exit::data,
        "{}: magic {} at offset 0 is not a token shard's ({}, or {} for uint32 tokens); make "
        "shards with `hgrn tokenize`",
        path, head[0], kNarrowMagic, kWideMagic);
  wide_ = head[0] == kWideMagic;
  const int32_t version = wide_ ? kWideVersion : kNarrowVersion;
  check(head[1] == version, Exit::data,
        "{}: version {} at offset 4, but magic {} goes with version {}; make the shard again with "
        "`hgrn tokenize`",
        path, head[1], head[0], version);
  std::memcpy(&count_, head + 2, sizeof count_);
  const int64_t held = (size - kHeaderBytes) / token_bytes(wide_);  // no product that overflows
  const bool fits = count_ == held && (size - kHeaderBytes) % token_bytes(wide_) == 0;
  check(fits, Exit::data,
        "{}: the header counts {} tokens (offset 8), but the file's {} bytes hold {} tokens of {} "
        "bytes behind the header: it is {}; copy it again or make it again",
        path, count_, size, held, token_bytes(wide_), count_ > held ? "truncated" : "too long");
}

void Shard::read(int64_t first, int64_t count, int32_t* out, int64_t vocab_size) const {
  check(first >= 0 && count >= 0 && first <= count_ - count,
        "{}: {} tokens from token {} were asked for, but it has {}", path(), count, first, count_);
  const int64_t offset = kHeaderBytes + first * token_bytes(wide_);
  uint32_t largest = 0;
  if (wide_) {
    file_.copy(out, offset, 4 * count);
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, uint32_t(out[i]));
  } else {
    // The uint16 tokens go into the upper half of `out` and are widened in place: token i is read
    // at byte 2(count+i) before bytes up to 4i+3 <= 2(count+i)+1 are written.
    const unsigned char* raw = reinterpret_cast<unsigned char*>(out) + 2 * count;
    file_.copy(reinterpret_cast<unsigned char*>(out) + 2 * count, offset, 2 * count);
    for (int64_t i = 0; i < count; ++i) {
      uint16_t token;
      std::memcpy(&token, raw + 2 * i, 2);
      out[i] = token;
      largest = std::max(largest, uint32_t(token));
    }
  }
  const int64_t limit = vocab_size > 0 ? vocab_size : int64_t(1) << 31;
  if (int64_t(largest) < limit) [[likely]]
    return;
  int64_t bad = 0;
  while (int64_t(uint32_t(out[bad])) < limit) ++bad;
  fail(Exit::data,
       "{}: token {} (offset {}) is {}, outside the vocabulary of {}; these shards were made with "
       "another tokenizer, or model.vocab_size is wrong",
       path(), first + bad, offset + bad * token_bytes(wide_), uint32_t(out[bad]), limit);
}

// ---- writing

namespace {

constexpr size_t kBufferBytes = size_t(1) << 20;

void write_all(int fd, const void* data, size_t bytes, int64_t offset, const std::string& path) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t done = ::pwrite(fd, from, bytes, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) {
      const int error = done < 0 ? errno : EIO;
      fail(Exit::failed, "cannot write {}: {}{}", path, std::strerror(error),
           error == ENOSPC || error == EDQUOT || error == EFBIG
               ? "; free some space, or choose another --out"
               : "");
    }
    from += done, offset += done, bytes -= size_t(done);
  }
}

// A rename is only on the disk once its folder is. Some file systems cannot sync a folder: their
// answer is not an error of ours.
void sync_folder_of(const std::string& path) {
  std::filesystem::path folder = std::filesystem::path(path).parent_path();
  const int fd = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  (void)::fsync(fd);
  ::close(fd);
}

// Writes the tokens' low bytes; returns the bits that any token has.
template <class T>
uint32_t put(unsigned char* to, std::span<const int32_t> tokens) {
  uint32_t all = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const T narrow = T(tokens[i]);
    std::memcpy(to + i * sizeof(T), &narrow, sizeof(T));
    all |= uint32_t(tokens[i]);
  }
  return all;
}

}  // namespace

ShardWriter::ShardWriter(std::string path, bool wide, std::string temp_path)
    : path_(std::move(path)),
      temp_path_(temp_path.empty() ? fmt::format("{}.tmp-{}", path_, ::getpid())
                                   : std::move(temp_path)),
      wide_(wide) {
  fd_ = ::open(temp_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  check(fd_ >= 0, Exit::failed, "cannot create {}: {}", temp_path_, std::strerror(errno));
  buffer_.reserve(kBufferBytes);
}

ShardWriter::~ShardWriter() {
  if (fd_ >= 0) ::close(fd_);
  if (!published_) ::unlink(temp_path_.c_str());
}

void ShardWriter::append(std::span<const int32_t> tokens) {
  check(fd_ >= 0, "{} is finished, nothing can be appended", path_);
  const size_t width = size_t(token_bytes(wide_));
  while (!tokens.empty()) {
    const size_t used = buffer_.size(), n = std::min(tokens.size(), (kBufferBytes - used) / width);
    buffer_.resize(used + n * width);
    const uint32_t all = wide_ ? put<uint32_t>(buffer_.data() + used, tokens.first(n))
                               : put<uint16_t>(buffer_.data() + used, tokens.first(n));
    if (int64_t(all) >= (wide_ ? int64_t(1) << 31 : kNarrowVocab)) refuse(tokens.first(n));
    count_ += int64_t(n);
    tokens = tokens.subspan(n);
    if (buffer_.size() + width > kBufferBytes) flush();
  }
}

void ShardWriter::refuse(std::span<const int32_t> tokens) const {
  for (int32_t token : tokens)
    check(token >= 0 && (wide_ || token < kNarrowVocab), "{}: token {} does not fit a {} shard",
          path_, token, wide_ ? "uint32" : "uint16");
}

void ShardWriter::flush() {
  const int64_t end = kHeaderBytes + count_ * token_bytes(wide_);
  write_all(fd_, buffer_.data(), buffer_.size(), end - int64_t(buffer_.size()), temp_path_);
  buffer_.clear();
}

void ShardWriter::complete() {
  check(fd_ >= 0, "{} is finished already", path_);
  flush();
  buffer_ = {};
  int32_t header[kHeaderWords] = {wide_ ? kWideMagic : kNarrowMagic,
                                  wide_ ? kWideVersion : kNarrowVersion};
  std::memcpy(header + 2, &count_, sizeof count_);
  write_all(fd_, header, sizeof header, 0, temp_path_);
  check(::fsync(fd_) == 0, Exit::failed, "cannot write {}: {}", temp_path_, std::strerror(errno));
  ::close(fd_);
  fd_ = -1;
}

void ShardWriter::publish() {
  check(fd_ < 0 && !published_, "{} is not complete, or published already", path_);
  check(::rename(temp_path_.c_str(), path_.c_str()) == 0, Exit::failed,
        "cannot rename {} to {}: {}", temp_path_, path_, std::strerror(errno));
  published_ = true;
  sync_folder_of(path_);
}

// ---- globs

std::vector<std::string> expand_glob(const std::string& pattern, std::string_view what) {
  struct stat info;
  if (::stat(pattern.c_str(), &info) == 0) return {pattern};
  glob_t found = {};
  const int result = ::glob(pattern.c_str(), GLOB_TILDE | GLOB_BRACE, nullptr, &found);
  std::vector<std::string> paths;
  if (result == 0) paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  ::globfree(&found);
  check(!paths.empty(), Exit::data,
        "{}: no file matches '{}' (looked in {}); make shards with `hgrn tokenize`, or mend the "
        "pattern",
        what, pattern, std::filesystem::current_path().string());
  std::sort(paths.begin(), paths.end());  // glob sorts by the locale
  return paths;
}

}  // namespace hgrn
