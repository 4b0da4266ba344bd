// Checkpoints under faults: kills at any point of a save, damaged files, full disks and read-only
// folders. None may lose the checkpoint before, and none may be taken for a good one.
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "catch.h"
#include "core/file.h"
#include "core/rng.h"
#include "temp_folder.h"
#include "train/checkpoint.h"
#include "train/manifest.h"
#include "train/snapshot.h"

using namespace hgrn;
using namespace hgrn::test;
namespace fs = std::filesystem;

namespace {

void flip_bit(const std::string& path, size_t at, int bit) {
  std::string bytes = slurp(path);
  bytes[at] = char(bytes[at] ^ (1 << bit));
  spill(path, bytes);
}

}  // namespace

TEST_CASE("a kill at any point of a save leaves the old or the new checkpoint", "[train]") {
  const ParamTable table = make_table();
  const Snapshot a = make_snapshot(table, 10, 100), b = make_snapshot(table, 20, 200),
                 c = make_snapshot(table, 30, 300);
  const std::vector<std::pair<std::string, bool>> points = {
      // name, and whether B stands already
      {"save.begin", false},          {"save.after-config", false},
      {"save.mid-model", false},      {"save.after-model", false},
      {"save.mid-optimizer", false},  {"save.after-optimizer", false},
      {"save.after-trainer", false},  {"save.before-manifest", false},
      {"save.after-manifest", false}, {"save.before-rename", false},
      {"save.after-rename", true},    {"prune.begin", true},
      {"prune.after-trash", true},    {"prune.mid-removal", true}};
  for (const auto& [point, stands] : points) {
    for (bool async : {false, true}) {
      if (async && point != "save.mid-model" && point != "prune.begin") continue;
      INFO(point << (async ? " async" : ""));
      TempFolder tmp;
      CheckpointStore store(tmp.path(), 1);
      store.save(a);
      const Child child = run_in_child([&, &name = point] {
        ::setenv("HGRN_FAULT", name.c_str(), 1);
        CheckpointStore dying(tmp.path(), 1);
        if (!async) dying.save(b);
        dying.save_async(Snapshot(b));
        dying.wait();
      });
      REQUIRE(child.killed());
      std::vector<std::string> complaints;
      const auto found = store.newest_valid(&complaints);
      REQUIRE(found);
      CHECK(complaints.empty());
      CHECK(holds(found->dir, stands ? b : a));
      // The next save goes through and leaves nothing of the dead one.
      store.save(c);
      CHECK(names_in(store.folder()) == std::vector<std::string>{"step-00000030"});
      CHECK(holds(store.newest_valid(nullptr)->dir, c));
    }
  }
}

TEST_CASE("a kill while a checkpoint of the same step is replaced leaves one of both", "[train]") {
  const ParamTable table = make_table();
  const Snapshot a = make_snapshot(table, 10, 100), b = make_snapshot(table, 10, 200);
  struct Point {
    const char* fault;
    bool stands;
    const char* left_under;
  };
  const std::vector<Point> points = {
      {"save.before-rename", false, "step-00000010"},
      {"save.after-exchange", true, "step-00000010"},
      {"prune.mid-removal", true, "step-00000010"},
      {"+no-exchange,save.before-rename", false, "step-00000010"},
      {"+no-exchange,save.between-renames", false, ".replaced-step-00000010"},
      {"+no-exchange,save.after-second-rename", true, "step-00000010"},
      {"+no-exchange,prune.after-trash", true, "step-00000010"},
      {"+no-exchange,prune.mid-removal", true, "step-00000010"}};
  for (const Point& p : points) {
    INFO(p.fault);
    TempFolder tmp;
    CheckpointStore store(tmp.path(), 2);
    store.save(a);
    const Child child = run_in_child([&] {
      ::setenv("HGRN_FAULT", p.fault, 1);
      CheckpointStore(tmp.path(), 2).save(b);
    });
    REQUIRE(child.killed());
    const auto found = store.newest_valid(nullptr);
    REQUIRE(found);
    CHECK(fs::path(found->dir).filename() == p.left_under);
    CHECK(holds(found->dir, p.stands ? b : a));
    const Snapshot c = make_snapshot(table, 11, 300);
    store.save(c);  // keep is 2: the survivor stays, under its proper name
    CHECK(names_in(store.folder()) == std::vector<std::string>{"step-00000010", "step-00000011"});
    CHECK(holds(store.folder() + "/step-00000010", p.stands ? b : a));
  }
  TempFolder tmp;  // and without a kill
  for (const char* fault : {"", "+no-exchange"}) {
    const Child child = run_in_child([&] {
      ::setenv("HGRN_FAULT", fault, 1);
      CheckpointStore store(tmp.path(), 2);
      store.save(a);
      store.save(b);
    });
    REQUIRE(child.exited());
    CHECK(child.thrown.text.empty());
    CHECK(names_in(tmp / "checkpoints") == std::vector<std::string>{"step-00000010"});
    CHECK(holds(tmp / "checkpoints/step-00000010", b));
  }
}

TEST_CASE("kills at random moments never lose a checkpoint", "[train]") {
  const ParamTable table = make_table(true, 20000);
  TempFolder tmp;
  CheckpointStore store(tmp.path(), 2);
  store.save(make_snapshot(table, 1, 1));
  int64_t newest = 1;
  for (int round = 0; round < 12; ++round) {
    const Snapshot base = make_snapshot(table, 1, 77);
    const pid_t pid = ::fork();
    REQUIRE(pid >= 0);
    if (pid == 0) {
      try {
        CheckpointStore dying(tmp.path(), 2);
        for (int64_t step = newest + 1;; ++step) {
          Snapshot s = base;
          s.state.step = step;
          dying.save_async(std::move(s));
        }
      } catch (const std::exception& e) {
        std::fprintf(stderr, "the child failed: %s\n", e.what());
      }
      ::_exit(1);  // only an error ends the loop
    }
    const uint32_t random = philox(4711, 0, uint64_t(round)).v[0];
    std::this_thread::sleep_for(std::chrono::microseconds(3000 + random % 120000));
    ::kill(pid, SIGKILL);
    int status = 0;
    ::waitpid(pid, &status, 0);
    REQUIRE(WIFSIGNALED(status));
    std::vector<std::string> complaints;
    const auto found = store.newest_valid(&complaints);
    REQUIRE(found);
    CHECK(complaints.empty());
    CHECK(found->step >= newest);
    newest = found->step;
  }
}

TEST_CASE("damage in any file is found and the checkpoint before is taken", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  CheckpointStore store(tmp.path(), 5);
  const Snapshot good = make_snapshot(table, 1, 1);
  store.save(good);
  const std::string dir = store.save(make_snapshot(table, 2, 2));
  const auto check_damaged = [&](const std::string& name) {
    INFO(name);
    const Thrown t = thrown_by([&] { verify_checkpoint(dir); });
    CHECK(t.code == Exit::data);
    CHECK(t.has(name));
    std::vector<std::string> complaints;
    const auto found = store.newest_valid(&complaints);
    REQUIRE(found);
    CHECK(found->step == 1);
    REQUIRE(complaints.size() == 1);
    CHECK(complaints[0].find(name) != std::string::npos);
    CHECK(complaints[0].find('\n') == std::string::npos);
  };
  for (const std::string& name : names_in(dir)) {
    const std::string path = dir + "/" + name, bytes = slurp(path);
    for (size_t i = 0; i < 8; ++i) {
      flip_bit(path, i * (bytes.size() - 1) / 7, int(i));
      check_damaged(name == "MANIFEST.json" ? "" : name);
      spill(path, bytes);
    }
    for (size_t length : {size_t(0), bytes.size() / 2, bytes.size() - 1}) {
      spill(path, bytes.substr(0, length));
      check_damaged(name);
    }
    spill(path, bytes + "x");
    check_damaged(name);
    fs::remove(path);
    check_damaged(name);
    spill(path, bytes);
    verify_checkpoint(dir);
  }
  CHECK(store.newest_valid(nullptr)->step == 2);
}

TEST_CASE("evaluation checks all of a checkpoint but the optimizer's bytes", "[train]") {
  TempFolder tmp;
  const CheckpointStore store(tmp.path(), 3);
  const std::string dir = CheckpointStore(tmp.path(), 3).save(make_snapshot(make_table(), 5, 1));
  const auto found_with_damage = [&](const std::string& name, bool shorter) {
    const std::string bytes = slurp(dir + "/" + name);
    std::string bad = bytes;
    bad.back() = char(bad.back() ^ 1);
    if (shorter) bad.pop_back();
    spill(dir + "/" + name, bad);
    bool found = false;
    thrown_by(
        [&] { found = store.newest_valid(nullptr, Checksums::without_optimizer).has_value(); });
    CHECK_FALSE(thrown_by([&] { store.newest_valid(nullptr); }).code == Exit::ok);
    spill(dir + "/" + name, bytes);
    return found;
  };
  for (const char* name : {kModelFile, kConfigFile, kTrainerFile, kManifestName})
    CHECK_FALSE(found_with_damage(name, false));
  CHECK(found_with_damage(optimizer_file(0, 1), false));
  CHECK_FALSE(found_with_damage(optimizer_file(0, 1), true));
}

TEST_CASE("a checkpoint named by its folder is verified, one without a manifest taken", "[train]") {
  TempFolder tmp;
  const std::string dir = CheckpointStore(tmp.path(), 3).save(make_snapshot(make_table(), 5, 1));
  CHECK(find_checkpoint(tmp.path(), Checksums::all) == dir);
  CHECK(find_checkpoint(dir, Checksums::all) == dir);
  std::string bytes = slurp(dir + "/" + kModelFile);
  bytes.back() = char(bytes.back() ^ 1);
  spill(dir + "/" + kModelFile, bytes);
  for (const std::string& named : {tmp.path(), dir}) {
    const auto error = thrown_by([&] { find_checkpoint(named, Checksums::without_optimizer); });
    CHECK(error.code == Exit::data);
    CHECK(error.text.find(kModelFile) != std::string::npos);
  }
  std::filesystem::remove(dir + "/" + kManifestName);  // as a folder of another program
  CHECK(find_checkpoint(dir, Checksums::without_optimizer) == dir);
}

TEST_CASE("every changed bit of a manifest is noticed", "[train]") {
  Manifest m;
  m.step = 1000;
  m.files = {{"config.json", {12, 0xabcdef0123456789u}}, {"model.safetensors", {1u << 30, 5}}};
  const std::string good = manifest_to_json(m);
  CHECK(manifest_to_json(manifest_from_json(good, "m")) == good);
  size_t read = 0;
  for (size_t i = 0; i < good.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[i] = char(bad[i] ^ (1 << bit));
      const Thrown t = thrown_by([&] {
        // What can be read says something else, which the files then contradict.
        if (manifest_to_json(manifest_from_json(bad, "m")) == good) fail(Exit::failed, "unnoticed");
        ++read;
      });
      if (t.code == Exit::failed) FAIL("byte " << i << " bit " << bit);
    }
  CHECK(read > 0);
}

TEST_CASE("a manifest cannot point outside its folder or leave parts out", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  const std::string dir = CheckpointStore(tmp.path(), 1).save(make_snapshot(table, 5, 1));
  const Manifest good = check_folder(dir, Checksums::all);
  const auto refused = [&](const Manifest& m, const std::string& message) {
    spill(dir + "/MANIFEST.json", manifest_to_json(m));
    const Thrown t = thrown_by([&] { verify_checkpoint(dir); });
    INFO(t.text);
    CHECK(t.code == Exit::data);
    CHECK(t.has(message));
  };
  for (const char* name : {"../x", "/etc/passwd", ".hidden", "", "a/b"}) {
    Manifest m = good;
    m.files[name] = {};
    refused(m, "not a plain file name");
  }
  for (const auto& [name, entry] : good.files) {
    Manifest m = good;
    m.files.erase(name);
    refused(m, name.find("optimizer") == 0 ? "no optimizer file" : name);
  }
  Manifest m = good;
  m.files["optimizer-00001-of-00002.safetensors"] = {};
  refused(m, "optimizer files of 1 and of 2 ranks");
  m = good;
  m.files["optimizer-00003-of-00001.safetensors"] = {};
  refused(m, "not a valid name");
  m = good;
  m.step = 6;
  refused(m, "of step 5, its manifest of step 6");
}

TEST_CASE("checkpoints of which none is valid are an error, not a fresh start", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  CheckpointStore store(tmp.path(), 5);
  store.save(make_snapshot(table, 1, 1));
  store.save(make_snapshot(table, 2, 1));
  for (const char* name : {"step-00000001", "step-00000002"})
    fs::remove(store.folder() + "/" + name + "/MANIFEST.json");
  std::vector<std::string> complaints;
  const Thrown t = thrown_by([&] { store.newest_valid(&complaints); });
  CHECK(t.code == Exit::data);
  CHECK(t.has("none of them valid"));
  CHECK(complaints.size() == 2);
  // A folder renamed by hand to another step is not what it says.
  fs::remove_all(store.folder());
  store.save(make_snapshot(table, 1, 1));
  fs::rename(store.folder() + "/step-00000001", store.folder() + "/step-00000009");
  CHECK(thrown_by([&] { store.newest_valid(nullptr); }).has("holds step 1"));
  // Leftovers of a first save that died are no checkpoints.
  fs::remove_all(store.folder());
  fs::create_directories(store.folder() + "/.tmp-step-00000001-9-1");
  fs::create_directories(store.folder() + "/notes");
  CHECK_FALSE(store.newest_valid(nullptr));
}

TEST_CASE("an error of a background save comes with the next call, and leaves nothing", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  CheckpointStore store(tmp.path(), 2);
  const Snapshot good = make_snapshot(table, 1, 1);
  store.save(good);
  Snapshot bad = make_snapshot(table, 2, 1);
  bad.extra_files = {{"tokenizer.json", tmp / "none"}};
  store.save_async(Snapshot(bad));
  const Thrown t = thrown_by([&] { store.save_async(Snapshot(good)); });
  CHECK(t.code == Exit::data);
  CHECK(t.has(tmp / "none"));
  store.wait();  // told once
  CHECK(names_in(store.folder()) == std::vector<std::string>{"step-00000001"});
  for (const char* name : {"../x", ".x", "", "model.safetensors", "MANIFEST.json"}) {
    bad.extra_files = {{name, store.folder() + "/step-00000001/config.json"}};
    CHECK(thrown_by([&] { store.save(bad); }).code == Exit::failed);
  }
  bad.extra_files.clear();
  bad.m.pop_back();
  CHECK(thrown_by([&] { store.save(bad); }).code == Exit::failed);
  CHECK(names_in(store.folder()) == std::vector<std::string>{"step-00000001"});
}

TEST_CASE("a full disk fails the save and keeps the checkpoint before", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table(true, 20000);  // 640 kB a buffer
  const Snapshot a = make_snapshot(table, 1, 1), b = make_snapshot(table, 2, 2);
  SECTION("a small tmpfs") {
    const Child child = run_in_child([&] {
      if (::unshare(CLONE_NEWNS) != 0 || ::mount("", "/", "", MS_REC | MS_PRIVATE, nullptr) != 0 ||
          ::mount("tmpfs", tmp.path().c_str(), "tmpfs", 0, "size=3m") != 0)
        fail(Exit::usage, "no tmpfs");
      CheckpointStore store(tmp.path(), 2);
      store.save(a);
      const Thrown t = thrown_by([&] { store.save(b); });
      check(names_in(store.folder()) == std::vector<std::string>{"step-00000001"}, "leftovers");
      check(holds(store.newest_valid(nullptr)->dir, a), "the old checkpoint is not intact");
      throw Error(t.code, t.text);
    });
    REQUIRE(child.exited());
    if (child.thrown.code == Exit::usage) {
      WARN("skipped: no right to mount a tmpfs");
    } else {
      CHECK(child.thrown.code == Exit::failed);
      CHECK(child.thrown.has("disk is full"));
    }
  }
  SECTION("a limit on the size of files") {
    CheckpointStore(tmp.path(), 2).save(a);
    const Child child = run_in_child([&] {
      ::signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{700000, 700000};  // the model fits, the moments do not
      ::setrlimit(RLIMIT_FSIZE, &limit);
      CheckpointStore(tmp.path(), 2).save(b);
    });
    REQUIRE(child.exited());
    CHECK(child.thrown.code == Exit::failed);
    CHECK(child.thrown.has("optimizer-00000-of-00001.safetensors"));
    CheckpointStore store(tmp.path(), 2);
    CHECK(names_in(store.folder()) == std::vector<std::string>{"step-00000001"});
    CHECK(holds(store.newest_valid(nullptr)->dir, a));
    store.save(b);
    CHECK(holds(store.newest_valid(nullptr)->dir, b));
  }
}

TEST_CASE("a save into a read-only run folder is an error", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  ::chmod(tmp.path().c_str(), 0555);
  const Child child = run_in_child([&] {
    if (::geteuid() == 0) check(::setuid(65534) == 0, "cannot become an ordinary user");
    CheckpointStore(tmp.path(), 1).save(make_snapshot(table, 1, 1));
  });
  ::chmod(tmp.path().c_str(), 0755);
  CHECK(child.thrown.code == Exit::failed);
  CHECK(child.thrown.has(tmp.path()));
}
