#include <algorithm>

#include "bench.h"
#include "core/rng.h"
#include "eval/generate.h"

namespace hgrn::bench {

GenerateTime time_generate(Ops& ops, const Config& config, int64_t batch, int64_t prompt,
                           int64_t tokens) {
  LanguageModel model(ops, config.model);
  WeightStore weights;
  Arena arena("weights");
  void* memory = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    weights.take(arena, ops, model.params(), /*with_grad=*/false);
    if (pass == 0) arena.bind(memory = ops.alloc(arena.peak(), arena.name()));
  }
  weights.set(ops, initial_weights(model.params(), config.train.seed));
  model.use(weights.weights());

  std::vector<std::vector<int32_t>> prompts(static_cast<size_t>(batch));
  for (size_t b = 0; b < prompts.size(); ++b)
    for (int64_t i = 0; i < prompt; ++i)
      prompts[b].push_back(
          int32_t(philox(2, b, uint64_t(i)).v[0] % uint64_t(config.model.vocab_size)));
  const auto used = [&] {
    const MemoryInfo m = ops.memory();
    return double(m.total - m.free) / double(1 << 30);
  };
  GenerateTime r;
  DecodeOptions o;
  o.tokens = std::min<int64_t>(tokens, 64);
  decode(model, prompts, o, [](int64_t, int32_t) { return true; });  // warm
  o.tokens = tokens;
  int64_t seen = 0;
  const DecodeReport d = decode(model, prompts, o, [&](int64_t row, int32_t) {
    if (row == 0 && ++seen == std::min<int64_t>(tokens, 32)) r.memory_start_gib = used();
    return true;
  });
  r.memory_end_gib = used();
  r.first_token_ms = 1e3 * d.first_token_seconds;
  r.tokens_per_s = double(batch * (d.steps - 1)) / std::max(d.seconds, 1e-9);
  ops.free(memory);
  return r;
}

}  // namespace hgrn::bench
