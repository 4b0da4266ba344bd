// Checkpoints: what is saved comes back, bit for bit, from any number of ranks; which ones stay;
// and weights from other folders. test_checkpoint_faults.cpp has kills, damage and full disks.
#include "train/checkpoint.h"

#include <chrono>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "catch.h"
#include "model/safetensors.h"
#include "train/manifest.h"
#include "train/snapshot.h"

using namespace hgrn;
using namespace hgrn::test;
namespace fs = std::filesystem;

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
