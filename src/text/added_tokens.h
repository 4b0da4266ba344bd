// Tokens that are found in the text before anything else happens to it, by the rules of Hugging
// Face tokenizers (AddedVocabulary): leftmost, longest, without overlap.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/pattern.h"

namespace hgrn {

struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool single_word = false;  // only where no word character stands beside it
  bool lstrip = false;       // takes the whitespace before it
  bool rstrip = false;       // takes the whitespace behind it
  bool normalized = true;    // found in the normalised text, else in the text as it is
  bool special = false;      // end-of-text and the like
};

class AddedTokens {
 public:
  // With match_special false a special token's text is text; it still hides what overlaps it.
  AddedTokens(std::vector<AddedToken> tokens, bool match_special);
  ~AddedTokens();
  AddedTokens(AddedTokens&&) noexcept;

  bool empty() const { return tokens_.empty(); }

  // Calls text(piece) and token(id) in the order of well-formed `text`.
  template <class Text, class Token>
  void split(std::string_view text, Text&& on_text, Token&& on_token) const {
    size_t done = 0, at = 0;
    Found f;
    while (find(text, at, done, f)) {
      if (done < f.begin) on_text(text.substr(done, f.begin - done));
      on_token(f.id);
      done = f.end;
    }
    if (done < text.size()) on_text(text.substr(done));
  }

  // Whether cutting a text between the ASCII letter or digit c and a space may change what is
  // found.
  bool cut_matters(unsigned char c) const { return cut_matters_[c]; }

 private:
  struct Found {
    size_t begin, end;
    int32_t id;
  };
  // The next match from `at` on, which moves behind it. `done`: where the match before it ends.
  bool find(std::string_view text, size_t& at, size_t done, Found& found) const;
  const AddedToken* longest_at(std::string_view text, size_t at) const;
  bool beside_word(std::string_view text, size_t begin, size_t end) const;

  std::vector<AddedToken> tokens_;  // by first byte, longest first
  uint32_t bucket_[257] = {};       // tokens that start with byte b: [bucket_[b], bucket_[b+1])
  std::vector<uint64_t> starts_;    // bit set of the two bytes that a token may start with
  bool cut_matters_[256] = {};
  bool match_special_;
  struct WordTest;
  std::unique_ptr<WordTest> word_;  // only where a token is single_word
};

}  // namespace hgrn
