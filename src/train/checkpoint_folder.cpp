#include "train/checkpoint_folder.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>

#include "core/check.h"
#include "core/fault.h"
#include "core/file.h"
#include "core/json_text.h"
#include "train/checkpoint.h"

namespace hgrn {
namespace {

namespace fs = std::filesystem;
constexpr const char* kNote = ".abandoning.json";
constexpr const char* kAbandoned = "abandoned-";
constexpr uint64_t kMaxMetricsBytes = uint64_t(4) << 30;

struct Note {
  int64_t after = -1;  // steps above it move
  std::string into;    // a name in the folder
};

std::optional<Note> read_note(const std::string& folder) {
  const std::string path = folder + "/" + kNote;
  if (!exists(path)) return std::nullopt;
  const nlohmann::ordered_json j = parse_json(read_file(path, 4096), path);
  const bool good = j.is_object() && j.contains("after") && j["after"].is_number_integer() &&
                    j.contains("into") && j["into"].is_string() &&
                    starts_with(j["into"].get<std::string>(), kAbandoned) &&
                    j["into"].get<std::string>().find('/') == std::string::npos;
  check(good, Exit::data, "{}: damaged; remove it, and the checkpoints that shall not count", path);
  return Note{j["after"].get<int64_t>(), j["into"].get<std::string>()};
}

std::vector<std::string> later_than(const std::string& folder, int64_t after) {
  std::vector<std::string> names;
  for (const std::string& name : list_names(folder))
    if (checkpoint_step_of(name) > after) names.push_back(name);
  return names;
}

// A number, not a time: clocks jump.
std::string unused_name(const std::string& folder) {
  for (int k = 1;; ++k)
    if (const std::string name = kAbandoned + std::to_string(k); !exists(folder + "/" + name))
      return name;
}

void copy_metrics(const std::string& folder, const std::string& into) {
  for (const char* name : {"metrics.jsonl", "layers.jsonl", "samples.jsonl"}) {
    const std::string from = (fs::path(folder).parent_path() / name).string();
    const std::string to = into + "/" + name;
    if (exists(from) && !exists(to)) write_file_atomic(to, read_file(from, kMaxMetricsBytes));
  }
}

}  // namespace

bool starts_with(const std::string& s, const std::string& prefix) {
  return s.compare(0, prefix.size(), prefix) == 0;
}

std::vector<std::string> list_names(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code ec;
  for (fs::directory_iterator it(folder, ec), end; !ec && it != end; it.increment(ec))
    names.push_back(it->path().filename().string());
  check(!ec || ec == std::errc::no_such_file_or_directory, Exit::data, "cannot list {}: {}", folder,
        ec.message());
  std::sort(names.begin(), names.end());
  return names;
}

int64_t step_of(const std::string& name) {
  if (!starts_with(name, "step-") || name.size() > 5 + 18) return -1;
  const std::string digits = name.substr(5);
  if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) return -1;
  const int64_t step = std::stoll(digits);
  return checkpoint_name(step) == name ? step : -1;
}

int64_t checkpoint_step_of(const std::string& name) {
  return step_of(starts_with(name, kReplaced) ? name.substr(std::string(kReplaced).size()) : name);
}

std::string abandon_later(const std::string& folder, int64_t after) {
  if (later_than(folder, after).empty()) return "";
  const nlohmann::ordered_json note = {{"after", after}, {"into", unused_name(folder)}};
  write_file_atomic(folder + "/" + kNote, note.dump() + "\n");
  fault_point("abandon.after-note");
  return finish_abandoning(folder);
}

std::string finish_abandoning(const std::string& folder) {
  const std::optional<Note> note = read_note(folder);
  if (!note) return "";
  const std::string into = folder + "/" + note->into;
  make_dirs(into);
  copy_metrics(folder, into);
  for (const std::string& name : later_than(folder, note->after)) {
    rename_path(folder + "/" + name, into + "/" + name);
    fault_point("abandon.after-rename");
  }
  fsync_path(into);
  fsync_path(folder);
  fault_point("abandon.before-end");
  remove_tree(folder + "/" + kNote);
  fsync_path(folder);
  return into;
}

int64_t last_step_that_counts(const std::string& folder) {
  const std::optional<Note> note = read_note(folder);
  return note ? note->after : INT64_MAX;
}

}  // namespace hgrn
