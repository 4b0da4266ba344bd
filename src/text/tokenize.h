// Text files to a stream of tokens, and that stream to shards. Memory does not grow with the files.
//
// Documents: a file is a document, or several where it is split at a separator (which is dropped).
// One end-of-text token stands before each document; an empty document gives nothing.
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
  std::vector<std::string> files;
  bool line_end_token = false;     // lines, else documents
  std::string document_separator;  // taken literally; empty: a file is a document
  int jobs = 1;                    // threads that encode; the result does not depend on it
};

struct EncodeReport {
  int64_t bytes = 0, tokens = 0, documents = 0, lines = 0;  // lines: only with line_end_token
};

// Hands the tokens of `files` to `sink`, in order, in pieces of any size. `progress` may be empty;
// it is called a few times a second and once at the end, on the calling thread.
EncodeReport encode_files(const Tokenizer& tokenizer, const EncodeOptions& options,
                          const std::function<void(std::span<const int32_t>)>& sink,
                          const TokenizeProgressFn& progress = {});

struct TokenizeOptions {
  std::string tokenizer = "byte";
  std::string out;                     // PREFIX; empty: the first file without its extension
  int64_t shard_tokens = 100'000'000;  // tokens a shard; the last one holds the rest
  bool line_end_token = false;
  bool special_tokens = false;  // SpecialTokens::recognised
  std::string document_separator;
  int jobs = 1;
  std::vector<std::string> files;
  TokenizeProgressFn progress;
};

struct TokenizeReport {
  EncodeReport encoded;
  std::string tokenizer;
  int64_t vocab_size = 0;
  std::vector<std::string> shards;   // files written, in order
  std::vector<std::string> removed;  // of an earlier, longer set with the same prefix
  double seconds = 0;
};

// Writes PREFIX_000000.bin, PREFIX_000001.bin, ...: uint16 tokens where the vocabulary allows, else
// uint32. All appear at the end, complete; an error before leaves an earlier set as it was. Shards
// that an earlier run left behind the last one are removed, since a glob over the prefix would read
// them as part of this set.
TokenizeReport tokenize(const TokenizeOptions& options);

// `text` without whitespace (Unicode White_Space in UTF-8, and ASCII 0x1c-0x1f) at both ends, at
// its start, at its end.
std::string_view strip(std::string_view text);
std::string_view strip_left(std::string_view text);
std::string_view strip_right(std::string_view text);

}  // namespace hgrn
