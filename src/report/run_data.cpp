#include "report/run_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "core/check.h"
#include "core/file.h"
#include "core/json_text.h"

namespace hgrn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using nlohmann::ordered_json;

constexpr size_t kMaxLine = size_t(1) << 20;
constexpr uint64_t kMaxJson = uint64_t(64) << 20;
constexpr size_t kMaxSamples = 12, kMaxSampleBytes = 4000;

template <class Json>
double number(const Json& j, const char* key) {
  const auto it = j.find(key);
  return it != j.end() && it->is_number() ? it->template get<double>() : NAN;
}

template <class Json>
std::string text(const Json& j, const char* key) {
  const auto it = j.find(key);
  return it != j.end() && it->is_string() ? it->template get<std::string>() : "";
}

template <class Each>
void each_line(const std::string& path, const Each& each) {
  std::ifstream in(path, std::ios::binary);
  check(bool(in), Exit::data, "cannot read {}; check the path and its permissions", path);
  for (std::string line; std::getline(in, line);)
    if (!line.empty()) each(line);
}

json parsed(const std::string& line) {
  if (line.size() > kMaxLine) return {};
  const json j = json::parse(line, nullptr, /*allow_exceptions=*/false);
  return j.is_object() && std::isfinite(number(j, "step")) ? j : json();
}

std::string plural(int64_t n, const std::string& one, const std::string& many) {
  return fmt::format("{} {}", n, n == 1 ? one : many);
}

void read_samples(RunData& run, const std::string& path) {
  if (!exists(path)) return;
  std::vector<SampleText> all;
  each_line(path, [&](const std::string& line) {
    const json j = parsed(line);
    if (!j.is_object()) return;
    const int64_t step = int64_t(number(j, "step"));
    while (!all.empty() && all.back().step >= step) all.pop_back();
    std::string words = text(j, "text");
    if (words.size() > kMaxSampleBytes) {
      size_t end = kMaxSampleBytes;  // between UTF-8 characters
      while (end > 0 && (static_cast<unsigned char>(words[end]) & 0xC0) == 0x80) --end;
      words.resize(end);
    }
    all.push_back({step, text(j, "prompt"), words});
    if (all.size() <= 4 * kMaxSamples) return;
    for (size_t i = 0; i < all.size() / 2; ++i) all[i] = std::move(all[2 * i + 1]);
    all.resize(all.size() / 2);
  });
  const size_t n = std::min(all.size(), kMaxSamples);
  for (size_t i = 1; i <= n; ++i) run.samples.push_back(all[all.size() * i / n - 1]);
}

void read_layers(RunData& run, const std::string& path) {
  if (!exists(path)) return;
  each_line(path, [&](const std::string& line) {
    const json j = parsed(line);
    if (!j.is_object()) return;
    const auto column = [&](const char* key) {
      std::vector<double> out;
      if (j.contains(key) && j[key].is_array())
        for (const json& v : j[key]) out.push_back(v.is_number() ? v.get<double>() : NAN);
      return out;
    };
    run.layers = {int64_t(number(j, "step")), column("forget_gate"), column("grad_norm")};
  });
}

void flatten(RunData& run, const std::string& prefix, const ordered_json& j) {
  if (j.is_object())
    for (const auto& [key, value] : j.items())
      flatten(run, prefix.empty() ? key : prefix + "." + key, value);
  else
    run.config.push_back({prefix, j.is_string() ? j.get<std::string>() : j.dump()});
}

void read_config(RunData& run, const std::string& path) {
  if (!exists(path)) return;
  try {
    const ordered_json j = parse_json(read_file(path, kMaxJson), path, /*comments=*/true);
    flatten(run, "", j);
    if (j.contains("train") && j["train"].is_object())
      if (const double steps = number(j["train"], "steps"); std::isfinite(steps))
        run.planned_steps = int64_t(steps);
  } catch (const Error& e) {
    run.notes.push_back(fmt::format("config.json is left out: {}", e.what()));
  }
}

void add_value(std::vector<EvalValue>& out, EvalValue v) {
  if (std::isfinite(v.value)) out.push_back(std::move(v));
}

// Empty where the file is not a result of hgrn eval. `checkpoint`: the folder that it names.
std::vector<EvalValue> read_eval(const std::string& path, std::string* checkpoint) {
  const std::string file = fs::path(path).filename().string();
  const ordered_json j = parse_json(read_file(path, kMaxJson), path);
  std::vector<EvalValue> out;
  if (!j.is_object()) return out;
  if (j.contains("protocol") && j.contains("nll")) {
    *checkpoint = text(j, "checkpoint");
    std::string what = "perplexity, " + text(j, "protocol");
    if (const double T = number(j, "seq_len"); std::isfinite(T)) what += fmt::format(" of {}", T);
    const int64_t step = std::isfinite(number(j, "step")) ? int64_t(number(j, "step")) : -1;
    const double nll = number(j, "nll") / number(j, "tokens");
    add_value(out, {file, what, "nll a token", nll, number(j, "nll_stderr"), step});
    for (const char* key : {"ppl", "word_ppl", "bits_per_byte"})
      add_value(out, {file, what, key, number(j, key),
                      number(j, (std::string(key) + "_stderr").c_str()), step});
  } else if (j.contains("results") && j["results"].is_object()) {
    int64_t step = -1;
    if (j.contains("config") && j["config"].is_object()) {
      *checkpoint = text(j["config"], "checkpoint");
      if (const double s = number(j["config"], "step"); std::isfinite(s)) step = int64_t(s);
    }
    for (const auto& [task, metrics] : j["results"].items())
      for (const auto& [key, value] : metrics.items()) {
        const std::string metric = key.substr(0, key.find(','));
        if (!value.is_number() || metric.ends_with("_stderr")) continue;
        const std::string error = metric + "_stderr" + key.substr(metric.size());
        add_value(out, {file, task, metric, value.template get<double>(),
                        number(metrics, error.c_str()), step});
      }
  }
  return out;
}

void read_evals(RunData& run, const std::string& folder) {
  std::set<std::string> files;
  std::error_code ec;
  for (const std::string& dir : {folder, folder + "/eval", folder + "/evals"})
    for (const auto& entry : fs::directory_iterator(dir, ec))
      if (entry.path().extension() == ".json" && entry.path().filename() != "config.json")
        files.insert(entry.path().string());
  for (const std::string& path : files) try {
      std::string checkpoint;
      for (EvalValue& v : read_eval(path, &checkpoint)) run.evals.push_back(std::move(v));
    } catch (const Error& e) {
      run.notes.push_back(fmt::format("left out: {}", e.what()));
    }
}

// The shortest ends of the paths that tell them apart.
void name_runs(std::vector<RunData>& runs) {
  std::vector<std::vector<std::string>> parts;
  for (const RunData& r : runs) {
    std::vector<std::string> p;
    for (const auto& part : fs::weakly_canonical(fs::absolute(r.path)))
      if (const std::string s = part.string(); s != "/" && !s.empty()) p.push_back(s);
    if (p.size() > 1 && p.back() == "metrics.jsonl") p.pop_back();
    parts.push_back(p);
  }
  for (size_t i = 0; i < runs.size(); ++i)
    for (size_t count = 1; count <= parts[i].size(); ++count) {
      const auto tail = [&](const std::vector<std::string>& p) {
        std::string name;
        for (size_t k = p.size() - std::min(count, p.size()); k < p.size(); ++k)
          name += (name.empty() ? "" : "/") + p[k];
        return name;
      };
      runs[i].name = tail(parts[i]);
      size_t same = 0;
      for (const auto& p : parts) same += tail(p) == runs[i].name;
      if (same == 1) break;
    }
}

bool lies_in(const std::string& path, const std::string& folder) {
  const std::string a = fs::weakly_canonical(fs::absolute(path)).string();
  const std::string b = fs::weakly_canonical(fs::absolute(folder)).string();
  return a == b || a.rfind(b + "/", 0) == 0;
}

}  // namespace

// ---- metrics.jsonl

// A step at or below one that was already told: the run was set back (resumed after a kill, rolled
// back), and what it told after that step did not happen.
void MetricLines::go_back_to(double step, bool eval) {
  StepColumns& s = run_.steps;
  EvalColumns& v = run_.valid;
  while (v.size() > 0 && v.step.back() >= step) {
    for (auto* column : {&v.step, &v.tokens, &v.time_s, &v.loss}) column->pop_back();
    ++repeated_;
  }
  while (s.size() > 0 && (eval ? s.step.back() > step : s.step.back() >= step)) {
    for (auto* column :
         {&s.step, &s.tokens, &s.time_s, &s.loss, &s.grad_norm, &s.lr, &s.tokens_per_s, &s.mfu})
      column->pop_back();
    ++repeated_;
  }
}

void MetricLines::add(const std::string& line) {
  const json j = parsed(line);
  last_damaged_ = !j.is_object();
  if (last_damaged_) {
    ++damaged_;
    return;
  }
  const double step = number(j, "step");
  StepColumns& s = run_.steps;
  EvalColumns& v = run_.valid;
  if (j.contains("valid_loss")) {
    go_back_to(step, /*eval=*/true);
    v.step.push_back(step);
    v.loss.push_back(number(j, "valid_loss"));
    v.tokens.push_back(NAN);
    v.time_s.push_back(NAN);
    return;
  }
  if (!j.contains("loss")) return;
  go_back_to(step, /*eval=*/false);
  const double before = s.size() > 0 ? s.step.back() : 0;
  const double time = s.size() > 0 ? s.time_s.back() : 0;
  const double step_ms = number(j, "step_ms");
  s.time_s.push_back(time + (std::isfinite(step_ms) ? (step - before) * step_ms / 1e3 : 0));
  s.step.push_back(step);
  s.tokens.push_back(number(j, "tokens"));
  s.loss.push_back(number(j, "loss"));
  s.grad_norm.push_back(number(j, "grad_norm"));
  s.lr.push_back(number(j, "lr"));
  s.tokens_per_s.push_back(number(j, "tokens_per_s"));
  s.mfu.push_back(number(j, "mfu"));
  if (const double skipped = number(j, "skipped"); std::isfinite(skipped))
    run_.skipped = int64_t(skipped);
}

void MetricLines::finish() {
  StepColumns& s = run_.steps;
  EvalColumns& v = run_.valid;
  size_t at = 0;  // the first logged step at or behind the evaluation
  for (size_t i = 0; i < v.size(); ++i) {
    while (at < s.size() && s.step[at] < v.step[i]) ++at;
    if (s.size() == 0) continue;
    const size_t right = std::min(at, s.size() - 1), left = right > 0 ? right - 1 : right;
    const double span = s.step[right] - s.step[left];
    const double share = span > 0 ? std::min(1.0, (v.step[i] - s.step[left]) / span) : 1;
    v.tokens[i] = s.tokens[left] + share * (s.tokens[right] - s.tokens[left]);
    v.time_s[i] = s.time_s[left] + share * (s.time_s[right] - s.time_s[left]);
  }
  for (double loss : s.loss) not_finite_ += !std::isfinite(loss);
  if (damaged_ > 0)
    run_.notes.push_back(fmt::format(
        "{} of metrics.jsonl {} no metrics and {} left out{}", plural(damaged_, "line", "lines"),
        damaged_ == 1 ? "holds" : "hold", damaged_ == 1 ? "was" : "were",
        last_damaged_ ? " (the last one is cut short)" : ""));
  if (repeated_ > 0)
    run_.notes.push_back(
        fmt::format("{} told twice, since the run was set back; the later telling "
                    "is shown",
                    plural(repeated_, "line was", "lines were")));
  if (not_finite_ > 0)
    run_.notes.push_back(fmt::format("the loss of {} is not finite",
                                     plural(not_finite_, "logged step", "logged steps")));
}

// ---- runs

RunData read_run(const std::string& path) {
  check(exists(path), Exit::data, "{}: no such run folder or metrics file", path);
  const bool folder = is_folder(path);
  const std::string metrics = folder ? path + "/metrics.jsonl" : path;
  check(exists(metrics), Exit::data, "{}: no metrics.jsonl; give a run folder of hgrn train", path);
  RunData run;
  run.path = path;
  MetricLines lines(run);
  each_line(metrics, [&](const std::string& line) { lines.add(line); });
  lines.finish();
  check(run.steps.size() + run.valid.size() > 0, Exit::data,
        "{}: it holds no metrics (lines with \"step\" and \"loss\"); train.log_every may be 0",
        metrics);
  if (folder) {
    read_config(run, path + "/config.json");
    read_layers(run, path + "/layers.jsonl");
    read_samples(run, path + "/samples.jsonl");
    read_evals(run, path);
  }
  return run;
}

std::vector<RunData> read_runs(const std::vector<std::string>& paths,
                               const std::vector<std::string>& eval_files) {
  std::vector<RunData> runs;
  for (const std::string& path : paths) runs.push_back(read_run(path));
  name_runs(runs);
  for (const std::string& file : eval_files) {
    std::string checkpoint;
    const std::vector<EvalValue> values = read_eval(file, &checkpoint);
    check(!values.empty(), Exit::data, "{}: not a result of hgrn eval --json", file);
    RunData* owner = runs.size() == 1 ? &runs[0] : nullptr;
    for (RunData& r : runs)
      if (!checkpoint.empty() && lies_in(checkpoint, r.path)) owner = &r;
    check(
        owner != nullptr, Exit::usage,
        "--eval {}: its checkpoint {} lies in none of the runs; copy the file into its run folder",
        file, checkpoint);
    const bool there = std::any_of(
        owner->evals.begin(), owner->evals.end(),
        [&](const EvalValue& v) { return v.file == fs::path(file).filename().string(); });
    if (there && lies_in(file, owner->path)) continue;  // found in the folder already
    owner->evals.insert(owner->evals.end(), values.begin(), values.end());
  }
  return runs;
}

}  // namespace hgrn
