// Oniguruma's syntax to PCRE2's, as far as both can be made to mean the same.
#include <array>
#include <cctype>
#include <vector>

#include "core/check.h"
#include "text/pattern.h"
#include "text/unicode_supplement.h"
#include "text/utf8.h"

namespace hgrn {
namespace {

// White_Space, and what is not, as the inside of a class. PCRE2's own \s has U+180E too.
constexpr const char* kSpace =
    R"(\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr const char* kNotSpace =
    R"(\x{00}-\x{08}\x{0e}-\x{1f}!-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff})"
    R"(\x{200b}-\x{2027}\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{d7ff})"
    R"(\x{e000}-\x{10ffff})";

// \p{Mn} and \p{Mc} are left out: a character moved between them after Unicode 14.
constexpr std::array kCategories = {"L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "N",  "Nd",
                                    "Nl", "No", "P",  "Pc", "Pd", "Ps", "Pe", "Pi", "Pf",
                                    "Po", "S",  "Sm", "Sc", "Sk", "So", "Z"};

// The inside of a class for a general category, newer characters included.
std::string category(std::string_view name) {
  std::string out = fmt::format("\\p{{{}}}", name);
  for (const UnicodeRange& r : kUnicodeSupplement)
    if (std::string_view(r.category).substr(0, name.size()) == name)
      out += fmt::format("\\x{{{:x}}}-\\x{{{:x}}}", r.first, r.last);
  return out;
}

class Translator {
 public:
  Translator(std::string_view in, const std::string& where) : in_(in), where_(where) {}

  std::string run() {
    check(utf8::valid_prefix(in_) == in_.size(), Exit::data,
          "{}: the regular expression is not UTF-8 at its byte {}", where_,
          utf8::valid_prefix(in_));
    while (at_ < in_.size()) element();
    check(caseless_.empty(), Exit::data, "{}: the regular expression {} has an open group", where_,
          in_);
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string_view what) const {
    fail(Exit::data,
         "{}: the regular expression {} uses {} at its byte {}, which is not supported; supported "
         "are literals, classes, \\s \\S \\d \\p{{..}} \\P{{..}} of general categories, groups "
         "(?:..) (?i:..), lookaheads and quantifiers",
         where_, in_, what, at_);
  }
  char peek(size_t ahead = 0) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }
  bool next_is(std::string_view s) const { return in_.substr(at_, s.size()) == s; }

  void element() {
    const char c = peek();
    const bool caseless = !caseless_.empty() && caseless_.back();
    if (c == '(') return open_group();
    if (c == ')') {
      check(!caseless_.empty(), Exit::data,
            "{}: the regular expression {} closes a group at its byte {} that is not open", where_,
            in_, at_);
      caseless_.pop_back();
      return copy(1);
    }
    if (c == '*' || c == '+' || c == '?') return copy(1);
    if (c == '{') return repeat();
    if (c == '^') refuse("^");
    if (caseless && c != '|') return caseless_literal();
    if (c == '[') return char_class();
    if (c == '\\') return escape();
    copy(1);  // a literal, '|', '.' or '$'
  }

  void copy(size_t n) {
    out_ += in_.substr(at_, n);
    at_ += n;
  }

  void open_group() {
    bool caseless = !caseless_.empty() && caseless_.back();
    if (peek(1) != '?') {
      out_ += "(?:";
      ++at_;
    } else if (next_is("(?i:")) {
      caseless = true;
      copy(4);
    } else if (next_is("(?:") || next_is("(?=") || next_is("(?!") || next_is("(?>")) {
      copy(3);
    } else {
      refuse(fmt::format("the group {}", in_.substr(at_, 4)));
    }
    caseless_.push_back(caseless);
    check(caseless_.size() <= 64, Exit::data,
          "{}: the regular expression nests groups deeper than 64 levels", where_);
  }

  // Without regard to case, Oniguruma also takes one character for several (ss and sharp s): only
  // letters that no such rule knows pass.
  void caseless_literal() {
    const char c = peek();
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    if (!letter && c != '\'') refuse("more than letters and ' in (?i:..)");
    const auto lower = [](char x) { return x >= 'A' && x <= 'Z' ? char(x - 'A' + 'a') : x; };
    const char a = lower(c), b = lower(peek(1));
    if ((a == 's' && (b == 's' || b == 't')) || (a == 'f' && (b == 'f' || b == 'i' || b == 'l')))
      refuse("a pair of letters that has a ligature in (?i:..)");
    copy(1);
  }

  // {n}, {n,}, {n,m}, {,m}; else the brace is a literal in both engines.
  void repeat() {
    size_t end = at_ + 1;
    const auto digits = [&] {
      const size_t begin = end;
      while (end < in_.size() && in_[end] >= '0' && in_[end] <= '9') ++end;
      return std::string(in_.substr(begin, end - begin));
    };
    const std::string low = digits();
    const bool comma = end < in_.size() && in_[end] == ',';
    if (comma) ++end;
    const std::string high = comma ? digits() : "";
    if (end >= in_.size() || in_[end] != '}' || (low.empty() && high.empty())) {
      out_ += "\\{";
      ++at_;
      return;
    }
    if (low.size() > 4 || high.size() > 4) refuse("a repeat of more than 9999");
    out_ += fmt::format("{{{}{}{}}}", low.empty() ? "0" : low, comma ? "," : "", high);
    at_ = end + 1;
    if (peek() == '+' || (peek() == '?' && !comma)) refuse("a quantifier after {..}");
  }

  void escape() {
    const char c = peek(1);
    switch (c) {
      case 's': return inside_class("[", kSpace, 2);
      case 'S': return inside_class("[^", kSpace, 2);
      case 'd': return inside_class("[", category("Nd"), 2);
      case 'D': return inside_class("[^", category("Nd"), 2);
      case 'p':
      case 'P': {
        size_t length = 0;
        bool negated = false;
        const std::string inside = property(length, negated);
        return inside_class(negated ? "[^" : "[", inside, length);
      }
      case 'z': return copy(2);
      default: return literal_escape();
    }
  }
  void inside_class(const char* open, std::string_view inside, size_t length) {
    out_ += open;
    out_ += inside;
    out_ += "]";
    at_ += length;
  }

  // \p{Name}, \P{Name} or \p{^Name} at at_.
  std::string property(size_t& length, bool& negated) const {
    negated = peek(1) == 'P';
    const size_t close = in_.find('}', at_);
    if (peek(2) != '{' || close == std::string_view::npos) refuse("\\p without {..}");
    std::string_view name = in_.substr(at_ + 3, close - at_ - 3);
    if (!name.empty() && name[0] == '^') {
      negated = !negated;
      name.remove_prefix(1);
    }
    length = close + 1 - at_;
    for (const char* known : kCategories)
      if (name == known) return category(name);
    refuse(fmt::format("the property {}", in_.substr(at_, length)));
  }

  void literal_escape() {
    const char c = peek(1);
    switch (c) {
      case 'r':
      case 'n':
      case 't':
      case 'f':
      case 'a':
      case 'e': return copy(2);
      case 'v':  // vertical tab here; any vertical space to PCRE2
        out_ += "\\x0b";
        at_ += 2;
        return;
      case 'x':
      case 'u': return code_point();
      default: break;
    }
    const bool word = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    if (word || c == '\0') refuse(fmt::format("\\{}", c == '\0' ? ' ' : c));
    if (static_cast<unsigned char>(c) >= 0x80) {
      ++at_;  // the backslash says nothing; the character follows
      return copy(utf8::length_at(in_, at_));
    }
    copy(2);
  }

  // \xHH, \x{H..}, \uHHHH
  void code_point() {
    const bool braces = peek(1) == 'x' && peek(2) == '{';
    size_t begin = at_ + (braces ? 3 : 2), end = begin;
    const size_t most = peek(1) == 'u' ? 4 : braces ? 6 : 2;
    while (end < in_.size() && end - begin < most &&
           std::isxdigit(static_cast<unsigned char>(in_[end])))
      ++end;
    const bool whole = peek(1) == 'u' ? end - begin == 4 : end > begin;
    if (!whole || (braces && (end >= in_.size() || in_[end] != '}')))
      refuse("a damaged \\x or \\u");
    const unsigned long value =
        std::stoul(std::string(in_.substr(begin, end - begin)), nullptr, 16);
    // Two digits above 7f are a byte, not a character, to Oniguruma.
    if (peek(1) == 'x' && !braces && value > 0x7f) refuse("\\x of a byte above 7f");
    out_ += fmt::format("\\x{{{:x}}}", value);
    at_ = end + (braces ? 1 : 0);
  }

  void char_class() {
    copy(1);
    if (peek() == '^') copy(1);
    if (peek() == ']') refuse("a class that starts with ]");
    while (peek() != ']') {
      check(at_ < in_.size(), Exit::data, "{}: the regular expression {} has an open class", where_,
            in_);
      if (peek() == '[') refuse("a class in a class");
      if (next_is("&&")) refuse("&& in a class");
      if (peek() == '\\')
        class_escape();
      else
        copy(1);
    }
    copy(1);
  }

  void class_escape() {
    size_t length = 2;
    bool negated = false;
    std::string inside;
    switch (peek(1)) {
      case 's': inside = kSpace; break;
      case 'S': inside = kNotSpace; break;
      case 'd': inside = category("Nd"); break;
      case 'p':
      case 'P': inside = property(length, negated); break;
      default: return literal_escape();
    }
    if (negated) refuse("a negated property in a class");
    // "a-\s": what such a range means differs.
    if (!out_.empty() && out_.back() == '-' && in_[at_ - 1] == '-' && in_[at_ - 2] != '[' &&
        in_[at_ - 2] != '\\' && in_[at_ - 2] != '^')
      refuse("a range that ends in a set");
    if (peek(length) == '-' && peek(length + 1) != ']') refuse("a range that starts with a set");
    out_ += inside;
    at_ += length;
  }

  std::string_view in_;
  const std::string& where_;
  size_t at_ = 0;
  std::string out_;
  std::vector<bool> caseless_;  // of the groups that are open
};

}  // namespace

std::string to_pcre2(std::string_view pattern, const std::string& where) {
  return Translator(pattern, where).run();
}

}  // namespace hgrn
