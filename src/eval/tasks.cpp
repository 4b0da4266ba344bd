#include "eval/tasks.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/file.h"
#include "core/json_text.h"
#include "eval/loglikelihood.h"
#include "model/fields.h"
#include "text/tokenize.h"

namespace hgrn {
namespace {

using nlohmann::ordered_json;

constexpr uint64_t kMaxTaskBytes = uint64_t(4) << 30;

struct KnownTask {
  const char* name;
  TaskKind kind;
  std::vector<const char*> others;
  bool question = false;
};
const std::vector<KnownTask>& known_tasks() {
  static const std::vector<KnownTask> list = {
      {"lambada_openai", TaskKind::word, {"lambada"}},
      {"hellaswag", TaskKind::choices, {}},
      {"piqa", TaskKind::choices, {}, true},
      {"winogrande", TaskKind::contexts, {}},
      {"arc_easy", TaskKind::choices, {}, true},
      {"arc_challenge", TaskKind::choices, {}, true},
      {"openbookqa", TaskKind::choices, {"openbook_qa", "obqa"}},
  };
  return list;
}

const char* form_of(TaskKind k) {
  switch (k) {
    case TaskKind::choices: return R"({"query": text, "choices": [texts], "gold": index})";
    case TaskKind::contexts:
      return R"({"context_options": [texts], "continuation": text, "gold": index})";
    case TaskKind::word: return R"({"context": text, "continuation": text})";
  }
  return "?";
}

int64_t count_characters(std::string_view utf8) {
  return std::count_if(utf8.begin(), utf8.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

// Reads the fields of one line, with messages that name it.
class Line {
 public:
  Line(std::string_view text, std::string where, TaskKind kind)
      : where_(std::move(where)), kind_(kind), j_(parse_json(text, where_)) {
    check(j_.is_object(), Exit::data, "{}: not a JSON object; a line here is {}", where_,
          form_of(kind_));
  }
  std::string text(const char* key) const {
    const ordered_json& v = field(key);
    check(v.is_string(), Exit::data, "{}: \"{}\" is not a text; a line here is {}", where_, key,
          form_of(kind_));
    return v.get<std::string>();
  }
  std::vector<std::string> texts(const char* key) const {
    const ordered_json& v = field(key);
    bool good = v.is_array() && !v.empty();
    for (const ordered_json& e : v) good = good && e.is_string();
    check(good, Exit::data, "{}: \"{}\" is not a list of texts; a line here is {}", where_, key,
          form_of(kind_));
    return v.get<std::vector<std::string>>();
  }
  int64_t index(const char* key, size_t count) const {
    const ordered_json& v = field(key);
    const bool whole = v.is_number_integer();
    const int64_t i = whole ? v.get<int64_t>() : -1;
    check(i >= 0 && i < int64_t(count), Exit::data,
          "{}: \"{}\" is not an index of the {} choices, 0 to {}", where_, key, count, count - 1);
    return i;
  }

 private:
  const ordered_json& field(const char* key) const {
    const auto it = j_.find(key);
    check(it != j_.end(), Exit::data, "{}: no field \"{}\"; a line here is {}", where_, key,
          form_of(kind_));
    return *it;
  }
  std::string where_;
  TaskKind kind_;
  ordered_json j_;
};

// The harness' prompt of a question of which the file may already have the beginning and the end.
std::string question_prompt(const std::string& query) {
  constexpr std::string_view kBegin = "Question: ", kEnd = "Answer:";
  std::string prompt = query.rfind(kBegin, 0) == 0 ? query : std::string(kBegin) + query;
  if (std::string_view(prompt).substr(prompt.size() - kEnd.size()) == kEnd) return prompt;
  if (prompt.back() != '\n') prompt += '\n';
  return prompt.append(kEnd);
}

TaskItem read_item(const Line& line, const Task& task, const std::optional<std::string>& given) {
  TaskItem item;
  const std::string suffix = given.value_or("");
  switch (task.kind) {
    case TaskKind::choices: {
      const std::string query = line.text("query");
      const std::string context = task.question && !given ? question_prompt(query) : query + suffix;
      for (const std::string& choice : line.texts("choices"))
        item.pairs.push_back({context, " " + choice, count_characters(choice)});
      item.gold = line.index("gold", item.pairs.size());
      break;
    }
    case TaskKind::contexts: {
      const std::string continuation = line.text("continuation");
      for (const std::string& context : line.texts("context_options"))
        item.pairs.push_back(
            {context + suffix, " " + continuation, count_characters(continuation)});
      item.gold = line.index("gold", item.pairs.size());
      break;
    }
    case TaskKind::word: {
      const std::string word = line.text("continuation");
      item.pairs.push_back({line.text("context") + suffix, " " + word, count_characters(word)});
      break;
    }
  }
  return item;
}

// Mean and the standard error of it, from the sample's deviation (n - 1).
Metric mean_of(const std::string& name, const std::vector<double>& values) {
  const double n = double(values.size());
  double sum = 0, squares = 0;
  for (double v : values) sum += v;
  const double mean = sum / n;
  for (double v : values) squares += (v - mean) * (v - mean);
  return {name, mean, n > 1 ? std::sqrt(squares / (n - 1) / n) : NAN};
}

size_t first_largest(const std::vector<double>& v) {
  return size_t(std::max_element(v.begin(), v.end()) - v.begin());
}

std::vector<Metric> metrics_of(const Task& task, const std::vector<TaskItem>& items,
                               const std::vector<PairScore>& scores) {
  std::vector<double> acc, acc_norm, loglik;
  size_t at = 0;
  for (const TaskItem& item : items) {
    std::vector<double> whole, by_length;
    for (const TaskItem::Pair& p : item.pairs) {
      const PairScore& s = scores[at++];
      whole.push_back(s.loglik);
      by_length.push_back(s.loglik / double(std::max<int64_t>(1, p.characters)));
    }
    if (task.kind == TaskKind::word) {
      loglik.push_back(whole[0]);
      acc.push_back(scores[at - 1].likeliest);
    } else {
      acc.push_back(first_largest(whole) == size_t(item.gold));
      acc_norm.push_back(first_largest(by_length) == size_t(item.gold));
    }
  }
  std::vector<Metric> out;
  if (task.kind == TaskKind::word) {
    Metric m = mean_of("perplexity", loglik);
    m.value = std::exp(-m.value);
    m.stderr_ *= m.value;  // to first order
    out.push_back(m);
  }
  out.push_back(mean_of("acc", acc));
  if (task.kind == TaskKind::choices) out.push_back(mean_of("acc_norm", acc_norm));
  return out;
}

}  // namespace

Task find_task(const std::string& name) {
  std::string wanted = name;
  std::replace(wanted.begin(), wanted.end(), '-', '_');
  std::vector<std::string> names;
  for (const KnownTask& t : known_tasks()) {
    names.push_back(t.name);
    if (wanted == t.name ||
        std::any_of(t.others.begin(), t.others.end(), [&](const char* o) { return wanted == o; }))
      return {t.name, t.kind, t.question};
  }
  std::string all;
  for (const std::string& n : names) all += (all.empty() ? "" : ", ") + n;
  fail(Exit::usage, "--task {}: unknown{}; known are {}", name, did_you_mean(wanted, names), all);
}

std::vector<TaskItem> read_task(const Task& task, const std::string& path,
                                const std::optional<std::string>& suffix) {
  const std::string text = read_file(path, kMaxTaskBytes);
  std::vector<TaskItem> items;
  int64_t number = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t newline = text.find('\n', at);
    const size_t end = newline == std::string::npos ? text.size() : newline;
    const std::string_view line = std::string_view(text).substr(at, end - at);
    at = end + 1;
    ++number;
    if (strip(line).empty()) continue;
    items.push_back(
        read_item(Line(line, fmt::format("{}:{}", path, number), task.kind), task, suffix));
  }
  check(!items.empty(), Exit::data, "{}: no line; a line of {} is {}", path, task.name,
        form_of(task.kind));
  return items;
}

EncodedPair encode_pair(const Tokenizer& tokenizer, int32_t eos, std::string_view context,
                        std::string_view continuation) {
  const std::string whole = std::string(context) + std::string(continuation);
  context = strip_right(context);
  EncodedPair p;
  tokenizer.encode(context, p.context);
  std::vector<int32_t> all;
  tokenizer.encode(whole, all);
  const size_t known = std::min(p.context.size(), all.size());
  p.continuation.assign(all.begin() + int64_t(known), all.end());
  if (p.context.empty()) p.context.push_back(eos);
  return p;
}

TaskResult run_task(LoadedModel& m, const TaskOptions& o, const TaskSink& each) {
  const auto started = std::chrono::steady_clock::now();
  const Task task = find_task(o.task);
  check(m.tokenizer != nullptr, Exit::usage,
        "--task needs a tokenizer and {} records none; add --tokenizer byte or a tokenizer file",
        m.dir);
  const std::vector<TaskItem> items = read_task(task, o.data, o.suffix);
  std::vector<ContextPair> pairs;
  for (size_t i = 0; i < items.size(); ++i)
    for (const TaskItem::Pair& p : items[i].pairs) {
      EncodedPair e = encode_pair(*m.tokenizer, int32_t(m.eos), p.context, p.continuation);
      check(e.context[0] >= 0, Exit::usage,
            "{}: no end-of-text token is known, and item {} has an empty context; add --tokenizer, "
            "or eos_token_id to config.json",
            m.dir, i + 1);
      check(!e.continuation.empty(), Exit::data,
            "{}: item {}: a continuation has no token of its own; is it empty?", o.data, i + 1);
      pairs.push_back({std::move(e.context), std::move(e.continuation)});
    }
  const std::vector<PairScore> scores = loglikelihoods(*m.model, pairs);

  size_t at = 0;
  for (size_t i = 0; each && i < items.size(); ++i)
    for (size_t p = 0; p < items[i].pairs.size(); ++p, ++at)
      for (size_t t = 0; t < scores[at].nll.size(); ++t)
        each(int64_t(i), int64_t(p), int64_t(t), pairs[at].continuation[t],
             double(scores[at].nll[t]));
  TaskResult r;
  r.task = task.name;
  r.items = int64_t(items.size());
  r.metrics = metrics_of(task, items, scores);
  r.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return r;
}

std::string task_json(const TaskResult& r, const TaskOptions& o, const LoadedModel& m) {
  const auto known = [](double v) { return std::isfinite(v) ? ordered_json(v) : ordered_json(); };
  ordered_json results;
  results["alias"] = r.task;
  for (const Metric& x : r.metrics) {
    results[x.name + ",none"] = known(x.value);
    results[x.name + "_stderr,none"] = known(x.stderr_);
  }
  ordered_json j;
  j["results"][r.task] = results;
  j["n-shot"][r.task] = 0;
  j["n-samples"][r.task] = {{"original", r.items}, {"effective", r.items}};
  j["config"] = {{"model", "hgrn"},
                 {"checkpoint", m.dir},
                 {"step", m.step >= 0 ? ordered_json(m.step) : ordered_json()},
                 {"tokenizer", m.tokenizer ? m.tokenizer->name() : ""},
                 {"device", m.ops->describe()},
                 {"num_fewshot", 0},
                 {"task_data", o.data},
                 {"prompt", o.suffix ? "as in the file" : "as lm-evaluation-harness"},
                 {"query_suffix", o.suffix ? ordered_json(*o.suffix) : ordered_json()},
                 {"seconds", r.seconds}};
  return j.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace hgrn
