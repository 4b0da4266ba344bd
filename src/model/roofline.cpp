#include "model/roofline.h"

namespace hgrn {
namespace {

constexpr Card kCards[] = {
    {"H100", 798e12, 3.0e12, 989e12, 79},
    {"H200", 798e12, 4.3e12, 989e12, 139},
    // 312 TFLOP/s and 2.039 TB/s (80 GB, SXM) times 798/989 and 3.0/3.35.
    {"A100", 252e12, 1.83e12, 312e12, 79},
};

constexpr double kChunk = 64;  // tokens between two saved states
// A weight and step: gradient read twice (norm, AdamW), master weight and two moments read and
// written.
constexpr double kUpdateBytes = 2 * 4 + 3 * 8;
constexpr double kGradBytes = 8;  // a weight and micro-batch: fp32 gradient read and written

}  // namespace

std::span<const Card> cards() {
  return kCards;
}

const Card* find_card(std::string_view name) {
  for (const Card& c : kCards)
    if (name == c.name) return &c;
  return nullptr;
}

std::vector<StepPart> step_parts(const Config& c, int64_t act_bytes) {
  const double L = double(c.model.num_hidden_layers), D = double(c.model.hidden_size);
  const double F = double(c.model.intermediate_size), V = double(c.model.vocab_size);
  const double n = double(c.model.expand_ratio);
  const double e = double(act_bytes);
  const double again = c.train.recompute == Recompute::block ? 1 : 0;
  // What backward kernels write beside the gradients.
  const double elementwise = c.train.recompute == Recompute::elementwise ? 1 : 0;
  const auto product = [](const char* name, double forward, double recomputed) {
    return StepPart{name, true, forward, 2 * forward, recomputed};
  };
  // Bytes are those of the elements that a fused kernel must read and write.
  const auto moved = [&](const char* name, double forward, double backward, double recomputed) {
    return StepPart{name, false, e * forward, e * backward, e * recomputed};
  };
  const double state = L * D * n / kChunk;  // elements a token of the saved states, all heads
  return {
      product("projections", 2 * L * 4 * D * D, again * 2 * L * 4 * D * D),
      // Recomputation stops before the down projection, whose output backward does not need.
      product("GLU products", 2 * L * 3 * D * F, again * 2 * L * 2 * D * F),
      product("logits", 2 * V * D, 0),
      moved("recurrence", L * 4 * D + state, L * 7 * D + state, again * (L * 4 * D + state)),
      moved("norms", L * (4 + 2) * D, L * (8 + 3) * D,
            again * L * (4 + 2) * D + elementwise * L * (2 + 1) * D),
      moved("GLU", L * 3 * F, L * 5 * F, again * L * 3 * F + elementwise * L * F),
      moved("embedding and final norm", 4 * D, 8 * D, 0),
      moved("cross-entropy", 2 * V, 0, 0),
  };
}

StepTime step_time(const Config& c, int64_t parameters, int64_t act_bytes, const Card& card,
                   int64_t shards) {
  const double P = double(parameters);
  StepTime t;
  for (const StepPart& p : step_parts(c, act_bytes)) {
    const double rate = p.product ? card.gemm_flops : card.bytes_per_s;
    t.forward += p.forward / rate;
    t.backward += (p.backward + p.again) / rate;
  }
  const double tokens = double(c.train.micro_batch * c.data.seq_len);
  t.forward *= tokens;
  t.backward = t.backward * tokens + kGradBytes * P / card.bytes_per_s;
  t.update = kUpdateBytes * P / double(shards) / card.bytes_per_s;
  return t;
}

}  // namespace hgrn
