#include "text/tokenize.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>

#include "core/check.h"
#include "text/shard.h"
#include "text/shard_format.h"

namespace hgrn {
namespace {

namespace fs = std::filesystem;

// Deals a token stream to PREFIX_000000.bin, PREFIX_000001.bin, ...
class ShardSet {
 public:
  ShardSet(std::string prefix, bool wide, int64_t shard_tokens)
      : prefix_(std::move(prefix)), wide_(wide), shard_tokens_(shard_tokens) {}

  void append(std::span<const int32_t> tokens) {
    while (!tokens.empty()) {
      if (writers_.empty() || writers_.back()->count() == shard_tokens_) start_shard();
      ShardWriter& writer = *writers_.back();
      const size_t room = size_t(shard_tokens_ - writer.count());
      const std::span<const int32_t> part = tokens.first(std::min(room, tokens.size()));
      writer.append(part);
      tokens = tokens.subspan(part.size());
    }
  }
  // All shards appear now, so that an error before leaves an earlier set as it was.
  void publish() {
    if (!writers_.empty()) writers_.back()->complete();
    for (const auto& writer : writers_) {
      writer->publish();
      written_.push_back(writer->path());
    }
  }
  const std::vector<std::string>& written() const { return written_; }

  std::vector<std::string> remove_leftovers() const {
    std::vector<std::string> removed;
    for (size_t n = written_.size(); fs::is_regular_file(path(n)); ++n) {
      std::error_code error;
      fs::remove(path(n), error);
      check(!error, Exit::failed,
            "{} is left of an earlier set and cannot be removed: {}; remove it, or '{}_*.bin' will "
            "read it too",
            path(n), error.message(), prefix_);
      removed.push_back(path(n));
    }
    return removed;
  }

 private:
  std::string path(size_t n) const { return fmt::format("{}_{:06d}.bin", prefix_, n); }
  void start_shard() {
    if (!writers_.empty()) writers_.back()->complete();
    writers_.push_back(std::make_unique<ShardWriter>(path(writers_.size()), wide_));
  }

  std::string prefix_;
  bool wide_;
  int64_t shard_tokens_;
  std::vector<std::unique_ptr<ShardWriter>> writers_;
  std::vector<std::string> written_;
};

std::string prefix_of(const TokenizeOptions& options) {
  const fs::path first = fs::path(options.files.front());
  if (options.out.empty()) return (first.parent_path() / first.stem()).string();
  if (options.out.back() == '/') return (fs::path(options.out) / first.stem()).string();
  return options.out;
}

}  // namespace

double TokenizeProgress::eta_s() const {
  if (bytes <= 0 || total_bytes < bytes) return -1;
  return seconds * double(total_bytes - bytes) / double(bytes);
}

std::string TokenizeProgress::str() const {
  std::string line = fmt::format("{:.1f} MB", double(bytes) * 1e-6);
  if (total_bytes >= bytes && total_bytes > 0)
    line = fmt::format("{:.1f} of {:.1f} MB ({:.0f}%)", double(bytes) * 1e-6,
                       double(total_bytes) * 1e-6, 100.0 * double(bytes) / double(total_bytes));
  line += fmt::format(", {} tokens", tokens);
  if (seconds > 0) line += fmt::format(", {:.1f} MB/s", double(bytes) * 1e-6 / seconds);
  if (const double eta = eta_s(); eta >= 0) {
    const int64_t s = int64_t(eta + 0.5);
    line += fmt::format(", ETA {}:{:02d}:{:02d}", s / 3600, s / 60 % 60, s % 60);
  }
  return line;
}

TokenizeReport tokenize(const TokenizeOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  check(!options.files.empty(), Exit::usage,
        "hgrn tokenize: no files; name the text files to read");
  check(options.shard_tokens >= 2, Exit::usage,
        "--shard-tokens {}: a shard needs at least 2 tokens", options.shard_tokens);
  const std::unique_ptr<Tokenizer> tokenizer =
      open_tokenizer(options.tokenizer,
                     options.special_tokens ? SpecialTokens::recognised : SpecialTokens::as_text);
  const EncodeOptions encode{options.files, options.line_end_token, options.document_separator,
                             options.jobs};

  const std::string prefix = prefix_of(options);
  if (const fs::path folder = fs::path(prefix).parent_path(); !folder.empty()) {
    std::error_code error;
    fs::create_directories(folder, error);
    check(!error, Exit::failed, "cannot create the folder {}: {}", folder.string(),
          error.message());
  }
  TokenizeReport report;
  report.tokenizer = tokenizer->name();
  report.vocab_size = tokenizer->vocab_size();
  ShardSet shards(prefix, report.vocab_size > shard_format::kNarrowVocab, options.shard_tokens);
  report.encoded = encode_files(
      *tokenizer, encode, [&](std::span<const int32_t> tokens) { shards.append(tokens); },
      options.progress);
  check(report.encoded.tokens > 0, Exit::data, "the {} file(s) given are empty, {} among them",
        options.files.size(), options.files.front());
  shards.publish();
  report.shards = shards.written();
  report.removed = shards.remove_leftovers();
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace hgrn
