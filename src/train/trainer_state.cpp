// trainer.json: {"version": 1, "step", "updates", "tokens", "next_sample", "seed", "config",
// "series": {NAME: [number or "nan", "inf", "-inf"]}}. Numbers are written with as many digits as
// a double needs, so they come back bit for bit.
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "core/check.h"
#include "core/json_text.h"
#include "train/checkpoint.h"

namespace hgrn {
namespace {

using Json = nlohmann::ordered_json;
constexpr int kTrainerVersion = 1;

Json number(double x) {
  if (std::isfinite(x)) return x;
  return std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf";
}

double number(const Json& value, const std::string& where) {
  if (value.is_number()) return value.get<double>();
  if (value == "nan") return std::numeric_limits<double>::quiet_NaN();
  if (value == "inf") return std::numeric_limits<double>::infinity();
  if (value == "-inf") return -std::numeric_limits<double>::infinity();
  fail(Exit::data, "{}: {} is not a number", where, value.type_name());
}

// The counts of the file, named once for writing and reading.
template <class State, class F>
void counts(State& s, F&& f) {
  f("step", s.step);
  f("updates", s.updates);
  f("tokens", s.tokens);
  f("next_sample", s.next_sample);
}

}  // namespace

std::string trainer_state_to_json(const TrainerState& state) {
  Json root;
  root["version"] = kTrainerVersion;
  counts(state, [&](const char* key, int64_t value) {
    check(value >= 0, "trainer state: {} is {}", key, value);
    root[key] = value;
  });
  root["seed"] = state.seed;
  root["config"] =
      state.config_json.empty() ? Json() : parse_json(state.config_json, "the resolved config");
  root["series"] = Json::object();
  for (const auto& [name, values] : state.series) {
    Json& list = root["series"][name] = Json::array();
    for (double x : values) list.push_back(number(x));
  }
  return root.dump(2) + "\n";
}

TrainerState trainer_state_from_json(const std::string& text, const std::string& where) {
  const Json root = parse_json(text, where);
  check(root.is_object(), Exit::data, "{}: not a JSON object", where);
  const auto field = [&](const char* key) -> const Json& {
    check(root.contains(key), Exit::data, "{}: \"{}\" is missing", where, key);
    return root[key];
  };
  check(field("version") == kTrainerVersion, Exit::data,
        "{}: version {} where {} is known; a newer program wrote it", where,
        field("version").dump(), int(kTrainerVersion));
  TrainerState state;
  counts(state, [&](const char* key, int64_t& value) {
    const Json& number = field(key);
    check(number.is_number_unsigned() && number.get<uint64_t>() <= uint64_t(INT64_MAX), Exit::data,
          "{}: \"{}\" is not a count", where, key);
    value = number.get<int64_t>();
  });
  check(field("seed").is_number_unsigned(), Exit::data, "{}: \"seed\" is not a count", where);
  state.seed = root["seed"].get<uint64_t>();
  if (!field("config").is_null()) state.config_json = root["config"].dump(2);
  check(field("series").is_object(), Exit::data, "{}: \"series\" is not an object", where);
  for (const auto& [name, list] : root["series"].items()) {
    check(list.is_array(), Exit::data, "{}: series {} is not a list", where, name);
    std::vector<double>& values = state.series[name];
    for (const Json& x : list) values.push_back(number(x, where + ": series " + name));
  }
  return state;
}

}  // namespace hgrn
