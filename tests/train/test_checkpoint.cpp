#include "train/checkpoint.h"

#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>

#include "catch.h"
#include "core/file.h"
#include "core/rng.h"
#include "model/safetensors.h"
#include "temp_folder.h"
#include "train/manifest.h"

using namespace hgrn;
using namespace hgrn::test;
namespace fs = std::filesystem;

namespace {

Param param(const std::string& name, const Shape& shape, Decay decay = Decay::yes,
            const Shape& stored = {}) {
  Param p;
  p.name = name, p.shape = shape, p.decay = decay, p.stored = stored;
  return p;
}

// Padded rows and columns, a pack, both decay groups, and gaps between the weights.
ParamTable make_table(bool tied = true, int64_t rows = 37) {
  ParamTable t;
  const Shape padded = {(rows + 15) / 16 * 16, 8};
  t.add(param("model.embeddings.weight", {rows, 8}, Decay::yes, padded));
  if (!tied) t.add(param("lm_head.weight", {rows, 8}, Decay::yes, padded));
  t.add(param("model.lower_bounds", {2, 8}, Decay::no));
  const ParamId q = t.add(param("model.layers.0.attn.q_proj.weight", {8, 8}));
  const ParamId f = t.add(param("model.layers.0.attn.f_proj.weight", {8, 8}));
  t.pack({q, f});
  t.add(param("model.layers.0.mlp.down_proj.weight", {8, 11}, Decay::yes, {8, 16}));
  t.add(param("model.norm.weight", {8}, Decay::no));
  t.finalize();
  return t;
}

// The flat buffers as training has them: any numbers in the weights, zeros in the padding.
std::vector<float> filled(const ParamTable& t, uint64_t seed) {
  std::vector<float> flat(size_t(t.total()), 0.0f);
  for (const Param& p : t.params())
    for (int64_t i = 0; i < p.shape.numel(); ++i)
      flat[size_t(p.at(i))] = float(int32_t(philox(seed, 0, uint64_t(p.at(i))).v[0])) / 7e8f;
  return flat;
}

Snapshot make_snapshot(const ParamTable& t, int64_t step, uint64_t seed) {
  Snapshot s;
  s.table = &t;
  s.master = filled(t, seed), s.m = filled(t, seed + 1), s.v = filled(t, seed + 2);
  s.state.step = step, s.state.updates = step - 1, s.state.tokens = step * 4096;
  s.state.next_sample = step * 8, s.state.seed = 0xfedcba9876543210ull;
  s.state.config_json = R"({"optim": {"lr": 0.0003}, "model": {"hidden_size": 8}})";
  s.state.series["loss"] = {0.1, 1.0 / 3.0, 1e-310, -0.0, 3.0};
  s.hf_config_json = R"({"model_type": "hgrn2"})";
  return s;
}

bool equal_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Whether the folder holds exactly this snapshot.
bool holds(const std::string& dir, const Snapshot& s) {
  const size_t n = size_t(s.table->total());
  std::vector<float> master(n, 9), m(n, 9), v(n, 9);
  TrainerState state;
  verify_checkpoint(dir);
  load_checkpoint(dir, *s.table, master.data(), m.data(), v.data(), &state);
  return equal_bits(master, s.master) && equal_bits(m, s.m) && equal_bits(v, s.v) &&
         trainer_state_to_json(state) == trainer_state_to_json(s.state);
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& e : fs::directory_iterator(folder)) names.push_back(e.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

void flip_bit(const std::string& path, size_t at, int bit) {
  std::string bytes = slurp(path);
  bytes[at] = char(bytes[at] ^ (1 << bit));
  spill(path, bytes);
}

}  // namespace

TEST_CASE("a checkpoint comes back bit for bit", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table(/*tied=*/false);
  Snapshot s = make_snapshot(table, 1000, 5);
  spill(tmp / "tok.json", "{}");
  spill(tmp / "empty", "");
  s.extra_files = {{"tokenizer.json", tmp / "tok.json"}, {"merges.txt", tmp / "empty"}};
  CheckpointStore store(tmp / "run", 3);
  CHECK_FALSE(store.newest_valid(nullptr));
  const std::string dir = store.save(s);
  CHECK(dir == (tmp / "run/checkpoints/step-00001000"));
  CHECK(holds(dir, s));
  CHECK(names_in(dir) == std::vector<std::string>{"MANIFEST.json", "config.json", "merges.txt",
                                                  "model.safetensors",
                                                  "optimizer-00000-of-00001.safetensors",
                                                  "tokenizer.json", "trainer.json"});
  CHECK(slurp(dir + "/tokenizer.json") == "{}");
  CHECK(slurp(dir + "/config.json") == s.hf_config_json);
  const auto found = store.newest_valid(nullptr);
  REQUIRE(found);
  CHECK(found->dir == dir);
  CHECK(found->step == 1000);

  // The model file is plain Hugging Face: the saved shapes have no padding.
  const SafetensorsReader model(dir + "/model.safetensors");
  CHECK(model.metadata() == std::map<std::string, std::string>{{"format", "pt"}});
  CHECK(model.tensors().size() == table.params().size());
  CHECK(model.find("model.embeddings.weight")->shape == Shape{37, 8});
  CHECK(model.find("lm_head.weight")->dtype == "F32");
}

TEST_CASE("the same state gives the same bytes, and a loaded one too", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  const Snapshot s = make_snapshot(table, 7, 1);
  const std::string a = CheckpointStore(tmp / "a", 1).save(s);
  CheckpointStore async(tmp / "b", 1);
  async.save_async(Snapshot(s));
  async.wait();
  Snapshot again = s;
  const size_t n = size_t(table.total());
  again.master.assign(n, 1), again.m.assign(n, 1), again.v.assign(n, 1);
  load_checkpoint(a, table, again.master.data(), again.m.data(), again.v.data(), &again.state);
  const std::string c = CheckpointStore(tmp / "c", 1).save(again);
  const std::string b = async.folder() + "/step-00000007";
  CHECK(names_in(a).size() == 5);
  for (const std::string& name : names_in(a)) {
    CHECK(slurp(a + "/" + name) == slurp(b + "/" + name));
    CHECK(slurp(a + "/" + name) == slurp(c + "/" + name));
  }
}

TEST_CASE("trainer state keeps every bit", "[train]") {
  TrainerState s = make_snapshot(make_table(), 3, 1).state;
  const double inf = std::numeric_limits<double>::infinity();
  s.series["odd"] = {inf, -inf, std::nan(""), 5e-324, 1.7976931348623157e308};
  s.series["none"] = {};
  const TrainerState back = trainer_state_from_json(trainer_state_to_json(s), "t");
  CHECK(back.seed == s.seed);
  CHECK(back.next_sample == 24);
  CHECK(back.series.at("none").empty());
  CHECK(std::signbit(back.series.at("loss")[3]));
  CHECK(std::isnan(back.series.at("odd")[2]));
  CHECK(back.series.at("odd")[0] == inf);
  CHECK(back.series.at("odd")[3] == 5e-324);
  CHECK(back.series.at("loss")[1] == 1.0 / 3.0);
  CHECK(back.config_json.find("\"optim\"") < back.config_json.find("\"model\""));

  const std::string good = trainer_state_to_json(s);
  const auto refused = [&](const std::string& from, const std::string& to) {
    std::string bad = good;
    const size_t at = bad.find(from);
    REQUIRE(at != std::string::npos);
    bad.replace(at, from.size(), to);
    CHECK(thrown_by([&] { trainer_state_from_json(bad, "t"); }).code == Exit::data);
  };
  refused("\"step\": 3", "\"step\": -3");
  refused("\"step\": 3", "\"step\": 3.5");
  refused("\"step\": 3", "\"step\": 9223372036854775808");
  refused("\"step\": 3", "\"stop\": 3");
  refused("\"version\": 1", "\"version\": 2");
  refused("\"seed\": ", "\"seed\": -");
  refused("\"inf\"", "\"infinite\"");
  refused("\"none\": []", "\"none\": 1");
  refused("\"updates\": 2", "\"step\": 2");
  CHECK(thrown_by([&] { trainer_state_from_json("[]", "t"); }).code == Exit::data);
  s.tokens = -1;
  CHECK(thrown_by([&] { trainer_state_to_json(s); }).code == Exit::failed);
}

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

TEST_CASE("the newest k stay; incomplete ones do not count", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  CheckpointStore store(tmp.path(), 2);
  for (int64_t step : {10, 20, 30}) store.save(make_snapshot(table, step, 1));
  CHECK(names_in(store.folder()) == std::vector<std::string>{"step-00000020", "step-00000030"});
  fs::remove(store.folder() + "/step-00000030/MANIFEST.json");
  store.save(make_snapshot(table, 40, 1));
  CHECK(names_in(store.folder()) ==
        std::vector<std::string>{"step-00000020", "step-00000030", "step-00000040"});
  store.save(make_snapshot(table, 50, 1));
  CHECK(names_in(store.folder()) == std::vector<std::string>{"step-00000040", "step-00000050"});
  // Going on from an older one: what was written last stays, and so do later steps.
  store.save(make_snapshot(table, 45, 1));
  CHECK(names_in(store.folder()) ==
        std::vector<std::string>{"step-00000040", "step-00000045", "step-00000050"});
  CheckpointStore all(tmp.path(), 0);
  all.save(make_snapshot(table, 123456789, 1));
  CHECK(names_in(store.folder()).size() == 4);
  CHECK(all.newest_valid(nullptr)->step == 123456789);
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

TEST_CASE("moments of several ranks are one checkpoint, and any rank count reads them", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  const Snapshot whole = make_snapshot(table, 9, 3);
  const int64_t total = table.total();
  const std::vector<int64_t> cuts = {0, 131, 131, 333, total};  // inside weights; rank 1 owns none
  const int world = int(cuts.size()) - 1;
  std::vector<std::thread> ranks;
  for (int r = world - 1; r >= 0; --r)  // rank 0 starts last: its cleaning must spare the others
    ranks.emplace_back([&, r] {
      Snapshot s = whole;
      s.range = {cuts[size_t(r)], cuts[size_t(r) + 1]};
      s.m.assign(whole.m.begin() + s.range.begin, whole.m.begin() + s.range.end);
      s.v.assign(whole.v.begin() + s.range.begin, whole.v.begin() + s.range.end);
      if (r > 0) s.master.clear();
      if (r == 0) std::this_thread::sleep_for(std::chrono::milliseconds(50));
      CheckpointStore store(tmp.path(), 1, {r, world, "job 7", 60});
      store.save(s);
    });
  for (std::thread& t : ranks) t.join();
  const std::string dir = tmp / "checkpoints/step-00000009";
  CHECK(names_in(dir).size() == 8);
  CHECK(names_in(tmp / "checkpoints").size() == 1);
  CHECK(holds(dir, whole));
  for (int64_t begin = 0; begin < total; begin += 57)
    for (int64_t end : {begin, begin + 1, begin + 200, total}) {
      if (end > total) continue;
      const size_t n = size_t(end - begin);
      std::vector<float> m(n, 9), v(n, 9);
      load_checkpoint(dir, table, nullptr, m.data(), v.data(), nullptr, {begin, end});
      REQUIRE(equal_bits(m, {whole.m.begin() + begin, whole.m.begin() + end}));
      REQUIRE(equal_bits(v, {whole.v.begin() + begin, whole.v.begin() + end}));
    }
}

TEST_CASE("a rank that never writes is named", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  CheckpointStore store(tmp.path(), 1, {0, 2, "job", 0.05});
  const Thrown t = thrown_by([&] { store.save(make_snapshot(table, 1, 1)); });
  CHECK(t.code == Exit::failed);
  CHECK(t.has("rank 1 of 2"));
  CHECK(names_in(store.folder()).empty());
  CHECK(thrown_by([&] { CheckpointStore bad(tmp.path(), 1, {0, 2, "", 1}); }).code == Exit::failed);
}

TEST_CASE("moments that overlap, have holes or belong to another model are refused", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  const std::string dir = CheckpointStore(tmp.path(), 1).save(make_snapshot(table, 1, 1));
  const std::string file = dir + "/" + optimizer_file(0, 1);
  const SafetensorsReader old(file);
  const auto rewrite = [&](const std::string& name, int64_t shape, const std::string& slice) {
    std::vector<TensorInfo> tensors = old.tensors();
    std::map<std::string, std::string> metadata = old.metadata();
    for (TensorInfo& t : tensors)
      if (t.name == "exp_avg." + name || t.name == "exp_avg_sq." + name) t.shape = {shape};
    if (!slice.empty()) metadata["slice." + name] = slice;
    fs::remove(tmp / "new");
    SafetensorsWriter out(tmp / "new", tensors, metadata);
    for (const TensorInfo& t : tensors) {
      const std::vector<float> zeros(size_t(t.shape.numel()));
      out.write(zeros.data(), zeros.size() * 4);
    }
    out.finish();
    fs::copy_file(tmp / "new", file, fs::copy_options::overwrite_existing);
    Manifest m = manifest_from_json(slurp(dir + "/MANIFEST.json"), "m");
    m.files[optimizer_file(0, 1)] = {out.size(), out.hash()};
    spill(dir + "/MANIFEST.json", manifest_to_json(m));
    std::vector<float> moment(size_t(table.total()));
    return thrown_by(
        [&] { load_checkpoint(dir, table, nullptr, moment.data(), nullptr, nullptr); });
  };
  const std::string name = "model.norm.weight";
  CHECK(rewrite(name, 8, "").code == Exit::ok);
  CHECK(rewrite(name, 7, "0:7:8").has("end at element 7 of 8"));
  CHECK(rewrite(name, 7, "1:8:8").has("hole at element 0"));
  CHECK(rewrite(name, 7, "0:8:8").has("has shape (7)"));
  for (const char* slice : {"0:8", "0:8:9", "0:9:8", "-1:7:8", "5:4:8", "0:8:8:", "0:8:8 ", "x"})
    CHECK(rewrite(name, 8, slice).code == Exit::data);
}

TEST_CASE("weights come from any Hugging Face folder", "[train]") {
  TempFolder tmp;
  const ParamTable table = make_table();
  const Snapshot s = make_snapshot(table, 1, 6);
  const std::string dir = CheckpointStore(tmp / "run", 1).save(s);
  const auto load = [&](const std::string& from, const ParamTable& t = make_table()) {
    std::vector<float> master(size_t(t.total()), 9);
    load_weights(from, t, master.data());
    return master;
  };
  CHECK(equal_bits(load(dir), s.master));

  SECTION("in bf16, in shards") {
    const std::string folder = tmp / "bf16";
    fs::create_directory(folder);
    std::string map;
    std::vector<float> rounded(size_t(table.total()), 0.0f);
    for (const Param& p : table.params()) {
      std::vector<uint16_t> half(size_t(p.shape.numel()));
      for (size_t i = 0; i < half.size(); ++i) {
        half[i] = float_to_bf16(s.master[size_t(p.at(int64_t(i)))]);
        rounded[size_t(p.at(int64_t(i)))] = bf16_to_float(half[i]);
      }
      TensorInfo info;
      info.name = p.name, info.dtype = "BF16", info.shape = p.shape;
      SafetensorsWriter out(folder + "/" + p.name, {info}, {});
      out.write(half.data(), half.size() * 2);
      out.finish();
      map += (map.empty() ? "\"" : ",\"") + p.name + "\":\"" + p.name + "\"";
    }
    spill(folder + "/model.safetensors.index.json", "{\"weight_map\":{" + map + "}}");
    CHECK(equal_bits(load(folder), rounded));
  }
  SECTION("names and shapes must fit") {
    const auto error = [&](const std::string& from, const ParamTable& t) {
      const Thrown e = thrown_by([&] { load(from, t); });
      CHECK(e.code == Exit::data);
      return e;
    };
    const ParamTable other = make_table(/*tied=*/false);
    CHECK(error(dir, other).has("tie_word_embeddings to true"));
    const std::string untied = CheckpointStore(tmp / "untied", 1).save(make_snapshot(other, 1, 1));
    CHECK(error(untied, make_table()).has("tie_word_embeddings to false"));
    const Thrown shape = error(dir, make_table(true, 38));
    CHECK(shape.has("model.embeddings.weight has shape (37, 8), (38, 8) is expected"));
  }
}
