// Token shards: files of token ids (format: shard_format.h).
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/mapped_file.h"

namespace hgrn {

// Read-only view of one shard file. Any number of threads may read at once.
class Shard {
 public:
  // Exit::data with file and offset where magic, version or size are wrong.
  explicit Shard(const std::string& path);

  int64_t count() const { return count_; }  // tokens
  bool wide() const { return wide_; }       // uint32 tokens, else uint16
  const std::string& path() const { return file_.path(); }

  // Tokens [first, first+count) to `out`. Where vocab_size > 0, a token >= vocab_size is Exit::data
  // naming file, token index, byte offset and id. Without it, wide ids above 2^31-1 are refused.
  void read(int64_t first, int64_t count, int32_t* out, int64_t vocab_size = 0) const;

 private:
  MappedFile file_;
  int64_t count_ = 0;
  bool wide_ = false;
};

// Writes one shard as a stream. The file appears under its name only in publish(), complete and on
// the disk; a writer destroyed before removes what it wrote. Errors of the disk are Exit::failed.
class ShardWriter {
 public:
  // temp_path: where it is written, on the same file system; empty: beside `path`.
  ShardWriter(std::string path, bool wide, std::string temp_path = "");
  ~ShardWriter();
  ShardWriter(const ShardWriter&) = delete;
  ShardWriter& operator=(const ShardWriter&) = delete;

  void append(std::span<const int32_t> tokens);  // Exit::failed for an id that does not fit
  void complete();    // nothing can be appended any more; all is on the disk, under temp_path()
  void publish();     // and now under its name
  int64_t finish() {  // both; returns the number of tokens
    complete();
    publish();
    return count_;
  }
  int64_t count() const { return count_; }
  const std::string& path() const { return path_; }
  const std::string& temp_path() const { return temp_path_; }

 private:
  void flush();
  void refuse(std::span<const int32_t> tokens) const;  // the one that does not fit

  std::string path_, temp_path_;
  bool wide_;
  int fd_ = -1;
  bool published_ = false;
  int64_t count_ = 0;
  std::vector<unsigned char> buffer_;
};

// Files that match a glob (also ~ and {a,b}; a name that exists is taken as it is), sorted
// bytewise. None: Exit::data naming the pattern and `what`, the key or flag that it came from.
std::vector<std::string> expand_glob(const std::string& pattern, std::string_view what);

}  // namespace hgrn
