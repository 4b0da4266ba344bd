#include "report/tables.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "monitor/records.h"

namespace hgrn {
namespace {

constexpr size_t kLastLosses = 10;  // logged steps that "loss" is the mean of

double median(std::vector<double> v) {
  std::erase_if(v, [](double x) { return !std::isfinite(x); });
  if (v.empty()) return NAN;
  std::nth_element(v.begin(), v.begin() + int64_t(v.size() / 2), v.end());
  return v[v.size() / 2];
}

double last_loss(const StepColumns& s) {
  double sum = 0;
  size_t n = 0;
  for (size_t i = s.size(); i > 0 && n < kLastLosses; --i)
    if (std::isfinite(s.loss[i - 1])) sum += s.loss[i - 1], ++n;
  return n > 0 ? sum / double(n) : NAN;
}

// Of a row of numbers, where smaller (or larger) is better; -1 for ties and fewer than two.
int best_of(const std::vector<double>& values, bool smaller) {
  int best = -1, known = 0;
  bool tie = false;
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) continue;
    ++known;
    const double b = best < 0 ? NAN : values[size_t(best)];
    if (best < 0 || (smaller ? values[i] < b : values[i] > b))
      best = int(i), tie = false;
    else if (values[i] == b)
      tie = true;
  }
  return known > 1 && !tie ? best : -1;
}

std::string evaluated(double v) {
  return std::abs(v) < 1e5 ? short_real(v) : fmt::format("{:.4g}", v);
}

std::vector<std::string> names(const std::vector<RunData>& runs) {
  std::vector<std::string> out;
  for (const RunData& r : runs) out.push_back(r.name);
  return out;
}

}  // namespace

std::string short_real(double v, int digits) {
  return std::isfinite(v) ? fmt::format("{:.{}f}", v, digits) : "-";
}

Table summary_table(const std::vector<RunData>& runs) {
  Table t{
      .title = "Runs",
      .note = fmt::format("loss: mean of the last {} logged steps, nats a token. Time is that of "
                          "training alone.",
                          kLastLosses),
      .columns = {"run", "steps", "tokens", "loss", "best valid", "at step", "last valid", "ppl",
                  "time", "tok/s", "mfu", "skipped"},
      .rows = {}};
  for (const RunData& r : runs) {
    const StepColumns& s = r.steps;
    const EvalColumns& v = r.valid;
    size_t best = v.size();
    for (size_t i = 0; i < v.size(); ++i)
      if (std::isfinite(v.loss[i]) && (best == v.size() || v.loss[i] < v.loss[best])) best = i;
    const bool known = best < v.size();
    const int64_t step =
        int64_t(std::max(s.size() ? s.step.back() : 0, v.size() ? v.step.back() : 0));
    const double mfu = median(s.mfu), last = v.size() ? v.loss.back() : NAN;
    t.rows.push_back({r.name,
                      r.planned_steps > step ? fmt::format("{} of {}", step, r.planned_steps)
                                             : fmt::format("{}", step),
                      s.size() ? short_count(s.tokens.back()) : "-", short_real(last_loss(s)),
                      known ? short_real(v.loss[best]) : "-",
                      known ? fmt::format("{:.0f}", v.step[best]) : "-", short_real(last),
                      short_real(std::exp(last), 2), s.size() ? duration(s.time_s.back()) : "-",
                      short_count(median(s.tokens_per_s)),
                      std::isfinite(mfu) ? fmt::format("{:.1f}%", 100 * mfu) : "-",
                      fmt::format("{}", r.skipped)});
  }
  for (size_t c = t.columns.size(); c-- > 1;) {  // what no run knows
    if (std::any_of(t.rows.begin(), t.rows.end(), [&](const auto& row) { return row[c] != "-"; }))
      continue;
    t.columns.erase(t.columns.begin() + int64_t(c));
    for (auto& row : t.rows) row.erase(row.begin() + int64_t(c));
  }
  return t;
}

Table config_differences(const std::vector<RunData>& runs) {
  Table t{
      .title = "Config differences", .note = "", .columns = {"key"}, .rows = {}, .numbers = false};
  for (const std::string& name : names(runs)) t.columns.push_back(name);
  std::vector<std::string> keys;  // in the order of the first config that has them
  std::set<std::string> seen;
  std::vector<std::map<std::string, std::string>> values;
  size_t known = 0;
  for (const RunData& r : runs) {
    values.emplace_back(r.config.begin(), r.config.end());
    known += !r.config.empty();
    for (const auto& [key, value] : r.config)
      if (seen.insert(key).second) keys.push_back(key);
  }
  for (const std::string& key : keys) {
    std::vector<std::string> row = {key};
    std::set<std::string> different;
    for (const auto& v : values) {
      const auto it = v.find(key);
      row.push_back(it == v.end() ? "-" : it->second);
      if (!v.empty()) different.insert(row.back());
    }
    if (different.size() > 1) t.rows.push_back(row);
  }
  if (known < runs.size())
    t.note = fmt::format("{} of {} runs have no config.json that can be read.", runs.size() - known,
                         runs.size());
  else if (runs.size() > 1 && t.rows.empty())
    t.note = "The configs are the same.";
  return t;
}

Table evaluation_table(const std::vector<RunData>& runs) {
  Table t{.title = "Evaluations",
          .note =
              "+- is one standard error. A token perplexity compares only with the same "
              "tokenizer and the same text.",
          .columns = {"evaluation"},
          .rows = {}};
  for (const std::string& name : names(runs)) t.columns.push_back(name);
  std::vector<std::string> labels;
  std::map<std::string, std::vector<double>> numbers;
  std::map<std::string, std::vector<std::string>> texts;
  std::map<std::string, bool> smaller;
  for (size_t i = 0; i < runs.size(); ++i)
    for (const EvalValue& v : runs[i].evals) {
      const std::string label = fmt::format("{}: {} ({})", v.metric, v.what, v.file);
      if (!texts.count(label)) {
        labels.push_back(label);
        texts[label].assign(runs.size(), "-");
        numbers[label].assign(runs.size(), NAN);
        smaller[label] = v.metric.rfind("acc", 0) != 0;
      }
      numbers[label][i] = v.value;
      texts[label][i] = evaluated(v.value);
      if (std::isfinite(v.stderr_)) texts[label][i] += " +- " + evaluated(v.stderr_);
    }
  for (const std::string& label : labels) {
    std::vector<std::string> row = {label};
    row.insert(row.end(), texts[label].begin(), texts[label].end());
    t.rows.push_back(row);
    const int best = best_of(numbers[label], smaller[label]);
    t.best.push_back(best < 0 ? -1 : best + 1);
  }
  return t;
}

Table loss_table(const std::vector<RunData>& runs, int rows) {
  Table t{.title = "Loss",
          .note = "mean since the step of the row above",
          .columns = {"step"},
          .rows = {}};
  for (const std::string& name : names(runs)) t.columns.push_back(name);
  double last = 0;
  for (const RunData& r : runs)
    if (r.steps.size() > 0) last = std::max(last, r.steps.step.back());
  double from = 0;
  for (int i = 1; i <= rows && last > 0; ++i) {
    const double to = std::ceil(last * i / rows);
    if (to <= from) continue;
    std::vector<std::string> row = {fmt::format("{:.0f}", to)};
    std::vector<double> means;
    for (const RunData& r : runs) {
      const StepColumns& s = r.steps;
      const auto begin = std::upper_bound(s.step.begin(), s.step.end(), from);
      const auto end = std::upper_bound(s.step.begin(), s.step.end(), to);
      double sum = 0;
      int64_t n = 0;
      for (auto it = begin; it != end; ++it)
        if (const double loss = s.loss[size_t(it - s.step.begin())]; std::isfinite(loss))
          sum += loss, ++n;
      means.push_back(n > 0 ? sum / double(n) : NAN);
      row.push_back(short_real(means.back()));
    }
    const int best = best_of(means, /*smaller=*/true);
    if (std::any_of(means.begin(), means.end(), [](double v) { return std::isfinite(v); })) {
      t.rows.push_back(row);
      t.best.push_back(best < 0 ? -1 : best + 1);
      from = to;
    }
  }
  return t;
}

}  // namespace hgrn
