// A small byte-level checkpoint with random weights, for the tests of evaluation and generation.
#pragma once
#include <string>

#include "eval/load.h"
#include "train/run_folder.h"

namespace hgrn::test {

// A byte model whose weights are random and large enough that context matters.
struct ByteModel {
  TempFolder folder;
  std::string dir;
  ByteModel() {
    write_shard(folder / "t_000000.bin", learnable_tokens(2000, 256, 1));
    spill(folder / "c.json", R"({
      "model": {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8,
                "intermediate_size": 24, "initializer_range": 0.3},
      "data": {"train": ")" + (folder / "t_*.bin") +
                                 R"(", "tokenizer": "byte", "seq_len": 50},
      "train": {"steps": 0, "global_batch": 1, "micro_batch": 1, "precision": "fp32"}})");
    TrainArgs a;
    a.config = folder / "c.json";
    a.out = folder / "run";
    a.device = Device::cpu;
    train(a);
    dir = folder / "run";
  }
  LoadedModel open() const { return load_model(dir, Device::cpu, ""); }
};

inline std::string sample_text(int64_t bytes) {
  std::string text;
  for (int64_t i = 0; i < bytes; ++i)
    text += i % 37 == 36 ? '\n' : char('a' + philox(5, 0, uint64_t(i)).v[0] % 26);
  return text;
}

}  // namespace hgrn::test
