// Text to token ids and back.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hgrn {

// Const methods may be called from any number of threads at once.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Appends the tokens of `text`; never an end-of-text token, that is the caller's to place.
  virtual void encode(std::string_view text, std::vector<int32_t>& out) const = 0;
  // End-of-text decodes to nothing. An id outside the vocabulary is Exit::data.
  virtual std::string decode(std::span<const int32_t> tokens) const = 0;

  // The longest prefix length p known to satisfy encode(text) == encode(text[:p]) +
  // encode(text[p:]) whatever follows `text`; 0 where none is known. It lets long documents be
  // encoded in pieces.
  virtual size_t safe_prefix(std::string_view text) const = 0;

  virtual int64_t vocab_size() const = 0;
  virtual int32_t eos() const = 0;  // the end-of-text token
  virtual std::string name() const = 0;
  // Files to copy into a checkpoint so that it can be used alone; none for `byte`.
  virtual std::vector<std::string> files() const = 0;
};

// "byte": the 256 bytes, then end-of-text = 256; vocabulary 257. Anything else names a file or
// folder: Exit::data where it is absent, Exit::usage where its kind is not known.
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& spec);

}  // namespace hgrn
