#include "eval/generate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "core/rng.h"

namespace hgrn {
namespace {

constexpr int64_t kPromptSegment = 1024;

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::vector<float> host_logits(Ops& ops, Tensor t) {
  std::vector<float> out(size_t(t.numel()));
  if (t.dtype == DType::bf16) {
    std::vector<uint16_t> raw(out.size());
    ops.download(raw.data(), t);
    std::transform(raw.begin(), raw.end(), out.begin(), bf16_to_float);
  } else {
    ops.download(out.data(), t);
  }
  return out;
}

// Bytes at the end of `text` that begin a UTF-8 character but do not finish it.
size_t unfinished_utf8(const std::string& text) {
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
    const unsigned char c = static_cast<unsigned char>(text[text.size() - back]);
    if ((c & 0xC0) == 0x80) continue;
    const size_t length = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : c >= 0xC0 ? 2 : 1;
    return length > back ? back : 0;
  }
  return 0;
}

}  // namespace

int32_t sample_token(const float* logits, int64_t vocab, const GenerateOptions& o, double u) {
  if (o.temperature <= 0 || o.top_k == 1)
    return int32_t(std::max_element(logits, logits + vocab) - logits);
  std::vector<int32_t> ids(static_cast<size_t>(vocab));
  std::iota(ids.begin(), ids.end(), 0);
  const bool sorted = o.top_k > 0 || o.top_p < 1;
  if (sorted)
    std::sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    });
  if (o.top_k > 0 && o.top_k < vocab) ids.resize(size_t(o.top_k));
  const float top = sorted ? logits[ids[0]] : *std::max_element(logits, logits + vocab);
  std::vector<double> mass(ids.size());
  double total = 0;
  for (size_t i = 0; i < ids.size(); ++i)
    total += mass[i] = std::exp((double(logits[ids[i]]) - double(top)) / o.temperature);
  if (o.top_p < 1) {
    double kept = 0;
    size_t n = 0;
    while (n < ids.size() && kept < o.top_p * total) kept += mass[n++];
    ids.resize(std::max<size_t>(1, n));
    total = kept;
  }
  double left = u * total;
  for (size_t i = 0; i < ids.size(); ++i)
    if ((left -= mass[i]) < 0) return ids[i];
  return ids.back();
}

GenerateReport generate(LoadedModel& m, const GenerateOptions& o, const TextSink& sink) {
  check(m.tokenizer != nullptr, Exit::usage,
        "{}: no tokenizer is recorded; add --tokenizer byte or a tokenizer file", m.dir);
  std::vector<int32_t> prompt;
  if (m.eos >= 0) prompt.push_back(int32_t(m.eos));
  m.tokenizer->encode(o.prompt, prompt);
  check(!prompt.empty(), Exit::usage,
        "--prompt is empty and no end-of-text token is known; give a prompt");

  const int64_t B = o.batch, V = m.model->config().vocab_size;
  const int64_t segment = std::min<int64_t>(kPromptSegment, int64_t(prompt.size()));
  m.model->prepare({.B = B, .T = segment, .state = true});
  GenerateReport report;
  report.prompt_tokens = B * int64_t(prompt.size());

  double started = now_s();
  Tensor logits;
  std::vector<int32_t> inputs;
  for (size_t at = 0; at < prompt.size(); at += size_t(segment)) {
    const int64_t T = std::min<int64_t>(segment, int64_t(prompt.size() - at));
    inputs.clear();
    for (int64_t b = 0; b < B; ++b)
      inputs.insert(inputs.end(), prompt.begin() + int64_t(at), prompt.begin() + int64_t(at) + T);
    logits = m.model->forward_last_logits({B, T, inputs.data(), nullptr, nullptr});
  }
  std::vector<float> host = host_logits(*m.ops, logits);
  report.prompt_seconds = now_s() - started;

  started = now_s();
  std::vector<std::string> pending(static_cast<size_t>(B));
  std::vector<bool> ended(static_cast<size_t>(B), false);
  inputs.assign(size_t(B), 0);
  const int64_t stride = int64_t(host.size()) / B;
  for (int64_t step = 0; step < o.tokens; ++step) {
    for (int64_t b = 0; b < B; ++b) {
      const Philox bits = philox(o.seed, uint64_t(b), uint64_t(step));
      const double u = (double(bits.v[0]) + 0.5) / 4294967296.0;
      const int32_t token = sample_token(&host[size_t(b * stride)], V, o, u);
      inputs[size_t(b)] = token;
      if (ended[size_t(b)]) continue;
      ++report.tokens;
      if (token == m.eos) {
        ended[size_t(b)] = true;
        continue;
      }
      std::string& text = pending[size_t(b)];
      if (token < m.tokenizer->vocab_size()) text += m.tokenizer->decode({&token, 1});
      const size_t whole = text.size() - unfinished_utf8(text);
      if (whole > 0) sink(b, std::string_view(text).substr(0, whole));
      text.erase(0, whole);
    }
    if (std::all_of(ended.begin(), ended.end(), [](bool e) { return e; })) break;
    if (step + 1 < o.tokens)
      host = host_logits(*m.ops,
                         m.model->forward_last_logits({B, 1, inputs.data(), nullptr, nullptr}));
  }
  for (int64_t b = 0; b < B; ++b)
    if (!pending[size_t(b)].empty()) sink(b, pending[size_t(b)]);
  report.seconds = now_s() - started;
  return report;
}

}  // namespace hgrn
