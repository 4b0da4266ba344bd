#include "text/shard_set.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "core/check.h"
#include "text/shard_format.h"

namespace hgrn {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSuffix = ".tmp-";

Fd open_folder(const std::string& path) {
  return Fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

bool all_digits(std::string_view s) {
  return !s.empty() && std::all_of(s.begin(), s.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

ShardWorkplace::ShardWorkplace(const std::string& prefix)
    : path_(fmt::format("{}{}{}", prefix, kSuffix, ::getpid())) {
  const fs::path parent = fs::path(prefix).parent_path();
  const std::string begin = fs::path(prefix).filename().string() + kSuffix;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(parent.empty() ? "." : parent, error)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind(begin, 0) != 0 || !all_digits(std::string_view(name).substr(begin.size())))
      continue;
    const Fd folder = open_folder(entry.path().string());
    // Where a file system has no locks nothing is certain, and nothing is removed.
    if (!folder || ::flock(folder.get(), LOCK_EX | LOCK_NB) != 0) continue;
    fs::remove_all(entry.path(), error);
    if (!error) stale_.push_back(entry.path().string());
  }
  fs::create_directory(path_, error);
  check(!error, Exit::failed, "cannot create the folder {}: {}", path_, error.message());
  lock_ = open_folder(path_);
  if (lock_) (void)::flock(lock_.get(), LOCK_EX | LOCK_NB);
}

ShardWorkplace::~ShardWorkplace() {
  std::error_code error;
  fs::remove_all(path_, error);
}

ShardSet::ShardSet(const Tokenizer& tokenizer, std::string prefix, const std::string& name,
                   int64_t shard_tokens, const ShardWorkplace& workplace)
    : stem_(name == "all" ? std::move(prefix) : prefix + "_" + name),
      workplace_(workplace.path()),
      wide_(tokenizer.vocab_size() > shard_format::kNarrowVocab),
      shard_tokens_(shard_tokens),
      eos_(tokenizer.eos()) {
  part_.name = name;
  token_bytes_.resize(size_t(tokenizer.vocab_size()));
  for (int32_t id = 0; size_t(id) < token_bytes_.size(); ++id)
    token_bytes_[size_t(id)] = uint32_t(tokenizer.decode({&id, 1}).size());
}

std::string ShardSet::path(size_t n) const {
  return fmt::format("{}_{:06d}.bin", stem_, n);
}

void ShardSet::append(std::span<const int32_t> tokens) {
  while (!tokens.empty()) {
    if (writers_.empty() || writers_.back()->count() == shard_tokens_) start_shard();
    ShardWriter& writer = *writers_.back();
    const size_t room = size_t(shard_tokens_ - writer.count());
    const std::span<const int32_t> piece = tokens.first(std::min(room, tokens.size()));
    writer.append(piece);
    ShardManifest::Shard& shard = part_.shards.back();
    for (int32_t token : piece) {
      shard.bytes += token_bytes_[size_t(token)];
      shard.ends += token == eos_ ? 1 : 0;
    }
    tokens = tokens.subspan(piece.size());
  }
}

void ShardSet::start_shard() {
  if (!writers_.empty()) end_shard();
  const std::string final_path = path(writers_.size());
  const std::string name = fs::path(final_path).filename().string();
  writers_.push_back(std::make_unique<ShardWriter>(final_path, wide_, workplace_ + "/" + name));
  part_.shards.push_back({name, 0, 0, 0, 0});
}

void ShardSet::end_shard() {
  ShardWriter& writer = *writers_.back();
  writer.complete();
  part_.shards.back().tokens = writer.count();
  part_.shards.back().xxh3 = xxh3_file(writer.temp_path());
}

void ShardSet::complete() {
  if (!writers_.empty()) end_shard();
}

void ShardSet::publish(std::vector<std::string>& removed) {
  for (const auto& writer : writers_) writer->publish();
  for (size_t n = writers_.size(); fs::is_regular_file(path(n)); ++n) {
    std::error_code error;
    fs::remove(path(n), error);
    check(!error, Exit::failed,
          "{} is left of an earlier set and cannot be removed: {}; remove it, or '{}_*.bin' will "
          "read it too",
          path(n), error.message(), stem_);
    removed.push_back(path(n));
  }
}

bool is_shard_name(std::string_view file, std::string_view prefix) {
  if (file.substr(0, prefix.size()) != prefix) return false;
  file.remove_prefix(prefix.size());
  for (std::string_view part : {"_train", "_valid"})
    if (file.substr(0, part.size()) == part) file.remove_prefix(part.size());
  constexpr std::string_view kEnd = ".bin";
  return file.size() == 1 + 6 + kEnd.size() && file[0] == '_' && all_digits(file.substr(1, 6)) &&
         file.substr(7) == kEnd;
}

}  // namespace hgrn
