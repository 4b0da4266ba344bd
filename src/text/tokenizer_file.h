// The files of byte-level BPE tokenizers, read and checked. Errors are Exit::data and name the
// file, the place in it and what is supported.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/added_tokens.h"
#include "text/words.h"

namespace hgrn {

struct TokenizerDefinition {
  struct Merge {
    std::string left, right;
    size_t line = 0;  // of merges.txt, or the place in the list; from 1
  };
  std::string file;                                    // what errors name
  std::vector<std::pair<std::string, int64_t>> vocab;  // in GPT-2's byte alphabet
  std::string merges_file, merge_unit = "line";        // where a merge stands
  std::vector<Merge> merges;
  bool ignore_merges = false;
  bool nfc = false;
  std::vector<Split> steps;
  std::vector<AddedToken> added;
  std::string end_of_text;  // content; empty: one of the usual names is looked for
};

// tokenizer.json of Hugging Face tokenizers. `text` is the file's content, `path` serves errors.
TokenizerDefinition read_tokenizer_json(std::string_view text, const std::string& path);

// GPT-2's pair: encoder.json or vocab.json, and vocab.bpe or merges.txt.
TokenizerDefinition read_gpt2_files(std::string_view vocab, const std::string& vocab_path,
                                    std::string_view merges, const std::string& merges_path);

// "eos_token" of a tokenizer_config.json; empty where it has none.
std::string read_eos_token(std::string_view text, const std::string& path);

}  // namespace hgrn
