// Prefill and decoding on token ids.
#include <algorithm>
#include <chrono>

#include "eval/generate.h"
#include "eval/padded_rows.h"

namespace hgrn {
namespace {

constexpr int64_t kPrefillTokens = 8192;  // of one forward pass, over all rows
constexpr int64_t kRing = 32;             // tokens a row between two looks of the host, at most
constexpr double kLookSeconds = 0.03;     // ... and about this long, so that text streams

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point t) {
  return std::chrono::duration<double>(Clock::now() - t).count();
}

// What decoding keeps on the device: constant, whatever the number of tokens.
class Buffers {
 public:
  Buffers(Ops& ops, int64_t B, int64_t Vp, bool penalty) : ops_(ops) {
    Arena arena("decoding");
    for (int pass = 0; pass < 2; ++pass) {
      history = arena.take("tokens", {kRing, B}, DType::i32);
      step = arena.take("tokens", {B}, DType::i32);
      if (penalty) seen = arena.take("seen tokens", {B, Vp}, DType::u8);
      if (pass == 0) arena.bind(memory_ = ops.alloc(arena.peak(), arena.name()));
    }
    ops.zero(step);
  }
  ~Buffers() { ops_.free(memory_); }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  Tensor history /*(kRing,B)*/, step /*(B)*/, seen /*(B,Vp)*/;

 private:
  Ops& ops_;
  void* memory_ = nullptr;
};

// Returns the logits after the last tokens of all prompts.
Tensor prefill(LanguageModel& model, const std::vector<std::vector<int32_t>>& prompts) {
  for (const auto& p : prompts)
    check(!p.empty(), Exit::usage,
          "the prompt is empty and no end-of-text token is known; give a prompt");
  PaddedRows rows({prompts.begin(), prompts.end()});
  const int64_t B = rows.count();
  const int64_t segment = std::min(rows.longest(), std::max<int64_t>(64, kPrefillTokens / B));
  model.prepare({.B = B, .T = segment, .state = true});
  Tensor logits;
  for (int64_t at = 0; at < rows.longest(); at += segment) {
    const int64_t T = std::min(segment, rows.longest() - at);
    rows.lay_out(at, T);
    logits = model.forward_last_logits(
        {B, T, rows.inputs.data(), nullptr, rows.padded() ? rows.reset.data() : nullptr});
  }
  return logits;
}

void mark_prompts(Ops& ops, Tensor seen, const std::vector<std::vector<int32_t>>& prompts,
                  int64_t eos) {
  std::vector<uint8_t> marks(size_t(seen.numel()), 0);
  for (size_t b = 0; b < prompts.size(); ++b)
    for (size_t i = 0; i < prompts[b].size(); ++i)
      if (i > 0 || prompts[b][i] != eos)  // the one in front is not the user's
        marks[b * size_t(seen.cols()) + size_t(prompts[b][i])] = 1;
  ops.upload(seen, marks.data());
}

}  // namespace

DecodeReport decode(LanguageModel& model, const std::vector<std::vector<int32_t>>& prompts,
                    const DecodeOptions& o, const IdSink& each) {
  Ops& ops = model.ops();
  const int64_t B = int64_t(prompts.size()), V = model.config().vocab_size;
  check(o.tokens > 0 && o.tokens < INT32_MAX, Exit::usage, "{} tokens cannot be made", o.tokens);
  DecodeReport report;
  Clock::time_point start = Clock::now();
  const Tensor logits = prefill(model, prompts);
  Buffers buffers(ops, B, logits.cols(), o.sampling.repetition_penalty != 1);
  if (buffers.seen) mark_prompts(ops, buffers.seen, prompts, model.config().eos_token_id);
  const auto sample = [&](Tensor from) {
    ops.sample(model.next_tokens(B), buffers.history, buffers.seen, buffers.step, from, V,
               o.sampling);
  };

  std::vector<int32_t> ring(size_t(kRing * B));
  std::vector<bool> wanted(size_t(B), true);
  int64_t made = 0;
  // Shows `count` new tokens a row; false when no row wants more.
  const auto look = [&](int64_t count) {
    ops.download(ring.data(), buffers.history);
    bool more = false;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = made; i < made + count && wanted[size_t(b)]; ++i)
        wanted[size_t(b)] = each(b, ring[size_t(i % kRing * B + b)]);
      more = more || wanted[size_t(b)];
    }
    made += count;
    return more && made < o.tokens;
  };

  sample(logits);
  ops.synchronize();
  report.first_token_seconds = seconds_since(start);
  bool more = look(1);
  start = Clock::now();
  const auto work = [&] { sample(model.step(B)); };
  std::unique_ptr<Recording> recording;
  int64_t burst = 1;
  while (more) {
    const int64_t count = std::min(burst, o.tokens - made);
    const Clock::time_point before = Clock::now();
    if (!recording) {
      work();  // once as it is: what operations allocate is there afterwards
      recording = ops.record(work);
    } else {
      for (int64_t i = 0; i < count; ++i) recording->replay();
    }
    more = look(count);
    const double a_token = seconds_since(before) / double(count);
    burst = std::clamp(int64_t(kLookSeconds / std::max(a_token, 1e-9)), int64_t(1), kRing);
  }
  report.seconds = seconds_since(start);
  report.steps = made;
  return report;
}

std::vector<int32_t> sample_ids(LanguageModel& model, const std::vector<int32_t>& prompt,
                                int64_t tokens, uint64_t seed) {
  std::vector<int32_t> ids;
  DecodeOptions o;
  o.tokens = tokens;
  o.sampling.temperature = 0.8f;
  o.sampling.top_p = 0.95;
  o.sampling.seed = seed;
  decode(model, {prompt}, o, [&](int64_t, int32_t token) {
    ids.push_back(token);
    return token != model.config().eos_token_id;
  });
  return ids;
}

}  // namespace hgrn
