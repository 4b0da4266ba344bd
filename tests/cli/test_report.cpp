// hgrn report and hgrn compare from outside, on runs that hgrn train and hgrn eval left.
#include "catch.h"
#include "cli/program.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

struct Output {
  int code;
  std::string out, err;
};

Output run(const TempFolder& tmp, const std::vector<std::string>& words) {
  const std::string out = tmp / "stdout";
  std::vector<std::string> shell = {"-c", "\"$0\" \"$@\" > \"" + out + "\"", HGRN_BINARY};
  shell.insert(shell.end(), words.begin(), words.end());
  const Ended e = Program(tmp, shell, {}, "/bin/sh").wait();
  return {e.code, slurp(out), e.err};
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("report: pages and tables of real runs", "[cli]") {
  const RunFolder r;
  const std::vector<std::string> set = {"train.eval_every=4", "train.monitor_every=4"};
  REQUIRE(train(r.args("one", set)) == Exit::ok);
  REQUIRE(train(r.args("two", {"train.eval_every=4", "optim.lr=2e-2"})) == Exit::ok);
  const std::string one = r.folder / "one", two = r.folder / "two";
  REQUIRE(run(r.folder, {"eval", "--checkpoint", one, "--data", r.folder / "valid_*.bin", "--json",
                         one + "/eval.json", "--device", "cpu"})
              .code == 0);

  Output o = run(r.folder, {"report", one, two, "--out", r.folder / "both.html"});
  INFO(o.err);
  REQUIRE(o.code == 0);
  CHECK(o.out.rfind(r.folder / "both.html (", 0) == 0);
  const std::string page = slurp(r.folder / "both.html");
  for (const char* part : {"<!DOCTYPE html>", "optim.lr", "perplexity, blocks of 20 (eval.json)",
                           "\"gate\":[0.", "2 runs"})
    CHECK(holds(page, part));
  CHECK(run(r.folder, {"report", one}).code == 0);  // into the run folder
  CHECK(holds(slurp(one + "/report.html"), "<title>one - hgrn report"));

  o = run(r.folder, {"compare", one, two + "/metrics.jsonl"});
  INFO(o.out);
  CHECK(o.code == 0);
  CHECK(holds(o.out, "best valid"));
  CHECK(holds(o.out, "nll a token: perplexity, blocks of 20 (eval.json)"));
  CHECK_FALSE(holds(o.out, "\x1b"));  // not a terminal

  CHECK(run(r.folder, {"report", r.folder / "none"}).code == 3);
  CHECK(run(r.folder, {"report"}).code == 2);
  o = run(r.folder, {"compare", one, "--eval", r.folder / "config.json"});
  CHECK(o.code == 3);
  CHECK(holds(o.err, "not a result of hgrn eval --json"));
  o = run(r.folder, {"train", "--config", r.folder / "config.json", "--out", r.folder / "three",
                     "--device", "cpu", "--prometheus", "/nonexistent/x.prom"});
  CHECK(o.code == 2);
  CHECK(holds(o.err, "--collector.textfile.directory"));
}
