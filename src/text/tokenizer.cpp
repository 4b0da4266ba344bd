#include "text/tokenizer.h"

#include <filesystem>

#include "core/check.h"
#include "core/file.h"
#include "text/bpe_tokenizer.h"

namespace hgrn {
namespace {

constexpr uint64_t kMaxFileBytes = uint64_t(256) << 20;
constexpr const char* kConfigName = "tokenizer_config.json";

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
  std::vector<TokenizerFile> files() const override { return {}; }
  uint64_t fingerprint() const override { return xxh3("byte", 4); }
};

// The file of `folder` with one of two names; empty: neither is there.
std::string either(const std::string& folder, const char* first, const char* second) {
  const std::filesystem::path f(folder);
  for (const char* name : {first, second})
    if (exists((f / name).string())) return (f / name).string();
  return "";
}

std::unique_ptr<Tokenizer> open_json(const std::string& path, SpecialTokens special) {
  TokenizerDefinition d = read_tokenizer_json(read_file(path, kMaxFileBytes), path);
  std::vector<TokenizerFile> files = {{"tokenizer.json", path}};
  const std::string config =
      either(std::filesystem::path(path).parent_path().string(), kConfigName, kConfigName);
  if (!config.empty()) {
    d.end_of_text = read_eos_token(read_file(config, kMaxFileBytes), config);
    files.push_back({kConfigName, config});
  }
  return make_bpe_tokenizer(std::move(d), std::move(files), special);
}

std::unique_ptr<Tokenizer> open_pair(const std::string& folder, SpecialTokens special) {
  const std::string vocab = either(folder, "vocab.json", "encoder.json");
  const std::string merges = either(folder, "merges.txt", "vocab.bpe");
  check(!vocab.empty(), Exit::data, "{}: vocab.json or encoder.json is missing beside {}", folder,
        merges);
  check(!merges.empty(), Exit::data, "{}: merges.txt or vocab.bpe is missing beside {}", folder,
        vocab);
  return make_bpe_tokenizer(read_gpt2_files(read_file(vocab, kMaxFileBytes), vocab,
                                            read_file(merges, kMaxFileBytes), merges),
                            {{"vocab.json", vocab}, {"merges.txt", merges}}, special);
}

bool has_pair(const std::string& folder) {
  return !either(folder, "vocab.json", "encoder.json").empty() ||
         !either(folder, "merges.txt", "vocab.bpe").empty();
}

}  // namespace

bool has_tokenizer_files(const std::string& folder) {
  return exists(folder + "/tokenizer.json") || has_pair(folder);
}

std::unique_ptr<Tokenizer> open_tokenizer(const std::string& spec, SpecialTokens special) {
  if (spec == "byte") return std::make_unique<ByteTokenizer>();
  check(exists(spec), Exit::data,
        "tokenizer '{}': no such file or folder; give one that exists, or 'byte'", spec);
  if (is_folder(spec)) {
    if (exists(spec + "/tokenizer.json")) return open_json(spec + "/tokenizer.json", special);
    check(has_pair(spec), Exit::data,
          "tokenizer '{}': the folder holds neither tokenizer.json nor vocab.json and merges.txt "
          "(encoder.json and vocab.bpe)",
          spec);
    return open_pair(spec, special);
  }
  const std::filesystem::path path(spec);
  const std::string name = path.filename().string();
  for (const char* of_pair : {"vocab.json", "encoder.json", "merges.txt", "vocab.bpe"})
    if (name == of_pair) {
      const std::string folder = path.parent_path().string();
      return open_pair(folder.empty() ? "." : folder, special);
    }
  return open_json(spec, special);
}

}  // namespace hgrn
