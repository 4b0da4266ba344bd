// PREFIX.json beside a set of shards: what they hold and what they were made of (docs/formats.md).
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace hgrn {

struct ShardManifest {
  struct Shard {
    std::string file;  // beside the manifest
    int64_t tokens = 0;
    int64_t bytes = 0;  // of the text that the tokens spell
    int64_t ends = 0;   // end-of-text tokens: documents that start, or lines that end, in it
    uint64_t xxh3 = 0;  // of the file
  };
  struct Part {
    std::string name;  // "all", or "train" and "valid"
    std::vector<Shard> shards;
    Shard total() const;  // sums; file and xxh3 are empty
  };
  struct File {
    std::string name;
    int64_t bytes = 0;  // -1: not known, a pipe
    uint64_t xxh3 = 0;  // of tokenizer files; 0 for inputs
  };
  std::string program;  // name and version
  std::string tokenizer;
  int64_t vocab_size = 0, eos = 0;
  uint64_t fingerprint = 0;  // Tokenizer::fingerprint()
  std::vector<File> tokenizer_files, inputs;
  bool line_end_token = false, special_tokens = false;
  std::string document_separator, json_key;
  int64_t shard_tokens = 0;
  double valid_fraction = 0;
  std::vector<Part> parts;
};

constexpr const char* kShardManifestFormat = "hgrn-token-shards";

std::string shard_manifest_to_json(const ShardManifest& m);
// Whether a file's first bytes are those of a manifest.
bool is_shard_manifest(std::string_view start);
// Exit::data naming `path` and the key that is missing or wrong. A file name in it is a plain name.
ShardManifest shard_manifest_from_json(std::string_view text, const std::string& path);

}  // namespace hgrn
