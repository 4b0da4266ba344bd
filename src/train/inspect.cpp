#include "train/inspect.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "core/file.h"
#include "model/hf_config.h"
#include "model/safetensors.h"
#include "text/shard.h"
#include "text/shard_manifest.h"
#include "text/tokenizer.h"
#include "train/checkpoint.h"
#include "train/manifest.h"

namespace hgrn {
namespace {

using nlohmann::json;

bool ends_with(const std::string& s, const std::string& end) {
  return s.size() >= end.size() && s.compare(s.size() - end.size(), end.size(), end) == 0;
}

std::string inspect_shard(const std::string& path, bool verify) {
  const Shard shard(path);
  std::string out = fmt::format("{}: token shard, {} tokens of {} bits\n", path, shard.count(),
                                shard.wide() ? 32 : 16);
  std::vector<int32_t> tokens(1 << 16);
  int32_t largest = -1;
  const int64_t last = verify ? shard.count() : std::min<int64_t>(shard.count(), 16);
  for (int64_t at = 0; at < last; at += int64_t(tokens.size())) {
    const int64_t n = std::min<int64_t>(int64_t(tokens.size()), last - at);
    shard.read(at, n, tokens.data());
    if (at == 0) {
      out += "first tokens:";
      for (int64_t i = 0; i < std::min<int64_t>(n, 16); ++i)
        out += fmt::format(" {}", tokens[size_t(i)]);
      out += "\n";
    }
    largest = std::max(largest, *std::max_element(tokens.begin(), tokens.begin() + n));
  }
  if (verify) out += fmt::format("verified: all tokens readable, largest id {}\n", largest);
  return out;
}

std::string inspect_safetensors(const std::string& path) {
  const SafetensorsReader file(path);
  std::string out = fmt::format("{}: {} tensors\n", path, file.tensors().size());
  int64_t total = 0;
  for (const TensorInfo& t : file.tensors()) {
    out += fmt::format("  {:<52} {:<5} {}\n", t.name, t.dtype, t.shape.str());
    total += t.shape.numel();
  }
  return out + fmt::format("  {} elements in all\n", total);
}

std::string inspect_model(const std::string& dir) {
  const ModelConfig m = read_hf_config(dir);
  return fmt::format("  model: {}, {} layers of {}, heads of {}, GLU {}, vocabulary {}, {}{}\n",
                     m.mixer, m.num_hidden_layers, m.hidden_size, m.expand_ratio,
                     m.intermediate_size, m.vocab_size, m.tie_word_embeddings ? "tied" : "untied",
                     fla_can_load(m) ? "; fla loads it" : "");
}

std::string inspect_checkpoint(const std::string& dir, bool verify) {
  if (verify) verify_checkpoint(dir);
  const Manifest manifest = check_folder(dir, Checksums::none);
  const TrainerState s = trainer_state_from_json(read_file(dir + "/" + kTrainerFile, 1 << 26),
                                                 dir + "/" + kTrainerFile);
  std::string out = fmt::format("{}: checkpoint of step {}\n", dir, s.step);
  out += fmt::format("  {} updates, {} tokens, next sample {}, seed {}\n", s.updates, s.tokens,
                     s.next_sample, s.seed);
  out += inspect_model(dir);
  for (const auto& [name, entry] : manifest.files)
    out += fmt::format("  {:<44} {:>14} bytes  xxh3 {}\n", name, entry.size, hex16(entry.xxh3));
  if (verify) out += "  verified: every file has the size and checksum of the manifest\n";
  return out;
}

std::string inspect_run(const std::string& dir, bool verify) {
  std::vector<std::string> complaints;
  const auto found = CheckpointStore(dir, 0).newest_valid(&complaints);
  std::string out = dir + ": run folder\n";
  for (const std::string& c : complaints) out += "  damaged: " + c + "\n";
  if (!found) return out + "  no checkpoint yet\n";
  return out + inspect_checkpoint(found->dir, verify);
}

std::string inspect_metrics(const std::string& path) {
  const std::string text = read_file(path, uint64_t(4) << 30);
  int64_t lines = 0, bad = 0;
  json first, last, eval;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const json j = json::parse(text.substr(at, end - at), nullptr, false);
    at = end + 1;
    if (!j.is_object()) {
      ++bad;
      continue;
    }
    ++lines;
    (j.contains("valid_loss") ? eval : last) = j;
    if (first.is_null() && j.contains("loss")) first = j;
  }
  std::string out = fmt::format("{}: metrics, {} lines\n", path, lines);
  if (!first.is_null()) out += "  first: " + first.dump() + "\n";
  if (!last.is_null()) out += "  last:  " + last.dump() + "\n";
  if (!eval.is_null()) out += "  last evaluation: " + eval.dump() + "\n";
  if (bad > 0) out += fmt::format("  {} lines are not JSON\n", bad);
  return out;
}

std::string inspect_tokenizer(const std::string& path) {
  const auto tokenizer = open_tokenizer(path);
  std::string out = fmt::format("{}: tokenizer {}, vocabulary {}, end of text {}\n", path,
                                tokenizer->name(), tokenizer->vocab_size(), tokenizer->eos());
  for (const TokenizerFile& file : tokenizer->files())
    out += fmt::format("  {:<44} {:>14} bytes  xxh3 {}\n", file.path, file_size(file.path),
                       hex16(xxh3_file(file.path)));
  return out + tokenizer->describe();
}

std::string inspect_shard_set(const std::string& path, bool verify) {
  const ShardManifest m = shard_manifest_from_json(read_file(path, uint64_t(1) << 30), path);
  std::string out = fmt::format("{}: token shards of {}, vocabulary {}, by {}\n", path, m.tokenizer,
                                m.vocab_size, m.program);
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "" : path.substr(0, slash + 1);
  for (const ShardManifest::Part& part : m.parts) {
    const ShardManifest::Shard sum = part.total();
    out += fmt::format("  {}: {} tokens, {} bytes of text, {} {}, {} shards\n", part.name,
                       sum.tokens, sum.bytes, sum.ends, m.line_end_token ? "lines" : "documents",
                       part.shards.size());
    for (const ShardManifest::Shard& s : part.shards) {
      const std::string file = folder + s.file;
      const Shard shard(file);
      check(shard.count() == s.tokens, Exit::data,
            "{}: it holds {} tokens, but {} says {}; tokenize again", file, shard.count(), path,
            s.tokens);
      if (verify)
        check(xxh3_file(file) == s.xxh3, Exit::data,
              "{}: its checksum is not the {} of {}; copy it again, or tokenize again", file,
              hex16(s.xxh3), path);
      out += fmt::format("  {:<44} {:>14} tokens  xxh3 {}\n", file, s.tokens, hex16(s.xxh3));
    }
  }
  return verify ? out + "  verified: every shard has the tokens and checksum of the manifest\n"
                : out;
}

// A manifest of shards is told from a tokenizer.json by how it begins.
bool begins_as_shard_manifest(const std::string& path) {
  const Fd file = open_for_read(path);
  std::string start(size_t(std::min<uint64_t>(128, file_size(path))), '\0');
  pread_exact(file, path, start.data(), start.size(), 0);
  return is_shard_manifest(start);
}

}  // namespace

std::string inspect(const std::string& path, bool verify) {
  check(exists(path), Exit::data, "{}: no such file or folder; check the path", path);
  if (is_folder(path)) {
    if (exists(path + "/" + kManifestName)) return inspect_checkpoint(path, verify);
    if (exists(path + "/checkpoints")) return inspect_run(path, verify);
    if (exists(path + "/config.json") &&
        (exists(path + "/model.safetensors") || exists(path + "/model.safetensors.index.json"))) {
      const ModelFolder folder(path);
      return fmt::format("{}: Hugging Face folder, {} tensors\n", path, folder.names().size()) +
             inspect_model(path);
    }
    if (has_tokenizer_files(path)) return inspect_tokenizer(path);
    fail(Exit::data,
         "{}: neither a checkpoint (MANIFEST.json), a run folder (checkpoints/), a Hugging Face "
         "folder (config.json, model.safetensors) nor a tokenizer (tokenizer.json, vocab.json)",
         path);
  }
  if (ends_with(path, ".safetensors")) return inspect_safetensors(path);
  if (ends_with(path, ".jsonl")) return inspect_metrics(path);
  if (ends_with(path, ".bin")) return inspect_shard(path, verify);
  const std::string name = path.substr(path.rfind('/') + 1);
  check(ends_with(name, ".json") || name == "merges.txt" || name == "vocab.bpe", Exit::data,
        "{}: not a kind of file that is known here; give a shard (.bin), weights (.safetensors), "
        "metrics (.jsonl), a tokenizer or a manifest of shards (.json) or a folder",
        path);
  if (begins_as_shard_manifest(path)) return inspect_shard_set(path, verify);
  return inspect_tokenizer(path);
}

}  // namespace hgrn
