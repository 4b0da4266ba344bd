// A set of shards on its way to the disk: written in a folder beside its place, published whole.
#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/file.h"
#include "text/shard.h"
#include "text/shard_manifest.h"
#include "text/tokenizer.h"

namespace hgrn {

// PREFIX.tmp-PID, held by a lock as long as this lives; removed with what is left in it.
class ShardWorkplace {
 public:
  explicit ShardWorkplace(const std::string& prefix);
  ~ShardWorkplace();
  ShardWorkplace(const ShardWorkplace&) = delete;
  ShardWorkplace& operator=(const ShardWorkplace&) = delete;
  const std::string& path() const { return path_; }
  // Folders of other processes for the same prefix that no process holds any more: removed.
  const std::vector<std::string>& stale() const { return stale_; }

 private:
  std::string path_;
  Fd lock_;
  std::vector<std::string> stale_;
};

// One part of a set: PREFIX_000000.bin, ... or PREFIX_NAME_000000.bin, ...
class ShardSet {
 public:
  // name: "all", "train" or "valid".
  ShardSet(const Tokenizer& tokenizer, std::string prefix, const std::string& name,
           int64_t shard_tokens, const ShardWorkplace& workplace);
  void append(std::span<const int32_t> tokens);
  void complete();  // all is on the disk
  // Renames the shards to their places, then removes higher-numbered ones of an earlier set.
  void publish(std::vector<std::string>& removed);
  const ShardManifest::Part& part() const { return part_; }  // after complete()
  std::string path(size_t n) const;                          // of shard n

 private:
  void start_shard();
  void end_shard();

  std::string stem_;  // PREFIX or PREFIX_NAME
  std::string workplace_;
  bool wide_;
  int64_t shard_tokens_;
  int32_t eos_;
  std::vector<uint32_t> token_bytes_;  // length in bytes of every token's text
  std::vector<std::unique_ptr<ShardWriter>> writers_;
  ShardManifest::Part part_;
};

// Whether `file` is a name that a set with this prefix gives its shards (both without folder).
bool is_shard_name(std::string_view file, std::string_view prefix);

}  // namespace hgrn
