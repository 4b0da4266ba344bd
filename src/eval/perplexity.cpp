#include "eval/perplexity.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "core/file.h"
#include "text/shard.h"
#include "text/tokenize.h"

namespace hgrn {
namespace {

constexpr int64_t kTokensAtOnce = 16384;  // of one forward pass
constexpr int64_t kMaxRows = 1024;        // of one forward pass
constexpr int64_t kCarrySegment = 4096;
constexpr uint64_t kMaxTextBytes = uint64_t(16) << 30;

// What is scored: stream[first+1 .. first+count], each given all before it in the row.
struct Row {
  int64_t first, count;
};

struct Stream {
  std::vector<int32_t> tokens;
  std::vector<Row> rows;
  int64_t words = -1, bytes = -1;
};

int64_t count_words(const std::string& text) {  // whitespace-separated, and one end a line
  int64_t words = 0, lines = 0;
  bool inside = false;
  for (unsigned char c : text) {
    const bool space = c == ' ' || (c >= '\t' && c <= '\r');
    if (!space && !inside) ++words;
    inside = !space;
    if (c == '\n') ++lines;
  }
  if (!text.empty() && text.back() != '\n') ++lines;
  return words + lines;
}

void read_shards(Stream& s, const std::string& glob, int64_t vocab) {
  for (const std::string& path : expand_glob(glob, "--data")) {
    const Shard shard(path);
    const size_t at = s.tokens.size();
    s.tokens.resize(at + size_t(shard.count()));
    shard.read(0, shard.count(), s.tokens.data() + at, vocab);
  }
}

void read_text(Stream& s, const LoadedModel& m, const PerplexityOptions& o) {
  check(m.tokenizer != nullptr, Exit::usage,
        "--text needs a tokenizer and {} records none; add --tokenizer byte or a tokenizer file",
        m.dir);
  EncodeOptions e;
  e.files = {o.text};
  e.line_end_token = o.line_end_token;
  encode_files(*m.tokenizer, e, [&](std::span<const int32_t> t) {
    s.tokens.insert(s.tokens.end(), t.begin(), t.end());
  });
}

// Rows of one line each: end-of-text, the line's tokens (with its newline, or stripped and with
// end-of-text after it), so that every byte or token of the text is scored.
void read_lines(Stream& s, const LoadedModel& m, const PerplexityOptions& o,
                const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const size_t newline = text.find('\n', at);
    const size_t end = newline == std::string::npos ? text.size() : newline + 1;
    std::string_view line(text.data() + at, end - at);
    at = end;
    if (strip(line).empty()) continue;
    if (o.line_end_token) line = strip(line);
    const int64_t first = int64_t(s.tokens.size());
    s.tokens.push_back(int32_t(m.eos));
    m.tokenizer->encode(line, s.tokens);
    if (o.line_end_token) s.tokens.push_back(int32_t(m.eos));
    s.rows.push_back({first, int64_t(s.tokens.size()) - first - 1});
  }
}

Stream make_stream(const LoadedModel& m, const PerplexityOptions& o, int64_t T) {
  Stream s;
  check(m.eos >= 0, Exit::usage,
        "{}: no end-of-text token is known, and the stream begins with one; add --tokenizer, or "
        "eos_token_id to config.json",
        m.dir);
  std::string text;
  if (!o.text.empty()) {
    text = read_file(o.text, kMaxTextBytes);
    s.words = count_words(text);
    s.bytes = int64_t(text.size());
  }
  if (o.protocol == Protocol::lines) {
    check(!o.text.empty(), Exit::usage, "--protocol lines needs --text; shards have no lines");
    check(m.tokenizer != nullptr, Exit::usage, "--text needs --tokenizer");
    read_lines(s, m, o, text);
  } else {
    if (o.text.empty())
      read_shards(s, o.data, m.model->config().vocab_size);
    else
      read_text(s, m, o);
    // Shards, and texts of one document, begin with end-of-text. In a text of lines it is the end
    // of an empty first line, and scored.
    const bool led = !s.tokens.empty() && s.tokens[0] == int32_t(m.eos);
    if (!led || (o.line_end_token && !o.text.empty()))
      s.tokens.insert(s.tokens.begin(), int32_t(m.eos));
    const int64_t scored = int64_t(s.tokens.size()) - 1;
    if (o.protocol == Protocol::carry) T = scored;
    for (int64_t first = 0; first < scored; first += T)
      s.rows.push_back({first, std::min(T, scored - first)});
  }
  check(!s.rows.empty() && s.rows[0].count > 0, Exit::data,
        "{}: there is no token to score; give a file with text or tokens",
        o.text.empty() ? o.data : o.text);
  return s;
}

// Scores rows[order[i]] for i in [begin, end) in one forward pass, padded to the longest.
void score(LoadedModel& m, const Stream& s, const std::vector<int64_t>& order, size_t begin,
           size_t end, std::vector<float>& nll) {
  int64_t T = 0;
  for (size_t i = begin; i < end; ++i) T = std::max(T, s.rows[size_t(order[i])].count);
  const int64_t B = int64_t(end - begin);
  std::vector<int32_t> inputs(size_t(B * T), 0), targets(size_t(B * T), -1);
  for (int64_t b = 0; b < B; ++b) {
    const Row& row = s.rows[size_t(order[begin + size_t(b)])];
    std::copy_n(&s.tokens[size_t(row.first)], row.count, &inputs[size_t(b * T)]);
    std::copy_n(&s.tokens[size_t(row.first) + 1], row.count, &targets[size_t(b * T)]);
  }
  const Tensor t = m.model->forward({B, T, inputs.data(), targets.data(), nullptr});
  std::vector<float> out(size_t(B * T));
  m.ops->download(out.data(), t);
  for (int64_t b = 0; b < B; ++b) {
    const Row& row = s.rows[size_t(order[begin + size_t(b)])];
    std::copy_n(&out[size_t(b * T)], row.count, &nll[size_t(row.first) + 1]);
  }
}

void score_rows(LoadedModel& m, const Stream& s, std::vector<float>& nll) {
  // Rows of like length go together, so that padding costs little; each row's result does not
  // depend on its neighbours.
  std::vector<int64_t> order(s.rows.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return s.rows[size_t(a)].count > s.rows[size_t(b)].count;
  });
  const auto length = [&](size_t i) { return s.rows[size_t(order[i])].count; };
  const int64_t shortest = length(order.size() - 1), tokens = std::max(kTokensAtOnce, length(0));
  const int64_t most = std::clamp<int64_t>(tokens / std::max<int64_t>(1, shortest), 1,
                                           std::min<int64_t>(kMaxRows, int64_t(order.size())));
  m.model->prepare({.B = most, .T = (tokens + most - 1) / most});
  for (size_t at = 0; at < order.size();) {
    const int64_t B = std::clamp<int64_t>(tokens / length(at), 1, most);
    const size_t end = std::min(order.size(), at + size_t(B));
    score(m, s, order, at, end, nll);
    at = end;
  }
}

void score_carry(LoadedModel& m, const Stream& s, std::vector<float>& nll) {
  const int64_t scored = s.rows[0].count;
  m.model->prepare({.B = 1, .T = std::min(kCarrySegment, scored), .state = true});
  for (int64_t at = 0; at < scored; at += kCarrySegment) {
    const int64_t T = std::min(kCarrySegment, scored - at);
    const Tensor t =
        m.model->forward({1, T, &s.tokens[size_t(at)], &s.tokens[size_t(at) + 1], nullptr});
    m.ops->download(&nll[size_t(at) + 1], t);
  }
}

}  // namespace

const char* name_of(Protocol p) {
  switch (p) {
    case Protocol::blocks: return "blocks";
    case Protocol::carry: return "carry";
    case Protocol::lines: return "lines";
  }
  return "?";
}

double PerplexityResult::ppl() const {
  return std::exp(nll / double(tokens));
}
double PerplexityResult::word_ppl() const {
  return words > 0 ? std::exp(nll / double(words)) : NAN;
}
double PerplexityResult::bits_per_byte() const {
  return bytes > 0 ? nll / std::log(2.0) / double(bytes) : NAN;
}
// To first order: the total's standard error is tokens * nll_stderr.
double PerplexityResult::ppl_stderr() const {
  return ppl() * nll_stderr;
}
double PerplexityResult::word_ppl_stderr() const {
  return word_ppl() * nll_stderr * double(tokens) / double(words);
}
double PerplexityResult::bits_per_byte_stderr() const {
  return bits_per_byte() * nll_stderr * double(tokens) / nll;
}

PerplexityResult perplexity(LoadedModel& m, const PerplexityOptions& o, const TokenSink& each) {
  const auto started = std::chrono::steady_clock::now();
  PerplexityResult r;
  r.protocol = name_of(o.protocol);
  r.seq_len = o.protocol == Protocol::blocks ? (o.seq_len > 0 ? o.seq_len : m.seq_len) : 0;
  const Stream s = make_stream(m, o, std::max<int64_t>(1, r.seq_len));
  std::vector<float> nll(s.tokens.size(), NAN);
  if (o.protocol == Protocol::carry)
    score_carry(m, s, nll);
  else
    score_rows(m, s, nll);

  double squares = 0;
  for (const Row& row : s.rows)
    for (int64_t i = row.first + 1; i <= row.first + row.count; ++i) {
      const double x = double(nll[size_t(i)]);
      if (each) each(r.tokens, s.tokens[size_t(i)], x);
      r.nll += x;
      squares += x * x;
      ++r.tokens;
    }
  const double n = double(r.tokens), mean = r.nll / n;
  r.nll_stderr = n > 1 ? std::sqrt(std::max(0.0, squares / n - mean * mean) / (n - 1)) : NAN;
  r.words = s.words;
  r.bytes = s.bytes;
  // A byte tokenizer's shards know their bytes: every token but end-of-text is one.
  if (r.bytes < 0 && m.tokenizer && m.tokenizer->name() == "byte")
    r.bytes =
        std::count_if(s.tokens.begin() + 1, s.tokens.end(), [](int32_t t) { return t < 256; });
  r.description =
      fmt::format("{}{}{}; tokens of {}: a token perplexity compares only with the same tokenizer",
                  r.protocol, r.seq_len > 0 ? fmt::format(", rows of {}", r.seq_len) : "",
                  o.line_end_token ? ", end-of-text after each line" : "",
                  m.tokenizer ? m.tokenizer->name() : "an unnamed tokenizer");
  r.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return r;
}

std::string perplexity_json(const PerplexityResult& r, const LoadedModel& m) {
  using nlohmann::ordered_json;
  auto known = [](double v) { return std::isfinite(v) ? ordered_json(v) : ordered_json(); };
  auto counted = [](int64_t v) { return v >= 0 ? ordered_json(v) : ordered_json(); };
  ordered_json j;
  j["task"] = "perplexity";
  j["protocol"] = r.protocol;
  j["seq_len"] = r.seq_len > 0 ? ordered_json(r.seq_len) : ordered_json();
  j["tokens"] = r.tokens;
  j["nll"] = known(r.nll);
  j["nll_stderr"] = known(r.nll_stderr);
  j["ppl"] = known(r.ppl());
  j["ppl_stderr"] = known(r.ppl_stderr());
  j["words"] = counted(r.words);
  j["word_ppl"] = known(r.word_ppl());
  j["word_ppl_stderr"] = known(r.word_ppl_stderr());
  j["bytes"] = counted(r.bytes);
  j["bits_per_byte"] = known(r.bits_per_byte());
  j["bits_per_byte_stderr"] = known(r.bits_per_byte_stderr());
  j["checkpoint"] = m.dir;
  j["step"] = counted(m.step);
  j["seconds"] = r.seconds;
  return j.dump(2) + "\n";
}

}  // namespace hgrn
