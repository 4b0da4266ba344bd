// Regular expressions of tokenizer.json files, matched by PCRE2.
//
// Hugging Face tokenizers matches them with Oniguruma (Ruby's syntax). What means the same in both
// engines is passed on; \s, \d and \p{..} are spelled out so that they mean the same; what differs
// otherwise (\w, \b, ^, nested classes, ...) is refused, not guessed at.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace hgrn {

// The pattern in PCRE2's syntax. Exit::data naming `where` and the construct that is not supported.
std::string to_pcre2(std::string_view pattern, const std::string& where);

// A compiled pattern. Const methods may be called from any number of threads at once, each with a
// Matcher of its own.
class Pattern {
 public:
  struct Match {
    size_t begin = 0, end = 0;
  };
  // What a thread needs to match; used with any Pattern.
  class Matcher {
   public:
    Matcher();
    ~Matcher();
    Matcher(const Matcher&) = delete;
    Matcher& operator=(const Matcher&) = delete;

   private:
    friend class Pattern;
    struct Impl;
    std::unique_ptr<Impl> impl_;
  };

  // `pattern` as in the file. Exit::data where it is damaged, not supported, or can match nothing.
  Pattern(std::string_view pattern, const std::string& where);
  ~Pattern();
  Pattern(Pattern&&) noexcept;
  Pattern& operator=(Pattern&&) noexcept;

  // The first match in well-formed `text` at or after `from`; false: there is none.
  bool find(std::string_view text, size_t from, Matcher& matcher, Match& match) const;

  // The same where `text` may go on: a match is only reported when no continuation can change it.
  bool find_final(std::string_view text, size_t from, Matcher& matcher, Match& match) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

std::string pcre2_version();  // "10.42, Unicode 14.0.0"

}  // namespace hgrn
