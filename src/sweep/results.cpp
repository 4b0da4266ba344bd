// Reading what runs left behind, and the table of it.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/file.h"
#include "model/config.h"
#include "sweep/sweep.h"

namespace hgrn {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
constexpr uint64_t kMaxFile = uint64_t(1) << 30;

// The newest complete checkpoint's step, by name: a folder gets its name when it is complete.
int64_t newest_step(const std::string& dir) {
  int64_t newest = -1;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(dir + "/checkpoints", none)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("step-", 0) == 0 && exists(entry.path().string() + "/MANIFEST.json"))
      newest = std::max<int64_t>(newest, std::atoll(name.c_str() + 5));
  }
  return newest;
}

double number(const Json& row, const char* key) {
  const auto it = row.find(key);
  return it != row.end() && it->is_number() ? it->get<double>() : kNone;
}

void read_metrics(const std::string& path, SweepResult& r) {
  std::ifstream in(path);
  std::vector<double> rates;
  for (std::string line; std::getline(in, line);) {
    const Json row = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!row.is_object()) continue;  // torn by a crash
    if (row.contains("valid_loss")) {
      r.valid_loss = number(row, "valid_loss");
      if (!(r.best_valid_loss <= r.valid_loss)) r.best_valid_loss = r.valid_loss;
    } else if (row.contains("loss")) {
      r.train_loss = number(row, "loss");
      r.step = int64_t(row.value("step", r.step));
      r.tokens = int64_t(row.value("tokens", r.tokens));
      const double rate = number(row, "tokens_per_s");
      if (rate > 0) rates.push_back(rate);
    }
  }
  if (rates.empty()) return;
  std::nth_element(rates.begin(), rates.begin() + int64_t(rates.size() / 2), rates.end());
  r.tokens_per_s = rates[rates.size() / 2];
}

Json known(double x) {
  return std::isfinite(x) ? Json(x) : Json();
}

Json row_of(const SweepRun& run, const SweepResult& r) {
  Json j;
  j["run"] = run.name;
  for (const auto& [key, value] : run.values)
    j["values"][key] = Json::accept(value) ? Json::parse(value) : Json(value);
  j["state"] = name_of(r.state);
  j["code"] = r.code >= 0 ? Json(r.code) : Json();
  j["step"] = r.step;
  j["steps"] = run.steps;
  j["tokens"] = r.tokens;
  j["valid_loss"] = known(r.valid_loss);
  j["valid_ppl"] = known(std::exp(r.valid_loss));
  j["best_valid_loss"] = known(r.best_valid_loss);
  j["train_loss"] = known(r.train_loss);
  j["tokens_per_s"] = known(r.tokens_per_s);
  j["seconds"] = r.seconds;
  j["dir"] = run.dir;
  if (!r.error.empty()) j["error"] = r.error;
  return j;
}

std::string csv_cell(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string out = "\"";
  for (char c : text) out += c == '"' ? "\"\"" : std::string(1, c);
  return out + "\"";
}

std::string shown(double x, const char* form) {
  return std::isfinite(x) ? fmt::format(fmt::runtime(form), x) : "-";
}

}  // namespace

const char* name_of(RunState state) {
  switch (state) {
    case RunState::pending: return "pending";
    case RunState::running: return "running";
    case RunState::done: return "done";
    case RunState::stopped: return "stopped";
    case RunState::failed: return "failed";
  }
  return "?";
}

SweepResult gather_result(const SweepRun& run, const SweepResult& before) {
  SweepResult r = before;
  r.train_loss = r.valid_loss = r.best_valid_loss = r.tokens_per_s = kNone;
  r.step = r.tokens = 0;
  read_metrics(run.dir + "/metrics.jsonl", r);
  const int64_t saved = newest_step(run.dir);
  r.step = std::max(r.step, saved);
  const bool ended = r.state == RunState::failed;
  if (saved >= run.steps && !ended) {
    r.state = RunState::done;
    r.code = 0;
    r.error.clear();
  } else if (saved >= 0 && r.state != RunState::running && !ended) {
    r.state = RunState::stopped;
  }
  return r;
}

std::vector<SweepResult> read_results(const std::string& out, const std::vector<SweepRun>& runs) {
  std::map<std::string, Json> rows;
  const std::string path = out + "/results.jsonl";
  if (exists(path)) {
    std::istringstream in(read_file(path, kMaxFile));
    for (std::string line; std::getline(in, line);) {
      Json row = Json::parse(line, nullptr, /*allow_exceptions=*/false);
      check(row.is_object() && row.contains("run") && row["run"].is_string(), Exit::data,
            "{}: a line is not a result; remove the file, the run folders tell the rest", path);
      const std::string name = row["run"];
      rows[name] = std::move(row);
    }
  }
  std::vector<SweepResult> results;
  for (const SweepRun& run : runs) {
    SweepResult before;
    if (const auto it = rows.find(run.name); it != rows.end()) {
      const Json& row = it->second;
      if (row.value("state", "") == "failed") {
        before.state = RunState::failed;
        before.error = row.value("error", "");
      }
      if (row.contains("code") && row["code"].is_number_integer()) before.code = row["code"];
      before.seconds = std::max(0.0, number(row, "seconds"));
    }
    results.push_back(gather_result(run, before));
  }
  return results;
}

void write_results(const std::string& out, const std::vector<SweepRun>& runs,
                   const std::vector<SweepResult>& results) {
  std::string lines, csv = "run";
  for (const auto& [key, value] : runs.front().values) csv += "," + csv_cell(key);
  csv +=
      ",state,code,step,steps,tokens,valid_loss,valid_ppl,best_valid_loss,train_loss,tokens_per_s,"
      "seconds,dir\n";
  for (size_t i = 0; i < runs.size(); ++i) {
    const Json row = row_of(runs[i], results[i]);
    lines += row.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    csv += csv_cell(runs[i].name);
    for (const auto& [key, value] : runs[i].values) csv += "," + csv_cell(value);
    for (const char* key : {"state", "code", "step", "steps", "tokens", "valid_loss", "valid_ppl",
                            "best_valid_loss", "train_loss", "tokens_per_s", "seconds", "dir"})
      csv += "," + (row[key].is_null()     ? std::string()
                    : row[key].is_string() ? csv_cell(row[key].get<std::string>())
                                           : row[key].dump());
    csv += "\n";
  }
  write_file_atomic(out + "/results.jsonl", lines);
  write_file_atomic(out + "/results.csv", csv);
}

std::string results_table(const std::vector<SweepRun>& runs,
                          const std::vector<SweepResult>& results) {
  std::vector<size_t> order(runs.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const auto rank = [&](size_t i) {
    const double loss =
        std::isfinite(results[i].valid_loss) ? results[i].valid_loss : results[i].train_loss;
    return std::isfinite(loss) ? loss : std::numeric_limits<double>::infinity();
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return rank(a) < rank(b); });

  std::vector<std::vector<std::string>> cells(1);
  for (const auto& [key, value] : runs.front().values) cells[0].push_back(key);
  for (const char* head : {"state", "step", "valid loss", "ppl", "train loss", "tok/s", "seconds"})
    cells[0].push_back(head);
  for (const size_t i : order) {
    const SweepResult& r = results[i];
    std::vector<std::string> row;
    for (const auto& [key, value] : runs[i].values) row.push_back(value);
    row.push_back(r.state == RunState::failed && r.code >= 0 ? fmt::format("failed ({})", r.code)
                                                             : std::string(name_of(r.state)));
    row.push_back(fmt::format("{}/{}", r.step, runs[i].steps));
    row.push_back(shown(r.valid_loss, "{:.4f}"));
    row.push_back(shown(std::exp(r.valid_loss), "{:.3f}"));
    row.push_back(shown(r.train_loss, "{:.4f}"));
    row.push_back(shown(r.tokens_per_s, "{:.0f}"));
    row.push_back(fmt::format("{:.0f}", r.seconds));
    cells.push_back(std::move(row));
  }
  std::string out;
  for (const auto& row : cells) {
    for (size_t c = 0; c < row.size(); ++c) {
      size_t width = 0;
      for (const auto& other : cells) width = std::max(width, other[c].size());
      out += fmt::format("{}{:>{}}", c ? "  " : "", row[c], width);
    }
    out += "\n";
  }
  return out;
}

}  // namespace hgrn
