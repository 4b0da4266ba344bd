#include <algorithm>
#include <filesystem>
#include <set>

#include "core/file.h"
#include "model/config.h"
#include "sweep/sweep.h"

namespace hgrn {
namespace {

constexpr size_t kMaxRuns = 10000;
constexpr size_t kMaxName = 150;  // bytes; file systems allow 255

struct Axis {
  std::string key;
  std::vector<std::string> values;
};

// At commas outside of brackets, braces and quotes.
std::vector<std::string> split_values(const std::string& text) {
  std::vector<std::string> values(1);
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '"' && (i == 0 || text[i - 1] != '\\')) quoted = !quoted;
    if (!quoted) depth += (c == '[' || c == '{') - (c == ']' || c == '}');
    if (c == ',' && depth == 0 && !quoted)
      values.emplace_back();
    else
      values.back() += c;
  }
  return values;
}

Axis parse_axis(const std::string& text) {
  const size_t equals = text.find('=');
  check(equals != std::string::npos && equals > 0, Exit::usage,
        "--grid {}: expected KEY=VALUE,VALUE,..., for example --grid optim.lr=1e-4,3e-4", text);
  Axis axis{text.substr(0, equals), split_values(text.substr(equals + 1))};
  std::set<std::string> seen;
  for (const std::string& v : axis.values) {
    check(!v.empty(), Exit::usage, "--grid {}: a value is empty; write KEY=VALUE,VALUE,...", text);
    check(seen.insert(v).second, Exit::usage, "--grid {}: {} stands there twice", text, v);
  }
  return axis;
}

// The values in letters that every file system takes.
std::string folder_name(const std::vector<std::pair<std::string, std::string>>& values) {
  std::string name;
  for (const auto& [key, value] : values) name += (name.empty() ? "" : "_") + key + "=" + value;
  bool changed = false;
  for (char& c : name) {
    const bool plain = std::isalnum(static_cast<unsigned char>(c)) ||
                       std::string("._=+-").find(c) != std::string::npos;
    changed |= !plain;
    if (!plain) c = '-';
  }
  if (!changed && name.size() <= kMaxName) return name;
  std::string whole;
  for (const auto& [key, value] : values) whole += key + "=" + value + "\n";
  return name.substr(0, kMaxName) + "_" + hex16(xxh3(whole.data(), whole.size())).substr(0, 8);
}

}  // namespace

std::vector<SweepRun> sweep_runs(const SweepOptions& o) {
  std::vector<Axis> axes;
  std::set<std::string> keys;
  size_t count = 1;
  for (const std::string& text : o.grid) {
    axes.push_back(parse_axis(text));
    check(keys.insert(axes.back().key).second, Exit::usage,
          "--grid {}: the key has a --grid already; give all its values to one", axes.back().key);
    count *= axes.back().values.size();
    check(count <= kMaxRuns, Exit::usage, "the grid has more than {} runs; take values out",
          size_t(kMaxRuns));
  }
  check(!axes.empty(), Exit::usage,
        "hgrn sweep: no --grid; give the values to try, for example --grid optim.lr=1e-4,3e-4");
  std::vector<SweepRun> runs(count);
  for (size_t i = 0; i < count; ++i) {
    SweepRun& run = runs[i];
    size_t rest = i, below = count;
    for (const Axis& axis : axes) {
      below /= axis.values.size();
      run.values.push_back({axis.key, axis.values[rest / below]});
      rest %= below;
    }
    run.overrides = o.overrides;
    for (const auto& [key, value] : run.values) run.overrides.push_back(key + "=" + value);
    run.name = folder_name(run.values);
    run.dir = o.out + "/runs/" + run.name;
    run.log = o.out + "/logs/" + run.name + ".log";
    const Config c = load_config(o.config, run.overrides);
    check_batch(c.train, 1);
    run.steps = c.train.steps;
    run.config_json = config_to_json(c);
  }
  return runs;
}

}  // namespace hgrn
