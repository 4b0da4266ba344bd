// The store: how files become a checkpoint, and which folders count as one.
#include "train/checkpoint.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "core/check.h"
#include "core/fault.h"
#include "core/file.h"
#include "core/log.h"
#include "train/checkpoint_files.h"
#include "train/checkpoint_folder.h"
#include "train/manifest.h"

namespace hgrn {
namespace {

namespace fs = std::filesystem;
// Hidden names are never resumed from, but for .replaced-: see publish().
constexpr const char* kTmp = ".tmp-";
constexpr const char* kTrash = ".trash-";
constexpr const char* kStartedFrom = ".started-from";

// Swaps two names in one step, so that there is no moment without a checkpoint. False where the
// file system cannot.
bool exchange(const std::string& a, const std::string& b) {
  if (fault_switch("no-exchange")) return false;
  constexpr unsigned kRenameExchange = 2;  // RENAME_EXCHANGE of linux/fs.h
  return ::syscall(SYS_renameat2, AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), kRenameExchange) == 0;
}

// Renamed first: a half-removed folder must not look like a checkpoint.
void discard(const std::string& folder, const std::string& name) {
  const std::string from = folder + "/" + name;
  const std::string trash = folder + "/" + (name[0] == '.' ? name : kTrash + name);
  if (trash != from) {
    remove_tree(trash);
    rename_path(from, trash);
    fsync_path(folder);
  }
  fault_point("prune.after-trash");
  const std::vector<std::string> files =
      is_folder(trash) ? list_names(trash) : std::vector<std::string>{};
  if (!files.empty()) remove_tree(trash + "/" + files[0]);
  fault_point("prune.mid-removal");
  remove_tree(trash);
}

// The complete folder `tmp` takes its name. Returns the name under which an older folder of the
// same step now lies, to be discarded; empty if there was none. Where names cannot be exchanged
// there is a moment between two renames; the old folder is then found under .replaced-.
std::string publish(const std::string& folder, const std::string& tmp, const std::string& name) {
  const std::string from = folder + "/" + tmp, to = folder + "/" + name;
  std::string old;
  if (!exists(to)) {
    rename_path(from, to);
    fault_point("save.after-rename");
  } else if (exchange(from, to)) {
    old = tmp;
    fault_point("save.after-exchange");
  } else {
    old = kReplaced + name;
    remove_tree(folder + "/" + old);
    rename_path(to, folder + "/" + old);
    fsync_path(folder);
    fault_point("save.between-renames");
    rename_path(from, to);
    fault_point("save.after-second-rename");
  }
  fsync_path(folder);
  return old;
}

// What dead runs and failed saves left. Folders of this start of the run (`own`, a prefix) from
// `sequence` on may be in use by other ranks.
void clean_leftovers(const std::string& folder, const std::string& token, int64_t sequence) {
  const auto in_use = [&](const std::string& name) {
    const size_t dash = name.rfind('-');
    const std::string mark = "-" + token + "-";
    if (name.size() < mark.size() || dash + 1 < mark.size()) return false;
    if (name.compare(dash + 1 - mark.size(), mark.size(), mark) != 0) return false;
    return std::atoll(name.c_str() + dash + 1) >= sequence;
  };
  for (const std::string& name : list_names(folder)) {
    if (starts_with(name, kReplaced)) {
      const std::string original = name.substr(std::string(kReplaced).size());
      if (exists(folder + "/" + original))
        discard(folder, name);
      else
        rename_path(folder + "/" + name, folder + "/" + original);
    } else if (starts_with(name, kTrash) || (starts_with(name, kTmp) && !in_use(name))) {
      remove_tree(folder + "/" + name);
    }
  }
}

bool looks_complete(const std::string& dir) {
  try {
    check_folder(dir, Checksums::none);
    return true;
  } catch (const Error&) {
    return false;
  }
}

// Keeps the newest `keep` up to `written`. Incomplete folders do not count, and go once enough
// newer ones are kept. Later steps than `written` (of a run that was rolled back) are not touched.
void prune(const std::string& folder, int64_t written, int keep) {
  if (keep <= 0) return;
  std::vector<int64_t> steps;
  for (const std::string& name : list_names(folder))
    if (const int64_t step = step_of(name); step >= 0 && step < written) steps.push_back(step);
  std::sort(steps.rbegin(), steps.rend());
  int kept = 1;  // the one just written
  for (int64_t step : steps) {
    const std::string name = checkpoint_name(step);
    if (kept < keep)
      kept += looks_complete(folder + "/" + name);
    else
      discard(folder, name);
  }
}

std::string done_file(int rank) {
  return fmt::format(".done-{:05d}", rank);
}

std::string failed_file(int rank) {
  return fmt::format(".failed-{:05d}", rank);
}

// Other ranks' optimizer files, as they are completed.
void await_ranks(const std::string& tmp, const SaveRank& self, const std::atomic<bool>& abandoned,
                 Manifest& manifest) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::duration<double>(self.timeout_s);
  auto pause = std::chrono::milliseconds(2);
  for (int r = 1; r < self.world; ++r) {
    const std::string done = tmp + "/" + done_file(r), name = optimizer_file(r, self.world);
    while (!exists(done)) {
      const std::string failed = tmp + "/" + failed_file(r);
      check(!exists(failed), Exit::failed,
            "rank {} of {} could not save its part, {}/{}; see its log", r, self.world, tmp, name);
      check(!abandoned, Exit::failed, "the save of {} was given up: the run has failed", tmp);
      check(Clock::now() < deadline, Exit::failed,
            "rank {} of {} did not write {}/{} within {} s; see its log", r, self.world, tmp, name,
            self.timeout_s);
      std::this_thread::sleep_for(pause);
      pause = std::min(pause * 2, std::chrono::milliseconds(500));
    }
    unsigned long long size = 0, hash = 0;
    check(std::sscanf(read_file(done, 100).c_str(), "%llu %llx", &size, &hash) == 2, Exit::failed,
          "{} is damaged", done);
    manifest.files[name] = {size, hash};
    remove_tree(done);
  }
}

}  // namespace

std::string checkpoint_name(int64_t step) {
  return fmt::format("step-{:08d}", step);
}

CheckpointStore::CheckpointStore(const std::string& run_dir, int keep, SaveRank rank)
    : folder_(run_dir + "/checkpoints"), keep_(keep), rank_(std::move(rank)) {
  check(0 <= rank_.rank && rank_.rank < rank_.world, "rank {} of {}", rank_.rank, rank_.world);
  check(rank_.world == 1 || !rank_.token.empty(), "a save by {} ranks needs a token", rank_.world);
  if (rank_.token.empty()) rank_.token = std::to_string(::getpid());
  for (char& c : rank_.token)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
}

CheckpointStore::~CheckpointStore() {
  try {
    wait();
  } catch (const std::exception& e) {
    log_message(LogLevel::error, e.what());
  }
}

std::string CheckpointStore::save(const Snapshot& snapshot) {
  wait();
  return write(snapshot, ++saves_);
}

void CheckpointStore::save_async(Snapshot&& snapshot) {
  wait();
  const int64_t sequence = ++saves_;
  thread_ = std::thread([this, sequence, s = std::move(snapshot)] {
    try {
      write(s, sequence);
    } catch (...) {
      error_ = std::current_exception();
    }
  });
}

void CheckpointStore::wait() {
  if (thread_.joinable()) thread_.join();
  if (std::exception_ptr error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
}

// Rank 0's folder, complete with its manifest, under the path `tmp`.
void CheckpointStore::build(const Snapshot& s, const std::string& tmp) const {
  make_dirs(tmp);
  fault_point("save.begin");
  Manifest manifest;
  manifest.step = s.state.step;
  const auto add = [&](const std::string& name, auto&& write_it) {
    check(is_plain_name(name) && name != kManifestName && !manifest.files.count(name),
          "a checkpoint cannot hold a file \"{}\" (again)", name);
    manifest.files[name] = write_it(tmp + "/" + name);
  };
  using Path = const std::string&;
  add(kConfigFile, [&](Path p) { return write_text_file(p, s.hf_config_json); });
  fault_point("save.after-config");
  add(kModelFile, [&](Path p) { return write_model_file(p, *s.table, s.master); });
  fault_point("save.after-model");
  add(optimizer_file(0, rank_.world),
      [&](Path p) { return write_optimizer_file(p, s, 0, rank_.world); });
  fault_point("save.after-optimizer");
  add(kTrainerFile, [&](Path p) { return write_text_file(p, trainer_state_to_json(s.state)); });
  fault_point("save.after-trainer");
  for (const auto& extra : s.extra_files)
    add(extra.first, [&](Path p) { return copy_extra_file(extra.second, p); });
  await_ranks(tmp, rank_, abandoned_, manifest);
  fault_point("save.before-manifest");
  write_text_file(tmp + "/" + kManifestName, manifest_to_json(manifest));
  fault_point("save.after-manifest");
  fsync_path(tmp);
}

// The other ranks' part: the file, then a note that it is complete.
void CheckpointStore::contribute(const Snapshot& s, const std::string& tmp) const {
  try {
    make_dirs(tmp);
    const Manifest::Entry e = write_optimizer_file(
        tmp + "/" + optimizer_file(rank_.rank, rank_.world), s, rank_.rank, rank_.world);
    fault_point("save.before-done");
    write_file_atomic(tmp + "/" + done_file(rank_.rank),
                      fmt::format("{} {}", e.size, hex16(e.xxh3)));
  } catch (...) {  // an empty file, which even a full disk mostly takes: rank 0 need not wait
    if (std::FILE* note = std::fopen((tmp + "/" + failed_file(rank_.rank)).c_str(), "w"))
      std::fclose(note);
    throw;
  }
}

std::string CheckpointStore::write(const Snapshot& s, int64_t sequence) {
  check(s.table != nullptr && s.state.step >= 0, "a snapshot without table or step");
  const std::string name = checkpoint_name(s.state.step), final = folder_ + "/" + name;
  const std::string tmp_name = fmt::format("{}{}-{}-{}", kTmp, name, rank_.token, sequence);
  const std::string tmp = folder_ + "/" + tmp_name;
  if (rank_.rank > 0) {
    contribute(s, tmp);
    return final;
  }
  make_dirs(folder_);
  fsync_path(fs::path(folder_).parent_path().string());
  // A single rank's folders are never in use by others; a dead run may even have had our pid.
  clean_leftovers(folder_, rank_.token, rank_.world == 1 ? INT64_MAX : sequence);
  std::string old;
  try {
    build(s, tmp);
    fault_point("save.before-rename");
    old = publish(folder_, tmp_name, name);
  } catch (...) {
    std::error_code ec;
    fs::remove_all(tmp, ec);  // frees a full disk; the error that matters is on its way
    throw;
  }
  try {
    if (!old.empty()) discard(folder_, old);
    fault_point("prune.begin");
    prune(folder_, s.state.step, keep_);
  } catch (const Error& e) {  // the checkpoint stands; training must not end for this
    log_warn("an old checkpoint stays: {}", e.what());
  }
  return final;
}

bool CheckpointStore::owns(const std::string& dir) const {
  std::error_code ec;
  const fs::path path = fs::canonical(dir, ec);
  return !ec && checkpoint_step_of(path.filename().string()) >= 0 &&
         fs::equivalent(path.parent_path(), folder_, ec) && !ec;
}

std::string CheckpointStore::go_on_from(const std::string& dir, int64_t step) {
  wait();
  if (rank_.rank > 0) return "";
  if (owns(dir)) return abandon_later(folder_, step);
  make_dirs(folder_);
  write_file_atomic(folder_ + "/" + kStartedFrom, dir);
  return abandon_later(folder_, -1);
}

std::string CheckpointStore::finish_go_on() {
  wait();
  return rank_.rank > 0 ? "" : finish_abandoning(folder_);
}

std::optional<CheckpointStore::Found> CheckpointStore::newest_valid(
    std::vector<std::string>* complaints, Checksums checksums) const {
  struct Candidate {
    int64_t step;
    bool current;  // not .replaced-
    std::string dir;
    bool operator<(const Candidate& o) const {
      return step != o.step ? step < o.step : current < o.current;
    }
  };
  std::vector<Candidate> candidates;
  const int64_t last = last_step_that_counts(folder_);
  for (const std::string& name : list_names(folder_)) {
    const int64_t step = checkpoint_step_of(name);
    if (step >= 0 && step <= last)
      candidates.push_back({step, !starts_with(name, kReplaced), folder_ + "/" + name});
  }
  std::sort(candidates.rbegin(), candidates.rend());
  std::string first;
  for (const Candidate& c : candidates) {
    try {
      const int64_t step = verify_checkpoint(c.dir, checksums);
      check(step == c.step, Exit::data, "{} holds step {}", c.dir, step);
      return Found{c.dir, c.step};
    } catch (const Error& e) {
      if (e.code() != Exit::data) throw;
      if (first.empty()) first = e.what();
      if (complaints)
        complaints->push_back(fmt::format("checkpoint {} is not used: {}", c.dir, e.what()));
    }
  }
  check(candidates.empty(), Exit::data,
        "{} holds {} checkpoints, none of them valid ({}); restore one, or start anew with another "
        "--out or --resume never",
        folder_, candidates.size(), first);
  const std::string started_from = folder_ + "/" + kStartedFrom;
  check(!exists(started_from), Exit::data,
        "{}: the run was to go on from {}, but ended before its first checkpoint; give --resume "
        "with that folder again, or --resume never to start anew",
        folder_, exists(started_from) ? read_file(started_from, 1 << 16) : "");
  return std::nullopt;
}

std::string find_checkpoint(const std::string& dir, Checksums checksums) {
  if (!exists(dir + "/checkpoints")) {
    if (exists(dir + "/" + kManifestName)) verify_checkpoint(dir, checksums);
    return dir;
  }
  std::vector<std::string> complaints;
  const auto found = CheckpointStore(dir, 0).newest_valid(&complaints, checksums);
  for (const std::string& c : complaints) log_warn("{}", c);
  check(found.has_value(), Exit::data, "{}: the run folder holds no checkpoint yet", dir);
  return found->dir;
}

}  // namespace hgrn
