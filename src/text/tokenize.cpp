#include "text/tokenize.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>

#include "core/check.h"
#include "core/file.h"
#include "core/version.h"
#include "text/shard_manifest.h"
#include "text/shard_set.h"
#include "text/text_input.h"

namespace hgrn {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxManifestBytes = uint64_t(1) << 30;

std::string prefix_of(const TokenizeOptions& options) {
  const fs::path first = fs::path(options.files.front());
  const bool folder = !options.out.empty() && options.out.back() == '/';
  if (!options.out.empty() && !folder) return options.out;
  check(first != "-", Exit::usage, "hgrn tokenize -: standard input has no name; add --out PREFIX");
  return ((folder ? fs::path(options.out) : first.parent_path()) / first.stem()).string();
}

void make_parent(const std::string& prefix) {
  const fs::path folder = fs::path(prefix).parent_path();
  if (folder.empty()) return;
  std::error_code error;
  fs::create_directories(folder, error);
  check(!error, Exit::failed, "cannot create the folder {}: {}", folder.string(), error.message());
}

// The earlier set's shard files, as its manifest names them; none without a manifest. A file under
// that name which is no manifest is not ours to replace: it may be the input.
std::vector<std::string> earlier_shards(const std::string& manifest, const std::string& prefix) {
  std::vector<std::string> paths;
  if (!exists(manifest)) return paths;
  const std::string text = is_folder(manifest) ? "" : read_file(manifest, kMaxManifestBytes);
  check(is_shard_manifest(text), Exit::usage,
        "{}: it would be replaced by the manifest of the shards, but is none; choose another --out",
        manifest);
  const fs::path folder = fs::path(prefix).parent_path();
  try {
    for (const ShardManifest::Part& part : shard_manifest_from_json(text, manifest).parts)
      for (const ShardManifest::Shard& shard : part.shards)
        if (is_shard_name(shard.file, fs::path(prefix).filename().string()))
          paths.push_back((folder / shard.file).string());
  } catch (const Error&) {  // damaged: as if it were not there
    paths.clear();
  }
  return paths;
}

ShardManifest manifest_of(const TokenizeOptions& o, const Tokenizer& t) {
  ShardManifest m;
  m.program = std::string("hgrn ") + version();
  m.tokenizer = t.name();
  m.vocab_size = t.vocab_size();
  m.eos = t.eos();
  m.fingerprint = t.fingerprint();
  for (const TokenizerFile& f : t.files())
    m.tokenizer_files.push_back({f.name, int64_t(file_size(f.path)), xxh3_file(f.path)});
  for (const std::string& path : o.files) m.inputs.push_back({path, text_input_size(path), 0});
  m.line_end_token = o.line_end_token;
  m.special_tokens = o.special_tokens;
  m.document_separator = o.document_separator;
  m.json_key = o.json_key;
  m.shard_tokens = o.shard_tokens;
  m.valid_fraction = o.valid_fraction;
  return m;
}

// Everything is on the disk: now it takes its names.
void publish(std::vector<ShardSet>& sets, ShardManifest& manifest, const std::string& prefix,
             TokenizeReport& report) {
  const std::vector<std::string> earlier = earlier_shards(report.manifest, prefix);
  std::error_code error;
  fs::remove(report.manifest, error);  // from here on it would not tell what is there
  for (ShardSet& set : sets) {
    set.publish(report.removed);
    for (size_t n = 0; n < set.part().shards.size(); ++n) report.shards.push_back(set.path(n));
    manifest.parts.push_back(set.part());
  }
  for (const std::string& path : earlier)
    if (std::find(report.shards.begin(), report.shards.end(), path) == report.shards.end() &&
        fs::remove(path, error))
      report.removed.push_back(path);
  write_file_atomic(report.manifest, shard_manifest_to_json(manifest));
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
  const std::string prefix = prefix_of(options);
  make_parent(prefix);
  TokenizeReport report;
  report.tokenizer = tokenizer->name();
  report.vocab_size = tokenizer->vocab_size();
  report.manifest = prefix + ".json";
  earlier_shards(report.manifest, prefix);  // refuses before the work, not after it
  ShardManifest manifest = manifest_of(options, *tokenizer);
  const ShardWorkplace workplace(prefix);
  report.stale = workplace.stale();
  const bool split = options.valid_fraction > 0;
  std::vector<ShardSet> sets;
  for (const char* name : split ? std::vector{"train", "valid"} : std::vector{"all"})
    sets.emplace_back(*tokenizer, prefix, name, options.shard_tokens, workplace);
  report.encoded = encode_files(
      *tokenizer, options, [&](std::span<const int32_t> tokens) { sets.front().append(tokens); },
      options.progress, [&](std::span<const int32_t> tokens) { sets.back().append(tokens); });
  check(report.encoded.tokens > 0, Exit::data, "the {} file(s) given are empty, {} among them",
        options.files.size(), options.files.front());
  for (ShardSet& set : sets) set.complete();
  publish(sets, manifest, prefix, report);
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace hgrn
