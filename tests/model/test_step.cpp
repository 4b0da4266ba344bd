// Decoding steps of the whole model, recorded and replayed, against whole passes in double.
#include <algorithm>

#include "catch.h"
#include "model/tiny_model.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::vector<double> read(Ops& ops, Tensor t, int64_t vocab) {
  const Tensor wide = t;
  std::vector<double> all(size_t(t.numel())), out;
  if (t.dtype == DType::f64) {
    ops.download(all.data(), wide);
  } else if (t.dtype == DType::f32) {
    std::vector<float> f(all.size());
    ops.download(f.data(), t);
    all.assign(f.begin(), f.end());
  } else {
    std::vector<uint16_t> h(all.size());
    ops.download(h.data(), t);
    std::transform(h.begin(), h.end(), all.begin(), [](uint16_t x) { return bf16_to_float(x); });
  }
  for (int64_t r = 0; r < t.rows(); ++r)
    for (int64_t i = 0; i < vocab; ++i) out.push_back(all[size_t(r * t.cols() + i)]);
  return out;
}

constexpr int64_t kPrompt = 21, kSteps = 9;

// Logits after the prompt and after each of the steps' tokens.
std::vector<std::vector<double>> stepped(std::unique_ptr<Ops> backend, const ModelConfig& c,
                                         int64_t B, bool record) {
  TinyModel m(std::move(backend), c, {.B = B, .T = kPrompt, .state = true});
  m.set(initial_weights(m.model->params(), 3));
  const RandomRows r(B, kPrompt + kSteps, c.vocab_size, 8);
  std::vector<int32_t> prompt;
  for (int64_t b = 0; b < B; ++b)
    prompt.insert(prompt.end(), r.inputs.begin() + b * (kPrompt + kSteps),
                  r.inputs.begin() + b * (kPrompt + kSteps) + kPrompt);
  std::vector<std::vector<double>> out;
  const Tensor first = m.model->forward_last_logits({B, kPrompt, prompt.data(), nullptr, nullptr});
  out.push_back(read(*m.ops, first, c.vocab_size));
  Tensor logits;
  std::unique_ptr<Recording> recording;
  const auto work = [&] { logits = m.model->step(B); };
  for (int64_t t = 0; t < kSteps; ++t) {
    std::vector<int32_t> next;
    for (int64_t b = 0; b < B; ++b)
      next.push_back(r.inputs[size_t(b * (kPrompt + kSteps) + kPrompt + t)]);
    m.ops->upload(m.model->next_tokens(B), next.data());
    if (recording)
      recording->replay();
    else
      work();
    if (record && !recording) recording = m.ops->record(work);
    out.push_back(read(*m.ops, logits, c.vocab_size));
  }
  return out;
}

std::vector<double> whole(const ModelConfig& c, int64_t B, int64_t count) {
  TinyModel m(make_cpu_ops(DType::f64), c, {.B = B, .T = kPrompt + kSteps});
  m.set(initial_weights(m.model->params(), 3));
  const RandomRows r(B, kPrompt + kSteps, c.vocab_size, 8);
  std::vector<int32_t> inputs;
  for (int64_t b = 0; b < B; ++b)
    inputs.insert(inputs.end(), r.inputs.begin() + b * (kPrompt + kSteps),
                  r.inputs.begin() + b * (kPrompt + kSteps) + count);
  return read(*m.ops, m.model->forward_last_logits({B, count, inputs.data(), nullptr, nullptr}),
              c.vocab_size);
}

ModelConfig vector_config(bool wikitext) {  // widths that the vector kernels take
  ModelConfig c = small_config(wikitext);
  c.vocab_size = 300;
  c.hidden_size = 64;
  c.expand_ratio = 16;
  c.intermediate_size = 40;
  c.initializer_range = 0.1;
  return c;
}

}  // namespace

TEST_CASE("step: logits of recorded steps are those of whole passes", "[model][gpu]") {
  struct Target {
    const char* name;
    std::unique_ptr<Ops> (*open)();
    double tolerance;
  };
  std::vector<Target> targets = {
      {"cpu fp64", [] { return make_cpu_ops(DType::f64); }, 1e-10},
      {"cpu fp32", [] { return make_cpu_ops(DType::f32); }, 1e-5},
  };
  if (cuda_available()) {
    targets.push_back({"cuda fp32", [] { return make_cuda_ops(DType::f32, 0); }, 2e-5});
    targets.push_back({"cuda bf16", [] { return make_cuda_ops(DType::bf16, 0); }, 4e-2});
  }
  for (bool wikitext : {false, true})
    for (const ModelConfig& c : {small_config(wikitext), vector_config(wikitext)})
      for (int64_t B : {1, 3, 10}) {
        std::vector<std::vector<double>> want;
        for (int64_t t = 0; t <= kSteps; ++t) want.push_back(whole(c, B, kPrompt + t));
        for (const Target& target : targets) {
          const auto eager = stepped(target.open(), c, B, false);
          const auto recorded = stepped(target.open(), c, B, true);
          for (int64_t t = 0; t <= kSteps; ++t) {
            INFO(target.name << " wikitext=" << wikitext << " D=" << c.hidden_size << " B=" << B
                             << " step " << t);
            const auto &e = eager[size_t(t)], &w = want[size_t(t)];
            CHECK(vector_error(e.data(), w.data(), int64_t(w.size())) < target.tolerance);
            CHECK(recorded[size_t(t)] == e);
          }
        }
      }
}
