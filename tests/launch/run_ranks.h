// Small runs of several CPU ranks, through the launcher or one by one.
#pragma once
#include <memory>
#include <sstream>

#include "catch.h"
#include "launch/process.h"
#include "ops/comm.h"
#include "train/run_folder.h"

// The rest of the test is left out, with a message, in a build without Gloo.
#define NEEDS_GLOO()                                                             \
  if (!hgrn::gloo_built()) {                                                     \
    WARN("skipped: built without Gloo (libgloo-dev), so CPU ranks cannot talk"); \
    return;                                                                      \
  }

namespace hgrn::test {

struct RankRuns : RunFolder {
  // Dropout is on, so that a sample that comes back as another is seen in the loss.
  RankRuns() : RunFolder(R"(, "dropout": 0.1)") {}
  std::string device = "cpu";

  std::vector<std::string> train_words(const std::string& out,
                                       const std::vector<std::string>& set = {}) const {
    std::vector<std::string> words = {
        "train", "--config", folder / "config.json", "--out", folder / out, "--device", device};
    for (const std::string& s : set) words.insert(words.end(), {"--set", s});
    return words;
  }
  // Several buckets even in a model as small as this.
  static Env env(Env more = {}) {
    more.insert({"HGRN_BUCKET_ELEMENTS", "1500"});
    more.insert({"HGRN_JOIN_TIMEOUT", "30"});
    return more;
  }
  Process launch(int ranks, const std::string& out, const std::vector<std::string>& set = {},
                 const std::vector<std::string>& flags = {}, const Env& more = {}) const {
    std::vector<std::string> words = {"launch", "--nproc-per-node", std::to_string(ranks)};
    words.insert(words.end(), flags.begin(), flags.end());
    words.push_back("--");
    for (const std::string& w : train_words(out, set)) words.push_back(w);
    return Process(program(), words, env(more), log(out));
  }
  std::string log(const std::string& out) const { return folder / (out + ".out"); }
  // One rank without a launcher.
  Process rank(int rank, int world, int port, std::vector<std::string> words, Env more = {}) const {
    more.insert({{"RANK", std::to_string(rank)},
                 {"WORLD_SIZE", std::to_string(world)},
                 {"LOCAL_RANK", std::to_string(rank)},
                 {"MASTER_ADDR", "127.0.0.1"},
                 {"MASTER_PORT", std::to_string(port)}});
    return Process(program(), words, env(more), log("rank" + std::to_string(rank)));
  }
  std::vector<double> losses(const std::string& run) const {
    std::vector<double> out;
    std::istringstream in(slurp(folder / (run + "/metrics.jsonl")));
    for (std::string line; std::getline(in, line);)
      if (const size_t at = line.find("\"loss\":"); at != std::string::npos)
        out.push_back(std::atof(line.c_str() + at + 7));
    return out;
  }
  bool nobody_left(const std::string& out) const {
    return eventually(5, [&] { return processes_with(folder / out + " ").empty(); });
  }
};

}  // namespace hgrn::test
