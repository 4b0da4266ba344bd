// The order of fsync and rename, which decides what a power cut can leave. A kill cannot show it:
// what a killed process wrote stays in the page cache. So this binary puts its own fsync() and
// rename() before libc's and notes the calls.
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <mutex>
#include <string>
#include <vector>

#include "catch.h"
#include "core/file.h"
#include "temp_folder.h"
#include "train/checkpoint.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::mutex mutex;
bool recording = false;
std::vector<std::string> calls;

void note(const std::string& call) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (recording) calls.push_back(call);
}

std::vector<std::string> record(void (*f)(const std::string&), const std::string& folder) {
  calls.clear();
  recording = true;
  f(folder);
  recording = false;
  // Paths relative to the folder; names that hold a process id or a counter are shortened.
  const std::string root = std::filesystem::canonical(folder).string();
  std::vector<std::string> out;
  for (std::string call : calls) {
    for (size_t at; (at = call.find(root)) != std::string::npos;) call.erase(at, root.size());
    out.push_back(call);
  }
  return out;
}

size_t position(const std::vector<std::string>& all, const std::string& start,
                const std::string& end) {
  for (size_t i = 0; i < all.size(); ++i)
    if (all[i].compare(0, start.size(), start) == 0 && all[i].size() >= end.size() &&
        all[i].compare(all[i].size() - end.size(), end.size(), end) == 0)
      return i;
  FAIL("no call " << start << "..." << end);
  return 0;
}

}  // namespace

extern "C" int fsync(int fd) {
  char path[4096];
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const ssize_t n = ::readlink(link.c_str(), path, sizeof path);
  note("fsync " + std::string(path, n > 0 ? size_t(n) : 0));
  return int(::syscall(SYS_fsync, fd));
}

extern "C" int rename(const char* from, const char* to) noexcept {
  note(std::string("rename ") + from + " -> " + to);
  return int(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

TEST_CASE("a file is synced before its rename, and the folder after", "[train]") {
  TempFolder tmp;
  const auto all =
      record([](const std::string& d) { write_file_atomic(d + "/f", "x"); }, tmp.path());
  REQUIRE(all.size() == 3);
  CHECK(all[0].find("fsync /.f.tmp-") == 0);
  CHECK(all[1].find("rename /.f.tmp-") == 0);
  CHECK(all[2] == "fsync ");
}

TEST_CASE("a checkpoint is synced file by file, manifest last, then named", "[train]") {
  TempFolder tmp;
  const auto all = record(
      [](const std::string& d) {
        ParamTable table;
        Param p;
        p.name = "w", p.shape = {3};
        table.add(p);
        table.finalize();
        Snapshot s;
        s.table = &table;
        s.master.assign(size_t(table.total()), 1);
        s.m = s.v = s.master;
        s.hf_config_json = "{}";
        s.extra_files = {{"tokenizer.json", "/dev/null"}};
        CheckpointStore store(d, 1);
        store.save(s);
        s.state.step = 1;
        store.save_async(std::move(s));
        store.wait();
      },
      tmp.path());
  for (const char* step : {"step-00000000", "step-00000001"}) {
    INFO(step);
    const std::string tmp_dir = std::string("/checkpoints/.tmp-") + step;
    const size_t manifest = position(all, "fsync " + tmp_dir, "/MANIFEST.json");
    for (const char* name : {"config.json", "model.safetensors", "trainer.json", "tokenizer.json",
                             "optimizer-00000-of-00001.safetensors"})
      CHECK(position(all, "fsync " + tmp_dir, std::string("/") + name) < manifest);
    const size_t named = position(all, "rename " + tmp_dir, std::string("/checkpoints/") + step);
    REQUIRE(named > manifest + 1);
    CHECK(all[named - 1].find("fsync " + tmp_dir) == 0);  // the folder with all its names
    CHECK(all[named - 1].find(".json") == std::string::npos);
    REQUIRE(all.size() > named + 1);
    CHECK(all[named + 1] == "fsync /checkpoints");
  }
  // The old one goes only once the new one is safe.
  const size_t trashed = position(all, "rename /checkpoints/step-00000000 -> ", "step-00000000");
  CHECK(trashed > position(all, "rename ", "/checkpoints/step-00000001") + 1);
}
