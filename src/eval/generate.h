// Sampling from a model with its recurrent state: the prompt in one pass of the chunked kernels,
// then constant memory and time a token. A token's operations are recorded once (Ops::record) and
// replayed, several tokens between two looks of the host.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "core/sampling.h"
#include "eval/load.h"

namespace hgrn {

struct GenerateOptions {
  std::vector<std::string> prompts;
  int64_t batch = 1;  // independent samples of each prompt
  int64_t tokens = 128;
  Sampling sampling;              // row0 is set by generate()
  std::vector<std::string> stop;  // a row ends before the first of these texts
};

enum class Finish { length, end_of_text, stop };
const char* name_of(Finish f);  // "length", "end_of_text", "stop"

// Row r is sample r % batch of prompt r / batch. Its draws depend on the seed and r alone.
struct GeneratedRow {
  int64_t prompt_tokens = 0;  // end-of-text in front included
  int64_t tokens = 0;         // made, the end-of-text that ended it included
  Finish finish = Finish::length;
};

struct GenerateReport {
  std::vector<GeneratedRow> rows;
  int64_t prompt_tokens = 0, tokens = 0;  // over all rows
  double first_token_seconds = 0;         // from the start to the first row's first token
  double prompt_seconds = 0;              // prompts and first tokens, over all rows
  double seconds = 0;                     // the tokens after the first of each row
  int64_t later_tokens = 0;               // made in `seconds`
  double tokens_per_s() const { return seconds > 0 ? double(later_tokens) / seconds : 0; }
};

// Called with each piece of text as it is made; prompt not included. Pieces end between UTF-8
// characters and before what may become a stop text; a character that the last token leaves
// unfinished is given as U+FFFD.
using TextSink = std::function<void(int64_t row, std::string_view text)>;

GenerateReport generate(LoadedModel& m, const GenerateOptions& options, const TextSink& sink);

// One line of `hgrn generate --json` (docs/formats.md).
std::string generated_json(const GenerateReport& report, size_t row, const std::string& prompt,
                           const std::string& text);

// The same on token ids, without a tokenizer: prompts[r] (not empty) goes on as row r, until `each`
// has returned false for it or `tokens` are made. `each` sees every row's tokens in order.
struct DecodeOptions {
  int64_t tokens = 128;
  Sampling sampling;
};
using IdSink = std::function<bool(int64_t row, int32_t token)>;
struct DecodeReport {
  double first_token_seconds = 0, seconds = 0;
  int64_t steps = 0;  // rounds of one token a row, the first included
};
DecodeReport decode(LanguageModel& model, const std::vector<std::vector<int32_t>>& prompts,
                    const DecodeOptions& options, const IdSink& each);

// A text sample of a run: one row after `prompt`, drawn at temperature 0.8 from the likeliest 95 %.
std::vector<int32_t> sample_ids(LanguageModel& model, const std::vector<int32_t>& prompt,
                                int64_t tokens, uint64_t seed);

// The text of one row on its way out.
class TextStream {
 public:
  explicit TextStream(const std::vector<std::string>& stop) : stop_(&stop) {}
  // What can be shown now. After a stop text was met, stopped() is true and nothing follows.
  std::string push(std::string_view bytes);
  std::string finish();  // the rest
  bool stopped() const { return stopped_; }

 private:
  const std::vector<std::string>* stop_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace hgrn
