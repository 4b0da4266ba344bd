// Text to token ids and back.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hgrn {

// A file of a tokenizer, and the name that it takes in a checkpoint, by which it is found again.
struct TokenizerFile {
  std::string name, path;
};

// Const methods may be called from any number of threads at once.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Appends the tokens of `text`, any bytes. Never an end-of-text token, that is the caller's to
  // place, unless the tokenizer was opened with SpecialTokens::recognised.
  virtual void encode(std::string_view text, std::vector<int32_t>& out) const = 0;
  // The bytes of the tokens, one after another. End-of-text decodes to nothing. An id outside the
  // vocabulary is Exit::data.
  virtual std::string decode(std::span<const int32_t> tokens) const = 0;

  // The longest prefix length p known to satisfy encode(text) == encode(text[:p]) +
  // encode(text[p:]) whatever follows `text`; 0 where none is known. It lets long documents be
  // encoded in pieces.
  virtual size_t safe_prefix(std::string_view text) const = 0;

  virtual int64_t vocab_size() const = 0;
  virtual int32_t eos() const = 0;  // the end-of-text token
  virtual std::string name() const = 0;
  // Files to copy into a checkpoint so that it can be used alone; none for `byte`.
  virtual std::vector<TokenizerFile> files() const = 0;

  // Equal for two tokenizers that give every text the same tokens, whatever files they are of.
  virtual uint64_t fingerprint() const = 0;
  // For people: some lines, without the name.
  virtual std::string describe() const { return {}; }
};

// What an end-of-text token, or another special one, spelled out in a text is.
enum class SpecialTokens {
  as_text,     // text like any other: what stands in a text cannot end it
  recognised,  // that token
};

// "byte": the 256 bytes, then end-of-text = 256; vocabulary 257. Else a tokenizer.json, a folder
// with one, or GPT-2's pair (vocab.json or encoder.json, merges.txt or vocab.bpe), of which one
// file or the folder is named. Exit::data where it is absent, damaged or not supported.
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& spec,
                                          SpecialTokens special = SpecialTokens::as_text);

// Whether a folder holds tokenizer files that open_tokenizer finds.
bool has_tokenizer_files(const std::string& folder);

}  // namespace hgrn
