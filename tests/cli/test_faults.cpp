// What may happen to the real program while it trains: signals, data that vanish, a disk that
// fills, a folder that cannot be written, clocks that jump, a second writer. In every case the
// checkpoint before is intact, and the same command goes on.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "catch.h"
#include "cli/program.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;
namespace fs = std::filesystem;

namespace {

using Words = std::vector<std::string>;

// Runs that do not end by themselves.
struct Endless : RunFolder {
  Words words(const std::string& out, const Words& set = {}, const Words& more = {}) const {
    Words w = {"train",
               "--config",
               folder / "config.json",
               "--out",
               folder / out,
               "--device",
               "cpu",
               "--set",
               "train.steps=1000000",
               "--set",
               "optim.schedule=constant"};
    for (const std::string& s : set) w.insert(w.end(), {"--set", s});
    w.insert(w.end(), more.begin(), more.end());
    return w;
  }
  Ended run(const Words& w, const Program::Environment& environment = {}) const {
    return Program(folder, w, environment).wait();
  }
  std::vector<nlohmann::json> metrics(const std::string& out) const {
    std::vector<nlohmann::json> lines;
    std::istringstream in(slurp(folder / (out + "/metrics.jsonl")));
    for (std::string line; std::getline(in, line);)
      if (auto j = nlohmann::json::parse(line, nullptr, false); j.is_object()) lines.push_back(j);
    return lines;
  }
  int64_t last_step(const std::string& out) const {
    const auto lines = metrics(out);
    return lines.empty() ? 0 : lines.back()["step"].get<int64_t>();
  }
  int64_t newest(const std::string& out) const {
    const auto found = CheckpointStore(folder / out, 0).newest_valid(nullptr);
    return found ? found->step : -1;
  }
  std::string model(const std::string& out, int64_t step) const {
    return slurp(folder / (out + "/checkpoints/" + checkpoint_name(step) + "/model.safetensors"));
  }
  bool reaches(const Program& p, const std::string& out, int64_t step) const {
    return eventually(p, [&] { return last_step(out) >= step; });
  }
};

}  // namespace

TEST_CASE("faults: a signal saves at the next step, exit 75, and the same command goes on",
          "[cli]") {
  const Endless r;
  for (const int number : {SIGTERM, SIGINT, SIGUSR1}) {
    const std::string out = "signal " + std::to_string(number);
    Program p(r.folder, r.words(out));
    REQUIRE(r.reaches(p, out, 3));
    p.send(number);
    const Ended e = p.wait();
    INFO(e.err);
    CHECK(e.code == 75);
    CHECK(e.says("stopped by signal " + std::to_string(number)));
    CHECK(e.errors() == 0);
    const int64_t at = r.last_step(out);
    CHECK(r.newest(out) == at);  // the last step that was done
    const std::string stop = std::to_string(at + 3);
    CHECK(r.run(r.words(out, {}, {"--steps", stop})).code == 0);
    CHECK(r.run(r.words("whole", {}, {"--steps", stop, "--resume", "never"})).code == 0);
    CHECK(r.model(out, at + 3).size() > 1000);
    CHECK(r.model(out, at + 3) == r.model("whole", at + 3));
  }
}

TEST_CASE("faults: a second SIGINT ends at once and leaves the last good checkpoint", "[cli]") {
  const Endless r;
  // Long steps, so that the second signal comes long before the first one's save.
  const Words slow = r.words(
      "run", {"train.global_batch=6000", "train.micro_batch=500", "train.checkpoint_every=1"});
  Program p(r.folder, slow);
  const auto began = std::chrono::steady_clock::now();
  REQUIRE(eventually(p, [&] { return r.last_step("run") >= 1 && r.newest("run") == 1; }));
  const auto step = std::chrono::steady_clock::now() - began;
  p.send(SIGINT);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  REQUIRE(p.running());
  const auto sent = std::chrono::steady_clock::now();
  p.send(SIGINT);
  const Ended e = p.wait();
  CHECK(e.code == 130);
  CHECK(std::chrono::steady_clock::now() - sent < step / 2);  // it did not end the step
  CHECK(r.newest("run") == 1);
  CHECK(r.run({"inspect", r.folder / "run", "--verify"}).code == 0);
}

TEST_CASE("faults: a shard that shrinks under training is exit 3 with its name, not SIGBUS",
          "[cli]") {
  const Endless r;
  for (const char* victim : {"train_000000.bin", "valid_000000.bin"}) {
    const std::string out = std::string("run ") + victim, path = r.folder / victim;
    const std::string whole = slurp(path);
    const Words w = r.words(out, {"train.checkpoint_every=5", "train.eval_every=5"});
    Program p(r.folder, w);
    REQUIRE(eventually(p, [&] { return r.last_step(out) >= 12; }));
    REQUIRE(::truncate(path.c_str(), 1024) == 0);
    const Ended e = p.wait();
    INFO(e.err);
    CHECK(e.signal == 0);
    CHECK(e.code == 3);
    CHECK(e.errors() == 1);
    CHECK(e.says(path + " shrank"));
    CHECK(r.newest(out) >= 10);
    const Ended again = r.run(w);  // still damaged: said at the start
    CHECK(again.code == 3);
    CHECK(again.says(victim));
    spill(path, whole);
    const int64_t at = r.newest(out);
    CHECK(r.run(r.words(out, {"train.checkpoint_every=5", "train.eval_every=5"},
                        {"--steps", std::to_string(at + 1)}))
              .code == 0);
    CHECK(r.newest(out) == at + 1);
  }
}

TEST_CASE("faults: a shard that is removed or replaced is read to the end; its loss is told",
          "[cli]") {
  const Endless r;
  const std::string path = r.folder / "train_000001.bin", bytes = slurp(path);
  for (const bool replaced : {false, true}) {
    const std::string out = replaced ? "replaced" : "removed";
    Program p(r.folder, r.words(out));
    REQUIRE(r.reaches(p, out, 2));
    if (replaced) {
      spill(r.folder / "new", bytes.substr(0, 1024));
      fs::rename(r.folder / "new", path);
    } else {
      fs::remove(path);
    }
    const int64_t at = r.last_step(out);
    CHECK(r.reaches(p, out, at + 400));  // 1600 samples of 300 sequences: every one was read
    p.send(SIGTERM);
    CHECK(p.wait().code == 75);
    const Ended e = r.run(r.words(out, {}, {"--steps", std::to_string(r.newest(out) + 1)}));
    INFO(e.err);
    CHECK(e.code == (replaced ? 3 : 0));
    CHECK(e.says(replaced ? "train_000001.bin" : "in another order"));
    spill(path, bytes);
  }
  fs::remove(r.folder / "train_000000.bin");
  fs::remove(path);
  const Ended none = r.run(r.words("removed"));
  CHECK(none.code == 3);
  CHECK(none.says("train_*.bin"));
}

TEST_CASE("faults: two processes never write one run folder", "[cli]") {
  const Endless r;
  Program p(r.folder, r.words("run"));
  REQUIRE(r.reaches(p, "run", 1));
  const Ended second = r.run(r.words("run"));
  CHECK(second.code == 1);
  CHECK(second.errors() == 1);
  CHECK(second.says("in use"));
  p.send(SIGKILL);
  CHECK(p.wait().signal == SIGKILL);
  CHECK(r.run(r.words("run", {}, {"--steps", "2"})).code ==
        0);  // the dead one's lock does not hold
}

// ---- disks: in a mount namespace of the test's own, where it may have one

namespace {

// Runs a shell script in which `small SIZE` mounts a tmpfs of that size over the folder "disk".
// False where mounting is not allowed.
bool on_small_disk(const Endless& r, const std::string& script, Ended& result) {
  fs::create_directories(r.folder / "disk");
  const std::string head =
      "small() { mount -t tmpfs -o size=$1 tmpfs \"$DISK\"; }\n"
      "remount() { mount -o \"remount,$1\" \"$DISK\"; }\n"
      "train() { \"$HGRN\" train --config \"$CONFIG\" --out \"$DISK/run\" --device cpu \"$@\"; }\n";
  const Program::Environment environment = {
      {"DISK", r.folder / "disk"}, {"HGRN", HGRN_BINARY}, {"CONFIG", r.folder / "config.json"}};
  for (const char* flags : {"-m", "-rm"}) {
    const Ended may =
        Program(r.folder, {flags, "sh", "-c", head + "small 1m"}, environment, "unshare").wait();
    if (may.code != 0) continue;
    result = Program(r.folder, {flags, "sh", "-c", head + script}, environment, "unshare").wait();
    return true;
  }
  WARN("skipped: no right to mount a tmpfs");
  return false;
}

}  // namespace

TEST_CASE("faults: a disk that fills is exit 1 with its name, and what stood stays", "[cli]") {
  const Endless r;
  Ended e;
  if (!on_small_disk(r, R"(
        small 600k || exit 90
        train --set train.steps=400 --set train.checkpoint_every=1 --set train.keep_checkpoints=1000
        code=$?
        [ $code = 1 ] || { echo "first: $code" >&2; exit 91; }
        "$HGRN" inspect "$DISK/run" --verify >&2 || exit 92
        ls -A "$DISK/run/checkpoints" | grep -v '^step-' && exit 93
        remount size=8m
        train --set train.steps=20 --set train.checkpoint_every=1 || exit 94
        ls "$DISK/run/checkpoints" | grep -q step-00000020 || exit 95)",
                     e))
    return;
  INFO(e.err);
  CHECK(e.code == 0);
  CHECK(e.errors() == 1);
  CHECK(e.says("disk is full"));
  CHECK(e.says("verified"));
}

TEST_CASE("faults: a run folder on a read-only disk is exit 1 with its name", "[cli]") {
  const Endless r;
  Ended e;
  if (!on_small_disk(r, R"(
        small 4m || exit 90
        train || exit 91
        remount ro
        train --set train.steps=20
        code=$?
        [ $code = 1 ] || { echo "on ro: $code" >&2; exit 92; }
        "$HGRN" inspect "$DISK/run" --verify >&2 || exit 93
        "$HGRN" eval --checkpoint "$DISK/run" --data "$(dirname "$CONFIG")/valid_*.bin" || exit 94
        remount rw
        train --set train.steps=20 || exit 95)",
                     e))
    return;
  INFO(e.err);
  CHECK(e.code == 0);
  CHECK(e.errors() == 1);
  CHECK(e.says("disk/run"));
  CHECK(e.says("Read-only file system"));
}

// ---- clocks

TEST_CASE("faults: times of files do not matter", "[cli]") {
  const Endless r;
  const Words w = r.words("run", {"train.checkpoint_every=2", "train.keep_checkpoints=9"});
  Words first = w;
  first.insert(first.end(), {"--steps", "6"});
  REQUIRE(r.run(first).code == 0);
  auto time = fs::file_time_type::clock::now() + std::chrono::hours(24 * 365);
  for (const char* step : {"2", "4", "6"}) {  // the newest looks oldest
    for (const auto& entry : fs::recursive_directory_iterator(
             r.folder / ("run/checkpoints/step-0000000" + std::string(step))))
      fs::last_write_time(entry.path(), time);
    fs::last_write_time(r.folder / ("run/checkpoints/step-0000000" + std::string(step)), time);
    time -= std::chrono::hours(24 * 400);
  }
  fs::last_write_time(r.folder / "train_000000.bin", time);
  fs::last_write_time(r.folder / "train_000001.bin", time - std::chrono::hours(1));
  Words second = w;
  second.insert(second.end(), {"--steps", "8"});
  const Ended e = r.run(second);
  CHECK(e.code == 0);
  CHECK(e.says("step-00000006 at step 6"));
  Words whole = r.words("whole", {}, {"--steps", "8"});
  REQUIRE(r.run(whole).code == 0);
  CHECK(r.model("run", 8) == r.model("whole", 8));
}

TEST_CASE("faults: a clock that jumps changes nothing but the log's times", "[cli]") {
  const Endless r;
  std::string library;
  for (const char* path : {"/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
                           "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1"})
    if (fs::exists(path)) library = path;
  if (library.empty()) {
    WARN("skipped: libfaketime (package faketime) is not installed");
    return;
  }
  const std::string clock = r.folder / "clock";
  spill(clock, "+0");
  const Program::Environment jumpy = {{"LD_PRELOAD", library},
                                      {"FAKETIME_TIMESTAMP_FILE", clock},
                                      {"FAKETIME_NO_CACHE", "1"},
                                      {"DONT_FAKE_MONOTONIC", "1"},
                                      {"ASAN_OPTIONS", "verify_asan_link_order=0"}};
  const Words w = r.words("run", {"train.checkpoint_every=7"});
  Program p(r.folder, w, jumpy);
  for (const char* jump : {"+1000d", "-1000d", "+3d", "@1970-01-02 00:00:00", "-1h"}) {
    const int64_t at = r.last_step("run");
    REQUIRE(r.reaches(p, "run", at + 20));
    spill(clock + ".new", jump);
    fs::rename(clock + ".new", clock);
  }
  p.send(SIGTERM);
  const Ended stopped = p.wait();
  INFO(stopped.err);
  REQUIRE(stopped.code == 75);
  CHECK(slurp(r.folder / "run/log.txt").find("1970-01-0") != std::string::npos);  // it did jump
  spill(clock, "-2000d");  // and between two runs
  const int64_t end = r.newest("run") + 5;
  Words more = w;
  more.insert(more.end(), {"--steps", std::to_string(end)});
  CHECK(r.run(more, jumpy).code == 0);
  const auto lines = r.metrics("run");
  REQUIRE(int64_t(lines.size()) == end);
  for (const auto& j : lines) {  // durations are those of a clock that does not jump
    CHECK(j["step_ms"].get<double>() > 0);
    CHECK(j["step_ms"].get<double>() < 60e3);
    CHECK(j["eta_s"].get<double>() >= 0);
  }
  REQUIRE(r.run(r.words("whole", {}, {"--steps", std::to_string(end)})).code == 0);
  CHECK(r.model("run", end) == r.model("whole", end));
}
