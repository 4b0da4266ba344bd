// Going on from an older checkpoint: the later ones of the branch that was left are kept aside,
// and never win the next resume, whenever the process ends.
#include <algorithm>
#include <filesystem>

#include "catch.h"
#include "core/file.h"
#include "train/checkpoint_folder.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;
namespace fs = std::filesystem;

namespace {

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& e : fs::directory_iterator(folder)) names.push_back(e.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

using Names = std::vector<std::string>;

// A run with checkpoints 3, 6, 9, 12.
struct LongRun : RunFolder {
  LongRun() { train(every3("run")); }
  TrainArgs every3(const std::string& out, std::vector<std::string> more = {}) const {
    more.insert(more.end(), {"train.checkpoint_every=3", "train.keep_checkpoints=10"});
    return args(out, more);
  }
  TrainArgs from(const std::string& out, const std::string& dir, int64_t stop = -1) const {
    TrainArgs a = every3(out);
    a.resume = dir;
    a.stop_after = stop;
    return a;
  }
  std::string step(const std::string& number) const {
    return folder / ("run/checkpoints/step-000000" + number);
  }
  const std::string checkpoints = folder / "run/checkpoints";
};

int64_t newest(const std::string& run) {
  const auto found = CheckpointStore(run, 0).newest_valid(nullptr);
  return found ? found->step : -1;
}

}  // namespace

TEST_CASE("branch: the next automatic resume goes on from what was chosen", "[train]") {
  const LongRun r;
  const std::string model12 = r.file("run", "00000012"),
                    metrics = slurp(r.folder / "run/metrics.jsonl");
  REQUIRE(train(r.from("run", r.step("06"), 7)) == Exit::ok);
  CHECK(names_in(r.checkpoints) ==
        Names{"abandoned-1", "step-00000003", "step-00000006", "step-00000007"});
  CHECK(newest(r.folder / "run") == 7);
  // Nothing is lost: the later ones and the metrics of their steps are whole.
  CHECK(names_in(r.checkpoints + "/abandoned-1") ==
        Names{"metrics.jsonl", "step-00000009", "step-00000012"});
  CHECK(verify_checkpoint(r.checkpoints + "/abandoned-1/step-00000012") == 12);
  CHECK(slurp(r.checkpoints + "/abandoned-1/step-00000012/model.safetensors") == model12);
  CHECK(slurp(r.checkpoints + "/abandoned-1/metrics.jsonl") == metrics);

  REQUIRE(train(r.every3("run")) == Exit::ok);  // auto: from 7
  CHECK(r.file("run", "00000012") == model12);  // the same mathematics, so the same end

  // Back to the branch that was left: now it is the other one that goes aside, all of it.
  REQUIRE(train(r.from("run", r.checkpoints + "/abandoned-1/step-00000009/")) == Exit::ok);
  CHECK(names_in(r.checkpoints) ==
        Names{".started-from", "abandoned-1", "abandoned-2", "step-00000009", "step-00000012"});
  CHECK(names_in(r.checkpoints + "/abandoned-2").size() == 6);  // 3 6 7 9 12 and the metrics
  CHECK(r.file("run", "00000012") == model12);
}

TEST_CASE("branch: the newest checkpoint moves nothing", "[train]") {
  const LongRun r;
  REQUIRE(train(r.from("run", r.step("12"))) == Exit::ok);
  REQUIRE(train(r.from("run", r.folder / "run")) == Exit::ok);
  REQUIRE(train(r.every3("run")) == Exit::ok);
  CHECK(names_in(r.checkpoints).size() == 4);
}

TEST_CASE("branch: a damaged newer checkpoint cannot come back to life later", "[train]") {
  const LongRun r;
  const std::string model = r.step("12") + "/model.safetensors", good = slurp(model);
  spill(model, good.substr(1));
  TrainArgs next = r.every3("run");
  next.stop_after = 10;
  REQUIRE(train(next) == Exit::ok);  // from 9
  CHECK(names_in(r.checkpoints + "/abandoned-1") == Names{"metrics.jsonl", "step-00000012"});
  CHECK(newest(r.folder / "run") == 10);
}

TEST_CASE("branch: a checkpoint of elsewhere becomes this run's first at once", "[train]") {
  const LongRun r;
  REQUIRE(train(r.from("copy", r.step("06"), 6)) == Exit::ok);  // not a step further
  CHECK(names_in(r.folder / "copy/checkpoints") == Names{".started-from", "step-00000006"});
  CHECK(r.file("copy", "00000006") == r.file("run", "00000006"));
  CHECK(r.file("copy", "00000006", "trainer.json") == r.file("run", "00000006", "trainer.json"));
  REQUIRE(train(r.every3("copy")) == Exit::ok);
  CHECK(r.file("copy", "00000012") == r.file("run", "00000012"));

  // Dead before that first save: never a silent start from step 0.
  const Child child = run_in_child([&] {
    ::setenv("HGRN_FAULT", "save.before-rename", 1);
    train(r.from("early", r.step("06")));
  });
  REQUIRE(child.killed());
  const Thrown t = thrown_by([&] { train(r.every3("early")); });
  CHECK(t.code == Exit::data);
  CHECK(t.has(r.step("06")));
  REQUIRE(train(r.from("early", r.step("06"))) == Exit::ok);
  CHECK(r.file("early", "00000012") == r.file("run", "00000012"));
}

TEST_CASE("branch: a kill at any point leaves the run as it was or as it was to be", "[train]") {
  const LongRun r;
  struct Point {
    const char* fault;
    int64_t newest;  // while nobody has started the run again
    size_t to_come;  // checkpoints that still have to move
  };
  const std::vector<Point> points = {{"abandon.after-note", 3, 3},
                                     {"abandon.after-rename", 3, 2},
                                     {"abandon.after-rename:2", 3, 1},
                                     {"abandon.after-rename:3", 3, 0},
                                     {"abandon.before-end", 3, 0}};
  for (const Point& p : points) {
    INFO(p.fault);
    const std::string run = r.folder / "killed";
    fs::remove_all(run);
    fs::copy(r.folder / "run", run, fs::copy_options::recursive);
    const std::string checkpoints = run + "/checkpoints";
    const Child child = run_in_child([&] {
      ::setenv("HGRN_FAULT", p.fault, 1);
      train(r.from("killed", checkpoints + "/step-00000003"));
    });
    REQUIRE(child.killed());
    CHECK(newest(run) == p.newest);  // also for readers that do not own the folder
    size_t left = 0;
    for (const std::string& name : names_in(checkpoints)) left += step_of(name) > 3;
    CHECK(left == p.to_come);
    TrainArgs next = r.every3("killed");
    next.stop_after = 4;
    REQUIRE(train(next) == Exit::ok);
    CHECK(names_in(checkpoints) == Names{"abandoned-1", "step-00000003", "step-00000004"});
    CHECK(names_in(checkpoints + "/abandoned-1") ==
          Names{"metrics.jsonl", "step-00000006", "step-00000009", "step-00000012"});
    for (const char* step : {"06", "09", "12"})
      CHECK(verify_checkpoint(checkpoints + "/abandoned-1/step-000000" + step) == std::stoi(step));
  }
}

TEST_CASE("branch: a refused resume moves nothing", "[train]") {
  const LongRun r;
  TrainArgs a = r.from("run", r.step("06"));
  a.overrides.push_back("optim.lr=1");
  CHECK(thrown_by([&] { train(a); }).code == Exit::usage);
  spill(r.step("06") + "/trainer.json", "{}");
  CHECK(thrown_by([&] { train(r.from("run", r.step("06"))); }).code == Exit::data);
  CHECK(names_in(r.checkpoints).size() == 4);
  CHECK(newest(r.folder / "run") == 12);
}

TEST_CASE("branch: a damaged note is named", "[train]") {
  const LongRun r;
  for (const char* text :
       {"", "{}", R"({"after": 3, "into": "../x"})", R"({"after": 3, "into": "x"})"}) {
    spill(r.checkpoints + "/.abandoning.json", text);
    const Thrown t = thrown_by([&] { train(r.every3("run")); });
    CHECK(t.code == Exit::data);
    CHECK(t.has(".abandoning.json"));
  }
}

TEST_CASE("branch: names of checkpoints", "[train]") {
  CHECK(step_of("step-00000012") == 12);
  CHECK(step_of("step-123456789012") == 123456789012);
  CHECK(checkpoint_step_of(".replaced-step-00000012") == 12);
  for (const char* name : {"step-12", "step-000000012", "step-", "step-0000001x",
                           ".tmp-step-00000012", "step-99999999999999999999", "abandoned-1"})
    CHECK(checkpoint_step_of(name) == -1);
}
