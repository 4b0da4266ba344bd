#include "text/tokenizer.h"

#include <filesystem>

#include "core/check.h"

namespace hgrn {
namespace {

class ByteTokenizer final : public Tokenizer {
 public:
  static constexpr int32_t kEos = 256;

  void encode(std::string_view text, std::vector<int32_t>& out) const override {
    const size_t start = out.size();
    out.resize(start + text.size());
    for (size_t i = 0; i < text.size(); ++i) out[start + i] = static_cast<unsigned char>(text[i]);
  }
  std::string decode(std::span<const int32_t> tokens) const override {
    std::string text;
    text.reserve(tokens.size());
    for (int32_t token : tokens) {
      check(token >= 0 && token <= kEos, Exit::data,
            "token {} is outside the byte tokenizer's vocabulary of {}", token, vocab_size());
      if (token != kEos) text.push_back(char(token));
    }
    return text;
  }
  size_t safe_prefix(std::string_view text) const override { return text.size(); }
  int64_t vocab_size() const override { return kEos + 1; }
  int32_t eos() const override { return kEos; }
  std::string name() const override { return "byte"; }
  std::vector<std::string> files() const override { return {}; }
};

}  // namespace

std::unique_ptr<Tokenizer> open_tokenizer(const std::string& spec) {
  if (spec == "byte") return std::make_unique<ByteTokenizer>();
  std::error_code ignored;
  check(std::filesystem::exists(spec, ignored), Exit::data,
        "tokenizer '{}': no such file or folder; give one that exists, or 'byte'", spec);
  fail(Exit::usage, "tokenizer '{}': this build knows 'byte' only; give --tokenizer byte", spec);
}

}  // namespace hgrn
