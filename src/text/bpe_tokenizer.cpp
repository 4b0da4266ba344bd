#include "text/bpe_tokenizer.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "core/check.h"
#include "core/file.h"
#include "text/bpe_build.h"
#include "text/nfc.h"
#include "text/utf8.h"

namespace hgrn {
namespace {

struct Scratch {
  Pattern::Matcher matcher;
  Bpe::Scratch bpe;
  std::string normalised;
};

// Scratch that threads take and give back, so that its caches outlive a call. A thread looks in its
// own place first; two threads seldom meet.
class ScratchPool {
 public:
  class Lease {
   public:
    explicit Lease(ScratchPool& pool) : pool_(pool), scratch_(pool.take()) {}
    ~Lease() { pool_.give(std::move(scratch_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Scratch& operator*() const { return *scratch_; }

   private:
    ScratchPool& pool_;
    std::unique_ptr<Scratch> scratch_;
  };
  ~ScratchPool() {
    for (auto& place : places_) delete place.load();
  }

 private:
  static constexpr size_t kPlaces = 64;
  static size_t own_place() {
    static std::atomic<size_t> threads{0};
    thread_local const size_t place = threads++ % kPlaces;
    return place;
  }
  std::unique_ptr<Scratch> take() {
    for (size_t k = 0; k < kPlaces; ++k) {
      auto& place = places_[(own_place() + k) % kPlaces];
      if (place.load(std::memory_order_relaxed) == nullptr) continue;
      if (Scratch* s = place.exchange(nullptr, std::memory_order_acquire))
        return std::unique_ptr<Scratch>(s);
    }
    return std::make_unique<Scratch>();
  }
  void give(std::unique_ptr<Scratch> s) {
    for (size_t k = 0; k < kPlaces; ++k) {
      Scratch* expected = nullptr;
      if (places_[(own_place() + k) % kPlaces].compare_exchange_strong(
              expected, s.get(), std::memory_order_release, std::memory_order_relaxed)) {
        (void)s.release();
        return;
      }
    }
  }
  std::array<std::atomic<Scratch*>, kPlaces> places_{};
};

bool is_letter_or_digit(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

std::vector<AddedToken> select(const std::vector<AddedToken>& all, bool normalized, bool nfc) {
  std::vector<AddedToken> out;
  std::string buffer;
  for (const AddedToken& a : all)
    if (a.normalized == normalized) {
      out.push_back(a);
      if (normalized && nfc) out.back().content = std::string(to_nfc(a.content, buffer));
    }
  return out;
}

// Whether a cut beside whitespace, with no whitespace on the other side, never changes what added
// tokens are found.
bool are_plain(const std::vector<AddedToken>& all) {
  for (const AddedToken& a : all) {
    if (a.lstrip || a.rstrip || a.single_word || a.content.find('\n') != std::string::npos)
      return false;
    for (size_t i = 1; i < a.content.size(); ++i)
      if (a.content[i] == ' ' && a.content[i - 1] != ' ') return false;
  }
  return true;
}

class BpeTokenizer final : public Tokenizer {
 public:
  BpeTokenizer(TokenizerDefinition d, std::vector<TokenizerFile> files, SpecialTokens special)
      : built_(build_bpe(d)),
        words_(d.steps, d.file + ": pre_tokenizer"),
        raw_(select(d.added, false, d.nfc), special == SpecialTokens::recognised),
        normalised_(select(d.added, true, d.nfc), special == SpecialTokens::recognised),
        files_(std::move(files)),
        fingerprint_(fingerprint_of(d)) {
    nfc_ = d.nfc;
    plain_added_ = are_plain(d.added);
    describe_ = description_of(d);
    encode("\xef\xbf\xbd", replacement_);
  }

  void encode(std::string_view text, std::vector<int32_t>& out) const override {
    const ScratchPool::Lease lease(pool_);
    const char* readable_end = text.data() + text.size();
    for (size_t at = 0; at < text.size();) {
      const size_t n = utf8::valid_prefix(text, at);
      if (n > 0) encode_valid(text.substr(at, n), readable_end, *lease, out);
      at += n;
      if (at == text.size()) break;
      const int32_t byte = built_.byte_ids[static_cast<unsigned char>(text[at++])];
      if (byte >= 0)
        out.push_back(byte);
      else
        out.insert(out.end(), replacement_.begin(), replacement_.end());
    }
  }

  std::string decode(std::span<const int32_t> tokens) const override {
    std::string text;
    for (int32_t token : tokens) {
      check(token >= 0 && size_t(token) < built_.bytes.size(), Exit::data,
            "token {} is outside the vocabulary of {} of the tokenizer {}", token, vocab_size(),
            name());
      if (token != built_.eos) text += built_.bytes[size_t(token)];
    }
    return text;
  }

  size_t safe_prefix(std::string_view text) const override {
    if (!words_.cuts_at_space()) return searched_prefix(text);
    for (size_t p = text.size(); p-- > 1;)
      if (may_cut(text, p) || may_cut_wide(text, p)) return p;
    return 0;
  }

  int64_t vocab_size() const override { return int64_t(built_.bytes.size()); }
  int32_t eos() const override { return built_.eos; }
  std::string name() const override {
    return fmt::format("bpe-{}-{}", vocab_size(), hex16(fingerprint_).substr(0, 8));
  }
  std::vector<TokenizerFile> files() const override { return files_; }
  uint64_t fingerprint() const override { return fingerprint_; }
  std::string describe() const override { return describe_; }

 private:
  void encode_valid(std::string_view text, const char* readable_end, Scratch& s,
                    std::vector<int32_t>& out) const {
    const auto token = [&](int32_t id) { out.push_back(id); };
    const auto words = [&](std::string_view piece, const char* end) {
      words_.split(piece, s.matcher,
                   [&](std::string_view word) { built_.bpe.encode(word, end, s.bpe, out); });
    };
    const auto normalise = [&](std::string_view piece) {
      const std::string_view n = nfc_ ? to_nfc(piece, s.normalised) : piece;
      const char* end = n.data() == piece.data() ? readable_end : n.data() + n.size();
      if (normalised_.empty()) return words(n, end);
      normalised_.split(
          n, [&](std::string_view part) { words(part, end); }, token);
    };
    if (raw_.empty()) return normalise(text);
    raw_.split(text, normalise, token);
  }

  // Whether added tokens and NFC allow a cut before text[p]. Before a space they mostly do: it
  // composes with nothing before it, and letters before it are no whitespace that a token takes.
  bool may_cut(std::string_view text, size_t p) const {
    return text[p] == ' ' && is_letter_or_digit(text[p - 1]) &&
           !raw_.cut_matters(static_cast<unsigned char>(text[p - 1])) &&
           !normalised_.cut_matters(static_cast<unsigned char>(text[p - 1]));
  }

  // The same beside a character outside of ASCII that is not whitespace, for texts with few other
  // places: in front of a space, and at a newline (on the side that words_ names). Neither space
  // nor newline composes with anything.
  bool may_cut_wide(std::string_view text, size_t p) const {
    if (!plain_added_) return false;
    if (text[p] == ' ' || (words_.cuts_before_newline() && text[p] == '\n')) {
      size_t first = p - 1;  // of the character that ends at p
      while (first > 0 && p - first < 4 && (static_cast<unsigned char>(text[first]) & 0xc0) == 0x80)
        --first;
      return p - first > 1 && utf8::length_at(text, first) == p - first &&
             utf8::trailing_space(text.substr(first, p - first)) == 0;
    }
    if (words_.cuts_before_newline() || text[p - 1] != '\n') return false;
    const size_t n = utf8::length_at(text, p);
    return n > 1 && utf8::leading_space(text.substr(p, n)) == 0;
  }

  // safe_prefix for any pattern: the last such place where the pattern, too, cuts the text for
  // certain. Text that NFC changes is left out: places in it are not those of the original.
  size_t searched_prefix(std::string_view text) const {
    const ScratchPool::Lease lease(pool_);
    Scratch& s = *lease;
    size_t best = 0;
    const auto words = [&](std::string_view piece) {
      const size_t start = size_t(piece.data() - text.data());
      words_.final_cuts(piece, s.matcher, [&](size_t place) {
        const size_t p = start + place;
        if (p > 0 && p < text.size() && may_cut(text, p)) best = std::max(best, p);
      });
    };
    const auto token = [](int32_t) {};
    const auto normalise = [&](std::string_view piece) {
      if (nfc_ && to_nfc(piece, s.normalised).data() != piece.data()) return;
      normalised_.split(piece, words, token);
    };
    for (size_t at = 0; at < text.size(); ++at) {
      const size_t n = utf8::valid_prefix(text, at);
      raw_.split(text.substr(at, n), normalise, token);
      at += n;
    }
    return best;
  }

  uint64_t fingerprint_of(const TokenizerDefinition& d) const {
    std::string all;
    const auto add = [&](std::string_view s) { all += fmt::format("{}:", s.size()), all += s; };
    for (const std::string& b : built_.bpe.vocab()) add(b);
    for (const Bpe::Merge& m : built_.bpe.merges()) all += fmt::format("{},{};", m.left, m.right);
    for (const Split& s : d.steps) add(s.pattern), all += s.contiguous ? 'c' : 'i';
    for (const AddedToken& a : d.added) {
      add(a.content);
      // Without a normaliser both kinds are found in the same text.
      all += fmt::format("{}{:d}{:d}{:d}{:d}{:d}", a.id, a.single_word, a.lstrip, a.rstrip,
                         a.normalized && d.nfc, a.special);
    }
    all += fmt::format("{:d}{:d}{}", d.nfc, d.ignore_merges, built_.eos);
    return xxh3(all.data(), all.size());
  }

  std::string description_of(const TokenizerDefinition& d) const {
    int64_t special = 0;
    for (const AddedToken& a : d.added) special += a.special ? 1 : 0;
    std::string steps;
    for (const Split& s : d.steps) {
      const char* known = s.pattern == kGpt2Pattern     ? "GPT-2's pattern"
                          : s.pattern == kLlama3Pattern ? "Llama 3's pattern"
                          : s.pattern == kQwen2Pattern  ? "Qwen 2's pattern"
                                                        : nullptr;
      steps += (steps.empty() ? "" : ", then ") + (known ? std::string(known) : s.pattern);
    }
    const auto missing = std::count(built_.byte_ids, built_.byte_ids + 256, -1);
    return fmt::format(
        "  byte-level BPE: {} merges{}, {} added tokens, {} of them special{}\n"
        "  normaliser {}, words by {} (PCRE2 {})\n  end of text {}: {}\n  fingerprint {}\n",
        built_.bpe.merges().size(), d.ignore_merges ? " (whole words first)" : "", d.added.size(),
        special,
        missing > 0 ? fmt::format("; {} bytes outside of UTF-8 have no token", missing) : "",
        d.nfc ? "NFC" : "none", steps.empty() ? "nothing" : steps, pcre2_version(), built_.eos,
        built_.eos_content, hex16(fingerprint_));
  }

  BuiltBpe built_;
  Words words_;
  AddedTokens raw_, normalised_;  // found in the text as it is, in the normalised text
  std::vector<TokenizerFile> files_;
  bool nfc_ = false, plain_added_ = false;
  uint64_t fingerprint_;
  std::string describe_;
  std::vector<int32_t> replacement_;  // U+FFFD
  mutable ScratchPool pool_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_bpe_tokenizer(TokenizerDefinition definition,
                                              std::vector<TokenizerFile> files,
                                              SpecialTokens special) {
  return std::make_unique<BpeTokenizer>(std::move(definition), std::move(files), special);
}

}  // namespace hgrn
