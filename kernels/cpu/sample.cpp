// Sampling by core/sampling.h: one token a row, in whole numbers.
// Twin: kernels/cuda/sample.cu   Test: tests/ops/test_sample.cpp
#include <array>
#include <vector>

#include "cpu/cpu_ops.h"

namespace hgrn {
namespace {

using sampling::key_of;

// Kept are the tokens above `key` and the first `ties` of those at it.
struct Cut {
  uint32_t key = 0;
  uint64_t ties = UINT64_MAX;
};

// The first tokens in the order of keys whose amounts reach `need` (0 < need <= all of them),
// found a digit of the key at a time.
Cut cut_at(const std::vector<uint32_t>& keys, const std::vector<uint64_t>& weights, bool by_weight,
           uint64_t need) {
  Cut cut{0, 0};
  uint64_t above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    std::array<uint64_t, 256> bins{};
    for (size_t i = 0; i < keys.size(); ++i)
      if (shift == 24 || (keys[i] ^ cut.key) >> (shift + 8) == 0)
        bins[(keys[i] >> shift) & 255] += by_weight ? weights[i] : 1;
    uint32_t digit = 255;
    while (digit > 0 && above + bins[digit] < need) above += bins[digit--];
    cut.key |= digit << shift;
    if (shift == 0) {
      // Equal keys have equal weights.
      uint64_t each = 1;
      for (size_t i = 0; by_weight && i < keys.size(); ++i)
        if (keys[i] == cut.key) each = std::max<uint64_t>(1, weights[i]);
      cut.ties = (need - above + each - 1) / each;
    }
  }
  return cut;
}

// f(id) for the kept tokens, by id, until it says false.
template <class F>
void for_kept(const std::vector<uint32_t>& keys, const Cut& cut, const F& f) {
  uint64_t ties = 0;
  for (size_t i = 0; i < keys.size(); ++i)
    if (keys[i] > cut.key || (keys[i] == cut.key && ties++ < cut.ties))
      if (!f(i)) return;
}

uint64_t kept_mass(const std::vector<uint32_t>& keys, const std::vector<uint64_t>& weights,
                   const Cut& cut) {
  uint64_t mass = 0;
  for_kept(keys, cut, [&](size_t i) {
    mass += weights[i];
    return true;
  });
  return mass;
}

template <class T>
int32_t sample_row(const T* logits, const uint8_t* seen, int64_t vocab, const Sampling& s,
                   int64_t row, int64_t step) {
  std::vector<uint32_t> keys(static_cast<size_t>(vocab));
  size_t best = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    float x = float(logits[i]);
    if (seen && seen[i]) x = sampling::penalised(x, s.repetition_penalty);
    keys[i] = key_of(x);
    if (keys[i] > keys[best]) best = i;
  }
  if (s.greedy()) return int32_t(best);
  const float top = sampling::of_key(keys[best]), inverse = 1.0f / s.temperature;
  std::vector<uint64_t> weights(keys.size());
  for (size_t i = 0; i < keys.size(); ++i)
    weights[i] = sampling::weight_of(sampling::of_key(keys[i]), top, inverse);

  Cut cut;
  if (s.top_k > 0 && s.top_k < vocab)
    cut = cut_at(keys, weights, /*by_weight=*/false, uint64_t(s.top_k));
  uint64_t mass = kept_mass(keys, weights, cut);
  if (s.top_p < 1) {
    cut = cut_at(keys, weights, /*by_weight=*/true, sampling::nucleus_mass(mass, s.top_p));
    mass = kept_mass(keys, weights, cut);
  }
  uint64_t left = sampling::draw(mass, s.seed, row, step);
  int32_t token = int32_t(best);
  for_kept(keys, cut, [&](size_t i) {
    token = int32_t(i);
    if (left < weights[i]) return false;
    left -= weights[i];
    return true;
  });
  return token;
}

}  // namespace

void CpuOps::sample(Tensor tokens, Tensor history, Tensor seen, Tensor step, Tensor logits,
                    int64_t vocab, const Sampling& s) {
  const int64_t B = logits.rows(), ld = logits.cols();
  check(tokens.numel() == B && step.numel() == B && vocab > 0 && vocab <= ld &&
            (!history || history.cols() == B) && (!seen || seen.numel() == logits.numel()),
        "sample: tokens {}, history {}, seen {}, step {}, logits {}, vocab {} do not fit",
        tokens.shape.str(), history.shape.str(), seen.shape.str(), step.shape.str(),
        logits.shape.str(), vocab);
  cpu::with_real(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::parallel_for(B, B * vocab, [&](int64_t b) {
      int32_t& count = step.ptr<int32_t>()[b];
      uint8_t* marks = seen ? seen.ptr<uint8_t>() + b * ld : nullptr;
      const int32_t token =
          sample_row(logits.ptr<T>() + b * ld, marks, vocab, s, s.row0 + b, count);
      tokens.ptr<int32_t>()[b] = token;
      if (history) history.ptr<int32_t>()[count % history.rows() * B + b] = token;
      if (marks) marks[token] = 1;
      ++count;
    });
  });
}

}  // namespace hgrn
