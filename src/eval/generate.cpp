#include "eval/generate.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

namespace hgrn {
namespace {

constexpr int64_t kRowsAtOnce = 64;
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Bytes at the end of `text` that begin a UTF-8 character but do not finish it.
size_t unfinished_utf8(std::string_view text) {
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
    const unsigned char c = static_cast<unsigned char>(text[text.size() - back]);
    if ((c & 0xC0) == 0x80) continue;
    const size_t length = c >= 0xF8 ? 1 : c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : c >= 0xC0 ? 2 : 1;
    return length > back ? back : 0;
  }
  return 0;
}

// The longest end of `text` that begins one of `stop` without being all of it.
size_t stop_begun(std::string_view text, const std::vector<std::string>& stop) {
  size_t longest = 0;
  for (const std::string& s : stop)
    for (size_t n = std::min(text.size(), s.size() - 1); n > longest; --n)
      if (text.substr(text.size() - n) == std::string_view(s).substr(0, n)) longest = n;
  return longest;
}

std::vector<int32_t> encode_prompt(const LoadedModel& m, const std::string& text) {
  std::vector<int32_t> ids;
  if (m.eos >= 0) ids.push_back(int32_t(m.eos));
  m.tokenizer->encode(text, ids);
  return ids;
}

// Rows [first, first + prompts.size()).
void generate_rows(LoadedModel& m, const GenerateOptions& o, int64_t first,
                   const std::vector<std::vector<int32_t>>& prompts, const TextSink& sink,
                   GenerateReport& report) {
  std::vector<TextStream> texts(prompts.size(), TextStream(o.stop));
  DecodeOptions d{o.tokens, o.sampling};
  d.sampling.row0 = first;
  const auto give = [&](int64_t b, const std::string& text) {
    if (!text.empty()) sink(first + b, text);
  };
  const DecodeReport r = decode(*m.model, prompts, d, [&](int64_t b, int32_t token) {
    GeneratedRow& row = report.rows[size_t(first + b)];
    ++row.tokens;
    if (token == m.eos) {
      row.finish = Finish::end_of_text;
      return false;
    }
    // Ids that only the model's padding of the vocabulary has decode to nothing.
    if (token < m.tokenizer->vocab_size())
      give(b, texts[size_t(b)].push(m.tokenizer->decode({&token, 1})));
    if (texts[size_t(b)].stopped()) row.finish = Finish::stop;
    return !texts[size_t(b)].stopped();
  });
  for (size_t b = 0; b < texts.size(); ++b) give(int64_t(b), texts[b].finish());
  if (first == 0) report.first_token_seconds = r.first_token_seconds;
  report.prompt_seconds += r.first_token_seconds;
  report.seconds += r.seconds;
}

}  // namespace

const char* name_of(Finish f) {
  switch (f) {
    case Finish::length: return "length";
    case Finish::end_of_text: return "end_of_text";
    case Finish::stop: return "stop";
  }
  return "?";
}

std::string TextStream::push(std::string_view bytes) {
  if (stopped_) return {};
  held_ += bytes;
  size_t end = std::string::npos;
  for (const std::string& s : *stop_) end = std::min(end, held_.find(s));
  if (end != std::string::npos) {
    stopped_ = true;
    held_.resize(end);
    return finish();
  }
  const size_t hold = std::max(unfinished_utf8(held_), stop_begun(held_, *stop_));
  std::string out = held_.substr(0, held_.size() - hold);
  // What a stop text holds back may itself start within a character.
  const size_t cut = unfinished_utf8(out);
  out.resize(out.size() - cut);
  held_.erase(0, out.size());
  return out;
}

std::string TextStream::finish() {
  std::string out = std::exchange(held_, {});
  const size_t cut = unfinished_utf8(out);
  if (cut > 0) out.replace(out.size() - cut, cut, kReplacement);
  return out;
}

GenerateReport generate(LoadedModel& m, const GenerateOptions& o, const TextSink& sink) {
  check(m.tokenizer != nullptr, Exit::usage,
        "{}: no tokenizer is recorded; add --tokenizer byte or a tokenizer file", m.dir);
  for (const std::string& s : o.stop)
    check(!s.empty(), Exit::usage, "a stop text is empty; give --stop some text");
  GenerateReport report;
  std::vector<std::vector<int32_t>> prompts;
  for (const std::string& text : o.prompts)
    for (int64_t i = 0; i < o.batch; ++i) {
      prompts.push_back(encode_prompt(m, text));
      report.rows.push_back({int64_t(prompts.back().size()), 0, Finish::length});
      report.prompt_tokens += int64_t(prompts.back().size());
    }
  for (size_t first = 0; first < prompts.size(); first += kRowsAtOnce) {
    const size_t last = std::min(prompts.size(), first + size_t(kRowsAtOnce));
    generate_rows(m, o, int64_t(first),
                  {prompts.begin() + int64_t(first), prompts.begin() + int64_t(last)}, sink,
                  report);
  }
  for (const GeneratedRow& row : report.rows) report.tokens += row.tokens;
  report.later_tokens = report.tokens - int64_t(report.rows.size());
  return report;
}

std::string generated_json(const GenerateReport& report, size_t row, const std::string& prompt,
                           const std::string& text) {
  const GeneratedRow& r = report.rows.at(row);
  nlohmann::ordered_json j;
  j["index"] = row;
  j["prompt"] = prompt;
  j["text"] = text;
  j["prompt_tokens"] = r.prompt_tokens;
  j["tokens"] = r.tokens;
  j["finish"] = name_of(r.finish);
  // Bytes that are not UTF-8 become U+FFFD.
  return j.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace hgrn
