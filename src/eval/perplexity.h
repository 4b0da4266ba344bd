// Perplexity under named protocols, so that a number says how it was made.
//   blocks  rows of T tokens without overlap, state zero at each row's start; the first input of a
//           row is the token before it; every token is scored once, the last partial row too
//   carry   one row over the whole stream, its state carried: unlimited context, constant memory
//   lines   state zero at every non-empty line
// The stream starts with the end-of-text token as first input, unless it begins with one.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "eval/load.h"

namespace hgrn {

enum class Protocol { blocks, carry, lines };

struct PerplexityOptions {
  std::string data;             // shards (a glob); or
  std::string text;             // a text file
  bool line_end_token = false;  // text: each line stripped, end-of-text after it
  Protocol protocol = Protocol::blocks;
  int64_t seq_len = 0;  // 0: the checkpoint's
};

struct PerplexityResult {
  std::string protocol;     // "blocks", ...
  std::string description;  // one sentence, tokenizer included
  int64_t seq_len = 0, tokens = 0;
  int64_t words = -1, bytes = -1;  // -1: unknown (shards)
  double nll = 0;                  // total, nats
  double nll_stderr = 0;           // standard error of the mean nll a token
  double seconds = 0;
  double ppl() const;
  double word_ppl() const;  // NaN where words are unknown
  double bits_per_byte() const;
  // Standard errors, from that of the mean nll a token.
  double ppl_stderr() const;
  double word_ppl_stderr() const;
  double bits_per_byte_stderr() const;
};

using TokenSink = std::function<void(int64_t index, int32_t token, double nll)>;

// `each` may be empty; it is called for every scored token, in stream order.
PerplexityResult perplexity(LoadedModel& m, const PerplexityOptions& options,
                            const TokenSink& each = {});

// interface of `hgrn eval --json`.
std::string perplexity_json(const PerplexityResult& r, const LoadedModel& m);

const char* name_of(Protocol p);

}  // namespace hgrn
