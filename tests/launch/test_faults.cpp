// What goes wrong between ranks that nobody launched: other configs, late ones, busy ports, full
// disks, other file systems; and the launchers of others.
#include <csignal>

#include "catch.h"
#include "launch/run_ranks.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

const std::vector<std::string> kShort = {"train.steps=6", "train.checkpoint_every=2",
                                         "train.micro_batch=1"};

}  // namespace

TEST_CASE("faults: a rank with another config stops all with exit 2", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  const int port = free_port();
  Process a = r.rank(0, 2, port, r.train_words("run", {"train.micro_batch=1"}));
  Process b = r.rank(1, 2, port, r.train_words("run", {"train.micro_batch=2"}));
  CHECK(a.wait() == 2);
  CHECK(b.wait() == 2);
  for (const Process* p : {&a, &b}) {
    INFO(p->output());
    CHECK(p->says("rank 1 of 2 ("));
    CHECK(p->says("another config"));
  }
}

TEST_CASE("faults: a rank that runs ahead among ranks that do not stops all with exit 2",
          "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  const int port = free_port();
  Process a = r.rank(0, 2, port, r.train_words("run", kShort));
  Process b = r.rank(1, 2, port, r.train_words("run", kShort), {{"HGRN_RUN_AHEAD", "1"}});
  CHECK(a.wait() == 2);
  CHECK(b.wait() == 2);
  INFO(b.output());
  CHECK(b.says("HGRN_RUN_AHEAD"));
}

TEST_CASE("faults: a late rank is waited for, one that never comes is named", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  int port = free_port();
  {
    Process b = r.rank(1, 2, port, r.train_words("run", kShort));  // before rank 0
    sleep_ms(500);
    Process a = r.rank(0, 2, port, r.train_words("run", kShort));
    CHECK(a.wait() == 0);
    CHECK(b.wait() == 0);
  }
  port = free_port();
  Process a = r.rank(0, 3, port, r.train_words("run", {"train.global_batch=6"}),
                     {{"HGRN_JOIN_TIMEOUT", "1"}});
  CHECK(a.wait() == 1);
  INFO(a.output());
  CHECK(a.says("missing: 1, 2"));
}

TEST_CASE("faults: a port in use is named", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  const Fd busy = listen_on("127.0.0.1", 0);
  Process a = r.rank(0, 2, port_of(busy), r.train_words("run"));
  CHECK(a.wait() == 1);
  INFO(a.output());
  CHECK(a.says("127.0.0.1:" + std::to_string(port_of(busy))));
  CHECK(a.says("the port is in use: choose another MASTER_PORT"));
}

TEST_CASE("faults: ranks that see different folders do not start", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  const int port = free_port();
  Process a = r.rank(0, 2, port, r.train_words("here"));
  Process b = r.rank(1, 2, port, r.train_words("there"));
  CHECK(a.wait() == 3);
  CHECK(b.wait() == 3);
  INFO(a.output());
  CHECK(a.says("rank(s) 1 of 2 do not see"));
  CHECK_FALSE(exists(r.folder / "here/checkpoints"));
}

TEST_CASE("faults: ranks with other data do not start", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  const int port = free_port();
  // The path is the same; what lies there differs, as it may between machines.
  std::filesystem::create_directory(r.folder / "one");
  std::filesystem::create_directory(r.folder / "two");
  write_shard(r.folder / "one/x.bin", learnable_tokens(4001, 31, 1));
  write_shard(r.folder / "two/x.bin", learnable_tokens(3001, 31, 1));
  std::vector<Process> ranks;
  for (const char* dir : {"one", "two"}) {
    std::string words = "cd '" + (r.folder / dir) + "'; exec \"$@\"";
    std::vector<std::string> all = {"-c", words, "sh", program()};
    for (const std::string& w : r.train_words("run", {"data.train=x.bin", "train.micro_batch=1"}))
      all.push_back(w);
    const int rank = int(ranks.size());
    ranks.emplace_back("sh", all,
                       RankRuns::env({{"RANK", std::to_string(rank)},
                                      {"WORLD_SIZE", "2"},
                                      {"MASTER_ADDR", "127.0.0.1"},
                                      {"MASTER_PORT", std::to_string(port)}}),
                       r.log("rank" + std::to_string(rank)));
  }
  for (Process& p : ranks) {
    CHECK(p.wait() == 3);
    INFO(p.output());
    CHECK(p.says("rank(s) 1 of 2 have other training data"));
  }
}

TEST_CASE("faults: a full disk on one rank ends the run; the checkpoint before stays", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  CHECK(r.launch(2, "run", kShort).wait() == 0);  // 2, 4, 6
  const int port = free_port();
  const std::vector<std::string> more = {"train.steps=12", "train.checkpoint_every=2",
                                         "train.micro_batch=1"};
  Process a = r.rank(0, 2, port, r.train_words("run", more));
  // Files of rank 1 end after 4 KiB.
  std::vector<std::string> words = {"-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh",
                                    program()};
  for (const std::string& w : r.train_words("run", more)) words.push_back(w);
  Process b("sh", words,
            RankRuns::env({{"RANK", "1"},
                           {"WORLD_SIZE", "2"},
                           {"MASTER_ADDR", "127.0.0.1"},
                           {"MASTER_PORT", std::to_string(port)}}),
            r.log("full"));
  CHECK(b.wait() == 1);
  CHECK(a.wait(20) == 1);
  INFO(a.output() << b.output());
  CHECK(b.says("optimizer-00001-of-00002.safetensors"));
  CHECK(a.says("rank 1 of 2"));
  CHECK(exists(r.folder / "run/checkpoints/step-00000006/MANIFEST.json"));
  CHECK_FALSE(exists(r.folder / "run/checkpoints/step-00000008/MANIFEST.json"));
  CHECK(r.launch(2, "run", more).wait() == 0);
  CHECK(exists(r.folder / "run/checkpoints/step-00000012/MANIFEST.json"));
}

TEST_CASE("faults: a damaged newest checkpoint is passed over on all ranks alike", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  const std::vector<std::string> eight = {"train.steps=8", "train.checkpoint_every=2",
                                          "train.micro_batch=1"};
  CHECK(r.launch(2, "run", eight).wait() == 0);
  const std::string want = r.file("run", "00000008");
  const std::string part =
      r.folder / "run/checkpoints/step-00000008/optimizer-00001-of-00002.safetensors";
  std::string bytes = slurp(part);
  bytes[bytes.size() / 2] = char(bytes[bytes.size() / 2] ^ 4);
  spill(part, bytes);
  spill(r.folder / "run/checkpoints/step-00000008/model.safetensors", "");
  Process p = r.launch(2, "run", eight);
  CHECK(p.wait() == 0);
  INFO(p.output());
  CHECK(p.says("not resumed from"));
  CHECK(p.says("step-00000006 at step 6"));
  CHECK(want.size() > 1000);
  CHECK(r.file("run", "00000008") == want);
}

// ---- the launchers of others

TEST_CASE("launchers: Slurm's variables", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  const int port = free_port();
  std::vector<Process> ranks;
  for (int rank = 0; rank < 2; ++rank)
    ranks.emplace_back(program(), r.train_words("run", kShort),
                       RankRuns::env({{"SLURM_PROCID", std::to_string(rank)},
                                      {"SLURM_NTASKS", "2"},
                                      {"SLURM_LOCALID", std::to_string(rank)},
                                      {"SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"},
                                      {"MASTER_PORT", std::to_string(port)}}),
                       r.log("rank" + std::to_string(rank)));
  for (Process& p : ranks) {
    INFO(p.output());
    CHECK(p.wait() == 0);
  }
  CHECK(r.losses("run").size() == 6);
}

// scripts/slurm/train.sbatch with stand-ins for Slurm's programs, which do what the script counts
// on.
TEST_CASE("launchers: the batch script of Slurm queues a stopped job again", "[launch]") {
  NEEDS_GLOO();
  const RankRuns r;
  for (const char* dir : {"bin", "build"}) std::filesystem::create_directory(r.folder / dir);
  std::filesystem::create_symlink(program(), r.folder / "build/hgrn");
  spill(r.folder / "bin/scontrol", R"(#!/bin/sh
case "$*" in "show hostnames two") echo 127.0.0.1; echo elsewhere ;; *) echo "scontrol $*" ;; esac
)");
  spill(r.folder / "bin/srun", R"(#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & ranks+=($!); done
trap 'kill -TERM "${ranks[@]}"' TERM
worst=0
for p in "${ranks[@]}"; do
  wait "$p"; code=$?
  while kill -0 "$p" 2>/dev/null; do wait "$p"; code=$?; done
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
)");
  for (const char* name : {"bin/scontrol", "bin/srun"})
    std::filesystem::permissions(r.folder / name, std::filesystem::perms::owner_all);
  const auto job = [&](const std::string& log, const std::vector<std::string>& set) {
    std::vector<std::string> words = {"-c", "cd '" + (r.folder / "") + "' && exec bash \"$@\"",
                                      "sh", HGRN_SOURCE_DIR "/scripts/slurm/train.sbatch"};
    const std::vector<std::string> train = r.train_words("run", set);
    words.insert(words.end(), train.begin() + 1, train.end());
    return Process("sh", words,
                   RankRuns::env({{"PATH", (r.folder / "bin") + ":" + std::getenv("PATH")},
                                  {"SLURM_JOB_NODELIST", "two"},
                                  {"SLURM_JOB_ID", std::to_string(::getpid())},
                                  {"SLURM_CPUS_PER_TASK", "1"},
                                  {"SLURM_NTASKS", "2"}}),
                   r.log(log));
  };
  Process stopped = job("stopped", {"train.steps=100000", "train.micro_batch=1"});
  REQUIRE(stopped.wait_for_text("step      4/"));
  stopped.signal(SIGTERM);
  CHECK(stopped.wait() == 0);
  INFO(stopped.output());
  CHECK(stopped.says("stopped by signal 15"));
  CHECK(stopped.says("scontrol requeue " + std::to_string(::getpid())));
  const int done = int(r.losses("run").size());
  const std::string last = std::to_string(done + 3);
  Process on = job("on", {"train.steps=" + last, "train.micro_batch=1"});
  CHECK(on.wait() == 0);
  CHECK(on.says("at step " + std::to_string(done)));
  CHECK_FALSE(on.says("requeue"));
  CHECK(int(r.losses("run").size()) == done + 3);
  Process wrong = job("wrong", {"train.micro_batch=3"});
  CHECK(wrong.wait() == 2);  // its code is the job's: nothing to queue again
  CHECK_FALSE(wrong.says("requeue"));
}

TEST_CASE("launchers: mpirun", "[launch]") {
  NEEDS_GLOO();
  if (!has_program("mpirun")) {
    WARN("skipped: mpirun is not installed (openmpi-bin)");
    return;
  }
  const RankRuns r;
  std::vector<std::string> words = {"-n", "2", "--oversubscribe", "--allow-run-as-root", program()};
  for (const std::string& w : r.train_words("run", kShort)) words.push_back(w);
  Process p("mpirun", words, RankRuns::env({{"MASTER_PORT", std::to_string(free_port())}}),
            r.log("run"));
  CHECK(p.wait() == 0);
  INFO(p.output());
  CHECK(p.says("gloo, 2 ranks"));
  CHECK(r.losses("run").size() == 6);
}

TEST_CASE("launchers: torchrun --no-python", "[launch]") {
  NEEDS_GLOO();
  if (!has_program("torchrun")) {
    WARN("skipped: torchrun is not installed (python3-torch)");
    return;
  }
  const RankRuns r;
  const std::string port = std::to_string(free_port());
  // Redirections are named rank by rank since torchrun 1.13 under Python 3.11 reads no plain "0".
  std::vector<std::string> words = {"--no_python",
                                    "--nproc_per_node=2",
                                    "--nnodes=1",
                                    "--redirects=0:1,1:1",
                                    "--tee=0:1,1:1",
                                    "--master_addr=127.0.0.1",
                                    "--master_port=" + port,
                                    program()};
  for (const std::string& w : r.train_words("run", kShort)) words.push_back(w);
  Process p("torchrun", words, RankRuns::env(), r.log("run"));
  CHECK(p.wait() == 0);
  INFO(p.output());
  CHECK(p.says("gloo, 2 ranks"));
  CHECK(r.losses("run").size() == 6);
}
