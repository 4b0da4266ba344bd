// `hgrn launch` from outside: lines, logs, codes, signals, restarts, and that nothing outlives it.
#include <poll.h>
#include <pthread.h>

#include <atomic>
#include <csignal>
#include <set>
#include <thread>

#include "catch.h"
#include "launch/child.h"
#include "launch/run_ranks.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

// A run that goes on for minutes, with a checkpoint every second step.
const std::vector<std::string> kLong = {"train.steps=100000", "train.checkpoint_every=2",
                                        "train.micro_batch=1"};

std::vector<std::string> steps(int n, int every = 2) {
  return {"train.steps=" + std::to_string(n), "train.checkpoint_every=" + std::to_string(every),
          "train.micro_batch=1"};
}

}  // namespace

TEST_CASE("launch: lines carry their rank, each rank has a log file", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  Process p = r.launch(2, "run", steps(3), {"--standalone", "--log-dir", r.folder / "logs"});
  CHECK(p.wait() == 0);
  std::istringstream lines(p.output());
  for (std::string line; std::getline(lines, line);) CHECK(line.rfind("[rank 0] ", 0) == 0);
  CHECK(p.says("step 3/3"));
  CHECK(slurp(r.folder / "logs/rank-0.log").find("step 3/3") != std::string::npos);
  CHECK(std::filesystem::exists(r.folder / "logs/rank-1.log"));
  CHECK(r.nobody_left("run"));
}

TEST_CASE("launch: wrong options are exit 2", "[launch]") {
  const TempFolder tmp;
  auto usage = [&](const std::vector<std::string>& words, const std::string& part) {
    Process p(program(), words, {}, tmp / "out");
    CHECK(p.wait() == 2);
    INFO(p.output());
    CHECK(p.says(part));
  };
  usage({"launch"}, "after --");
  usage({"launch", "--", "eval"}, "after --");
  usage({"launch", "--nnodes", "2", "--", "train"}, "--master-addr");
  usage({"launch", "--standalone", "--nnodes", "2", "--", "train"}, "--standalone");
  usage({"launch", "--nnodes", "2", "--node-rank", "2", "--master-addr", "x", "--", "train"},
        "--node-rank 2");
  usage({"launch", "--nproc-per-nod", "2", "--", "train"}, "did you mean --nproc-per-node?");
}

TEST_CASE("launch: the ranks' code comes back", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  const double began = monotonic_s();
  Process usage = r.launch(3, "a", {"train.micro_batch=3"}, {"--max-restarts", "3"});
  CHECK(usage.wait() == 2);  // never started again
  CHECK(usage.says("the nearest that is: 9"));
  CHECK_FALSE(usage.says("restart"));
  Process data = r.launch(2, "b", {"data.train=/no/such.bin"}, {"--max-restarts", "3"});
  CHECK(data.wait() == 3);
  CHECK_FALSE(data.says("restart"));
  CHECK(monotonic_s() - began < 20);
}

TEST_CASE("launch: kill -9 of any rank ends the others, named, within ten seconds", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  for (int victim : {0, 2}) {
    const std::string out = "run" + std::to_string(victim);
    Process p =
        r.launch(3, out, {"train.steps=100000", "train.micro_batch=1", "train.global_batch=6"});
    REQUIRE(p.wait_for_text("step      4/"));
    const auto ranks = rank_pids(r.folder / out);
    REQUIRE(ranks.size() == 3);
    const double began = monotonic_s();
    ::kill(ranks.at(victim), SIGKILL);
    CHECK(p.wait(15) == 1);
    CHECK(monotonic_s() - began < 10);
    INFO(p.output());
    CHECK(p.says("rank " + std::to_string(victim) + " (pid"));    // by the launcher
    CHECK(p.says("rank " + std::to_string(victim) + " of 3 ("));  // by the other ranks
    CHECK(p.says("without a word"));
    CHECK(r.nobody_left(out));
  }
}

TEST_CASE("launch: a rank that hangs is found and named", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  std::vector<Process> runs;  // side by side: each waits out its limits
  for (int victim : {0, 1}) {
    const std::string out = "run" + std::to_string(victim);
    runs.push_back(r.launch(2, out, kLong, {}, {{"HGRN_RANK_TIMEOUT", "1.5"}}));
    REQUIRE(runs.back().wait_for_text("step      4/"));
    const auto ranks = rank_pids(r.folder / out);
    REQUIRE(ranks.size() == 2);
    ::kill(ranks.at(victim), SIGSTOP);
  }
  for (int victim : {0, 1}) {
    Process& p = runs[size_t(victim)];
    CHECK(p.wait(25) == 1);
    INFO(p.output());
    CHECK(p.says("rank " + std::to_string(victim) + " of 2 ("));
    CHECK(p.says("has said nothing for 1.5 s"));
    CHECK(r.nobody_left("run" + std::to_string(victim)));
  }
}

// The connections of a stopped rank stay, so nothing but the collective tells.
TEST_CASE("launch: a collective that does not end is given up", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  Process p = r.launch(2, "run", kLong, {},
                       {{"HGRN_RANK_TIMEOUT", "600"}, {"HGRN_COLLECTIVE_TIMEOUT", "2"}});
  REQUIRE(p.wait_for_text("step      4/"));
  const auto ranks = rank_pids(r.folder / "run");
  REQUIRE(ranks.size() == 2);
  ::kill(ranks.at(1), SIGSTOP);
  CHECK(p.wait(25) == 1);
  INFO(p.output());
  CHECK(p.says("rank 0 of 2: a collective failed"));
  CHECK(r.nobody_left("run"));
}

TEST_CASE("launch: kill -9 of the launcher takes the ranks with it", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  Process p = r.launch(2, "run", kLong);
  REQUIRE(p.wait_for_text("step      2/"));
  REQUIRE(rank_pids(r.folder / "run").size() == 2);
  p.signal(SIGKILL);
  CHECK(p.wait() == -SIGKILL);
  CHECK(r.nobody_left("run"));
}

// As drivers' and profilers' threads do, which start before main().
TEST_CASE("launch: signals come through whichever thread the kernel gives them to", "[launch]") {
  std::atomic<bool> over{false};
  std::thread other([&] {
    while (!over) sleep_ms(1);
  });
  {
    const SignalFd signals;
    CHECK(signals.next() == 0);
    pthread_kill(other.native_handle(), SIGTERM);
    pollfd p = {signals.get(), POLLIN, 0};
    CHECK(eventually(10, [&] { return ::poll(&p, 1, 100) == 1; }));
    CHECK(signals.next() == SIGTERM);
    CHECK(signals.next() == 0);
    pthread_kill(other.native_handle(), SIGUSR1);
    pthread_kill(other.native_handle(), SIGHUP);
    std::set<int> both;
    CHECK(eventually(10, [&] {
      if (const int number = signals.next()) both.insert(number);
      return both.size() == 2;
    }));
    CHECK(both == std::set<int>{SIGUSR1, SIGHUP});
  }
  over = true;
  other.join();
}

TEST_CASE("launch: SIGTERM saves on all ranks at one step and ends with 75", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  CHECK(r.launch(2, "whole", steps(40)).wait() == 0);
  Process p = r.launch(2, "run", steps(40), {"--max-restarts", "3"});
  REQUIRE(p.wait_for_text("step  3/"));
  p.signal(SIGTERM);
  CHECK(p.wait() == 75);
  INFO(p.output());
  CHECK(p.says("stopped by signal 15"));
  CHECK_FALSE(p.says("restart"));
  CHECK(r.nobody_left("run"));
  // One rank alone is asked: all stop, at the same step.
  Process q = r.launch(2, "run", steps(40));
  REQUIRE(q.wait_for_text("step 12/"));
  const auto ranks = rank_pids(r.folder / "run");
  REQUIRE(ranks.size() == 2);
  ::kill(ranks.at(1), SIGUSR1);
  CHECK(q.wait() == 75);
  CHECK(r.launch(2, "run", steps(40)).wait() == 0);
  CHECK(r.file("run", "00000040").size() > 1000);
  CHECK(r.file("run", "00000040") == r.file("whole", "00000040"));
}

TEST_CASE("launch: --max-restarts goes on from the newest checkpoint", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  CHECK(r.launch(2, "whole", steps(24)).wait() == 0);
  // Rank 0 is killed again and again, in its fourth save after each start.
  Process p = r.launch(2, "run", steps(24), {"--max-restarts", "20"},
                       {{"HGRN_FAULT", "save.before-rename:4"}});
  CHECK(p.wait(90) == 0);
  INFO(p.output());
  CHECK(p.says("restart 2 of 20"));
  CHECK(p.says("resumed from"));
  CHECK(r.file("run", "00000024").size() > 1000);
  CHECK(r.file("run", "00000024") == r.file("whole", "00000024"));
  CHECK(r.losses("run") == r.losses("whole"));
  Process never =
      r.launch(2, "never", steps(8), {"--max-restarts", "1"}, {{"HGRN_FAULT", "save.begin:1"}});
  CHECK(never.wait() == 1);  // no checkpoint ever comes about: it gives up
  CHECK(never.says("restart 1 of 1"));
}
