// Text files to a stream of tokens, and that stream to shards. Memory does not grow with the files.
//
// Documents: a file is a document, or several where it is split at a separator (which is dropped)
// or is JSON lines, of which each is one. One end-of-text token stands before each document; an
// empty document gives nothing.
// Lines: each line is stripped of whitespace at both ends, one end-of-text token stands after it,
// empty lines too; no other is added. This is the stream of the paper's WikiText-103 numbers.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace hgrn {

struct TokenizeProgress {
  int64_t bytes = 0, total_bytes = 0;  // read so far, sum of the file sizes
  int64_t tokens = 0;
  double seconds = 0;
  double eta_s() const;  // < 0: not known yet
  std::string str()
      const;  // one line: "1.2 of 4.8 GB (25.0%), 1203432 tokens, 95.1 MB/s, ETA 0:38"
};
using TokenizeProgressFn = std::function<void(const TokenizeProgress&)>;

struct EncodeOptions {
  std::vector<std::string> files;  // "-" is standard input
  bool line_end_token = false;     // lines, else documents
  std::string document_separator;  // taken literally; empty: a file is a document
  int jobs = 1;                    // threads that encode; the result does not depend on it
  std::string json_key = {};       // files are JSON lines, a document the text under this key
  // Share of the documents that go to the validation part: those whose XXH3 (of the first MiB) over
  // 2^64 is below it. It depends on the document alone.
  double valid_fraction = 0;
  std::function<void()> interrupted = {};  // called between pieces and after signals; may throw
};

struct EncodeReport {
  int64_t bytes = 0, tokens = 0, documents = 0, lines = 0;  // lines: only with line_end_token
  int64_t valid_tokens = 0, valid_documents = 0;            // of these, in the validation part
};

// Hands the tokens of `files` to `sink`, in order, in pieces of any size, and those of the
// validation part to `valid_sink`. `progress` may be empty; it is called a few times a second and
// once at the end. All three are called on the calling thread. Damaged JSON lines are Exit::data
// with file and line.
using TokensFn = std::function<void(std::span<const int32_t>)>;
EncodeReport encode_files(const Tokenizer& tokenizer, const EncodeOptions& options,
                          const TokensFn& sink, const TokenizeProgressFn& progress = {},
                          const TokensFn& valid_sink = {});

struct TokenizeOptions : EncodeOptions {
  std::string tokenizer = "byte";
  std::string out;                     // PREFIX; empty: the first file without its extension
  int64_t shard_tokens = 100'000'000;  // tokens a shard; the last one holds the rest
  bool special_tokens = false;         // SpecialTokens::recognised
  TokenizeProgressFn progress;
};

struct TokenizeReport {
  EncodeReport encoded;
  std::string tokenizer;
  int64_t vocab_size = 0;
  std::vector<std::string> shards;   // files written, in order, training part first
  std::string manifest;              // PREFIX.json
  std::vector<std::string> removed;  // of an earlier set with the same prefix
  std::vector<std::string> stale;    // folders of earlier runs that were killed, removed
  double seconds = 0;
};

// Writes PREFIX_000000.bin, PREFIX_000001.bin, ... (with a validation part PREFIX_train_000000.bin,
// ..., PREFIX_valid_000000.bin, ...): uint16 tokens where the vocabulary allows, else uint32; then
// PREFIX.json, the manifest (shard_manifest.h). Until all shards are complete they lie in the
// folder PREFIX.tmp-PID; an error before leaves an earlier set as it was, and a killed process
// leaves that folder, which the next run removes. The manifest stands only beside a whole set.
// Shards of an earlier set that the new one does not replace are removed, since a glob over the
// prefix would read them as part of it.
TokenizeReport tokenize(const TokenizeOptions& options);

// `text` without whitespace (Unicode White_Space in UTF-8, and ASCII 0x1c-0x1f) at both ends, at
// its start, at its end.
std::string_view strip(std::string_view text);
std::string_view strip_left(std::string_view text);
std::string_view strip_right(std::string_view text);

}  // namespace hgrn
