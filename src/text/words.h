// Pre-tokenisation: text to words, none of which a token crosses.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/pattern.h"

namespace hgrn {

// The pattern of GPT-2 and GPT-NeoX.
inline constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// The pattern of Llama 3, and of Qwen 2, which takes digits one by one.
inline constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// One step of a pre-tokeniser: every match becomes a word, and so does what lies between two.
struct Split {
  std::string pattern;
  bool contiguous = false;  // matches that touch become one word
};

class Words {
 public:
  Words(const std::vector<Split>& steps, const std::string& where);

  // Calls word(piece) for the pieces of well-formed `text`, in order; each step cuts the pieces of
  // the step before.
  template <class Word>
  void split(std::string_view text, Pattern::Matcher& matcher, Word&& word) const {
    if (text.empty()) return;
    if (fast_ == Fast::none) return split_step(0, text, matcher, word);
    for (size_t at = 0, end; at < text.size(); at = end) {
      end = fast_ == Fast::gpt2 ? ascii_gpt2(text, at) : ascii_llama3(text, at);
      if (end == 0) end = next_end(0, text, at, matcher);
      word(text.substr(at, end - at));
    }
  }

  // The same, without the code for ASCII that knows the patterns above (for tests).
  template <class Word>
  void split_by_pattern(std::string_view text, Pattern::Matcher& matcher, Word&& word) const {
    if (!text.empty()) split_step(0, text, matcher, word);
  }

  // Whether a word always ends between a character that is not whitespace and a space (U+0020).
  bool cuts_at_space() const { return fast_ != Fast::none; }
  // Whether, with such a pattern, one always ends in front of a newline behind what is not
  // whitespace; else it always ends behind a newline in front of what is not.
  bool cuts_before_newline() const { return fast_ == Fast::gpt2; }

  // Places where `text`, whatever follows it, is certainly cut by the first step, in order.
  template <class Place>
  void final_cuts(std::string_view text, Pattern::Matcher& matcher, Place&& place) const {
    Pattern::Match m;
    for (size_t at = 0; !steps_.empty() && !contiguous_[0] && at < text.size(); at = m.end) {
      if (!steps_[0].find_final(text, at, matcher, m)) return;
      place(m.begin);
      place(m.end);
    }
  }

 private:
  enum class Fast { none, gpt2, llama3 };
  // Where the word that starts at text[at] ends; 0: it depends on characters outside of ASCII.
  static size_t ascii_gpt2(std::string_view text, size_t at);
  size_t ascii_llama3(std::string_view text, size_t at) const;
  size_t next_end(size_t step, std::string_view text, size_t at, Pattern::Matcher& matcher) const;

  template <class Word>
  void split_step(size_t step, std::string_view text, Pattern::Matcher& matcher, Word& word) const {
    if (step == steps_.size()) return word(text);
    const auto hand_on = [&](size_t begin, size_t end) {
      if (begin < end) split_step(step + 1, text.substr(begin, end - begin), matcher, word);
    };
    Pattern::Match m;
    size_t run = 0, at = 0;  // text[run, at): matches that touch, not handed on yet
    for (; at < text.size() && steps_[step].find(text, at, matcher, m); at = m.end) {
      if (!contiguous_[step] || m.begin > at) {
        hand_on(run, at);
        hand_on(at, m.begin);
        run = m.begin;
      }
    }
    hand_on(run, at);
    hand_on(at, text.size());
  }

  std::vector<Pattern> steps_;
  std::vector<bool> contiguous_;
  Fast fast_ = Fast::none;
  size_t digits_ = 0;  // of kLlama3Pattern and kQwen2Pattern
};

}  // namespace hgrn
