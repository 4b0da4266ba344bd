// Small real runs for tests: shards, a config file, and the trainer on them.
#pragma once
#include <string>
#include <vector>

#include "core/rng.h"
#include "temp_folder.h"
#include "text/shard.h"
#include "train/trainer.h"

namespace hgrn::test {

// Text-like tokens: each mostly follows from the one before, so that there is something to learn.
inline std::vector<int32_t> learnable_tokens(int64_t count, int32_t vocab, uint64_t seed) {
  std::vector<int32_t> out;
  int32_t token = 1;
  for (int64_t i = 0; i < count; ++i) {
    const Philox r = philox(seed, 0, uint64_t(i));
    token = r.v[0] % 8 == 0 ? int32_t(r.v[1] % uint32_t(vocab)) : (token * 5 + 3) % vocab;
    out.push_back(token);
  }
  return out;
}

inline void write_shard(const std::string& path, const std::vector<int32_t>& tokens) {
  ShardWriter w(path, /*wide=*/false);
  w.append(tokens);
  w.finish();
}

struct RunFolder {
  TempFolder folder;
  explicit RunFolder(const std::string& more_model = "") {
    write_shard(folder / "train_000000.bin", learnable_tokens(4001, 31, 1));
    write_shard(folder / "train_000001.bin", learnable_tokens(2001, 31, 2));
    write_shard(folder / "valid_000000.bin", learnable_tokens(301, 31, 3));
    spill(folder / "config.json", R"({
      "model": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8,
                "intermediate_size": 24, "eos_token_id": 0)" +
                                      more_model + R"(},
      "data": {"train": ")" + (folder / "train_*.bin") +
                                      R"(", "valid": ")" + (folder / "valid_*.bin") +
                                      R"(", "seq_len": 20},
      "optim": {"lr": 1e-2, "warmup_steps": 3, "schedule": "cosine"},
      "train": {"steps": 12, "global_batch": 4, "micro_batch": 2, "precision": "fp32",
                "log_every": 1, "eval_every": 0, "checkpoint_every": 0}})");
  }
  TrainArgs args(const std::string& out, std::vector<std::string> overrides = {}) const {
    TrainArgs a;
    a.config = folder / "config.json";
    a.out = folder / out;
    a.device = Device::cpu;
    a.overrides = std::move(overrides);
    return a;
  }
  std::string file(const std::string& run, const std::string& step,
                   const std::string& name = "model.safetensors") const {
    return slurp(folder / (run + "/checkpoints/step-" + step + "/" + name));
  }
};

inline Exit train(const TrainArgs& args) {
  return Trainer(args).run();
}

}  // namespace hgrn::test
