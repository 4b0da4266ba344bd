#include "model/fields.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace hgrn {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replace = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replace});
    }
  }
  return row[b.size()];
}

std::string join(const std::vector<std::string>& words) {
  std::string s;
  for (const std::string& w : words) s += (s.empty() ? "" : ", ") + w;
  return s;
}

// 16777216 -> "2^24", 0.1 -> "0.1".
std::string short_number(double v) {
  int exponent = 0;
  if (v >= 65536 && std::frexp(v, &exponent) == 0.5) return fmt::format("2^{}", exponent - 1);
  return fmt::format("{:g}", v);
}

}  // namespace

std::string nearest_name(const std::string& word, const std::vector<std::string>& names) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, word.size() / 2) + 1;
  for (const std::string& name : names) {
    const size_t d = edit_distance(word, name);
    if (d < best_distance) best_distance = d, best = name;
  }
  return best;
}

std::string did_you_mean(const std::string& word, const std::vector<std::string>& names) {
  const std::string near = nearest_name(word, names);
  return near.empty() ? "; known: " + join(names) : "; did you mean " + near + "?";
}

struct Fields::State {
  const json* in = nullptr;
  ordered_json* out = nullptr;
  std::vector<FieldRow>* rows = nullptr;
  std::vector<std::string> required;
  std::string where;
  std::vector<std::string> known;

  // The value to read, or null when the key is absent (the default stays).
  const json* take(const char* key) {
    known.push_back(key);
    if (!in) return nullptr;
    auto it = in->find(key);
    return it == in->end() ? nullptr : &*it;
  }
  void list(const char* key, const char* type, std::string fallback, std::string allowed) {
    if (!rows) return;
    if (std::find(required.begin(), required.end(), key) != required.end()) fallback = "required";
    rows->push_back({key, type, std::move(fallback), std::move(allowed), ""});
  }
  static std::string words_of(const Range& r) {
    if (std::isfinite(r.min) && std::isfinite(r.max) && !r.min_open)
      return fmt::format("{} .. {}{}", short_number(r.min), r.max_open ? "below " : "",
                         short_number(r.max));
    if (std::isfinite(r.min))
      return fmt::format("{} {}", r.min_open ? ">" : ">=", short_number(r.min));
    return "";
  }
  std::string at(const char* key) const { return where + (where.empty() ? "" : ".") + key; }
  [[noreturn]] void wrong_type(const char* key, const char* wanted, const json& got) const {
    fail(Exit::usage, "{}: expected {}, found {}; correct the value", at(key), wanted, got.dump());
  }
  void in_range(const char* key, double v, const Range& r) const {
    const bool ok = std::isfinite(v) && (r.min_open ? v > r.min : v >= r.min) &&
                    (r.max_open ? v < r.max : v <= r.max);
    if (ok) return;
    std::string wanted;
    if (std::isfinite(r.min))
      wanted += fmt::format("{} {}", r.min_open ? "above" : "at least", r.min);
    if (std::isfinite(r.max))
      wanted += fmt::format("{}{} {}", wanted.empty() ? "" : " and ",
                            r.max_open ? "below" : "at most", r.max);
    if (wanted.empty()) wanted = "finite";
    fail(Exit::usage, "{}: {} is out of range; it must be {}", at(key), v, wanted);
  }
};

Fields::Fields(std::unique_ptr<State> s) : state_(std::move(s)) {}
Fields::~Fields() = default;
Fields::Fields(Fields&&) noexcept = default;

Fields Fields::reader(const json& object, std::string where) {
  check(object.is_object(), Exit::usage, "{}: expected an object, found {}; write {{...}}", where,
        object.dump().substr(0, 60));
  auto s = std::make_unique<State>();
  s->in = &object;
  s->where = std::move(where);
  return Fields(std::move(s));
}

Fields Fields::writer(ordered_json& object) {
  auto s = std::make_unique<State>();
  s->out = &object;
  return Fields(std::move(s));
}

Fields Fields::lister(std::vector<FieldRow>& rows) {
  auto s = std::make_unique<State>();
  s->rows = &rows;
  return Fields(std::move(s));
}

Fields& Fields::doc(const char* meaning) {
  if (state_->rows) state_->rows->back().meaning = meaning;
  return *this;
}

Fields& Fields::doc(const char* key, const char* type, const char* allowed, const char* meaning) {
  state_->list(key, type, "", allowed);
  return doc(meaning);
}

bool Fields::reading() const {
  return state_->in != nullptr;
}

void Fields::require(const char* key) {
  state_->required.push_back(key);
  if (state_->in && !state_->in->contains(key))
    fail(Exit::usage, "{}: this key is required; add it to the config", state_->at(key));
}

Fields& Fields::operator()(const char* key, int64_t& v, Range r) {
  const json* j = state_->take(key);
  state_->list(key, "int", std::to_string(v), State::words_of(r));
  if (state_->out) (*state_->out)[key] = v;
  if (j) {
    // 1e6 is how people write a million: a float that is a whole number passes.
    const bool whole = j->is_number_float() && std::floor(j->get<double>()) == j->get<double>() &&
                       std::fabs(j->get<double>()) < 9e15;
    const bool fits = j->is_number_integer() &&
                      !(j->is_number_unsigned() && j->get<uint64_t>() > uint64_t(INT64_MAX));
    if (!whole && !fits) state_->wrong_type(key, "a whole number", *j);
    v = whole ? int64_t(j->get<double>()) : j->get<int64_t>();
  }
  if (state_->in) state_->in_range(key, double(v), r);
  return *this;
}

Fields& Fields::operator()(const char* key, uint64_t& v) {
  const json* j = state_->take(key);
  state_->list(key, "int", std::to_string(v), "0 .. 2^64-1");
  if (state_->out) (*state_->out)[key] = v;
  if (!j) return *this;
  if (!j->is_number_unsigned()) state_->wrong_type(key, "a whole number of 0 or more", *j);
  v = j->get<uint64_t>();
  return *this;
}

Fields& Fields::operator()(const char* key, double& v, Range r) {
  const json* j = state_->take(key);
  state_->list(key, "number", fmt::format("{:g}", v), State::words_of(r));
  if (state_->out) (*state_->out)[key] = v;
  if (j) {
    if (!j->is_number()) state_->wrong_type(key, "a number", *j);
    v = j->get<double>();
  }
  if (state_->in) state_->in_range(key, v, r);
  return *this;
}

Fields& Fields::operator()(const char* key, bool& v) {
  const json* j = state_->take(key);
  state_->list(key, "bool", v ? "true" : "false", "");
  if (state_->out) (*state_->out)[key] = v;
  if (!j) return *this;
  if (!j->is_boolean()) state_->wrong_type(key, "true or false", *j);
  v = j->get<bool>();
  return *this;
}

Fields& Fields::operator()(const char* key, std::string& v) {
  const json* j = state_->take(key);
  state_->list(key, "text", v.empty() ? "none" : v, "");
  if (state_->out) (*state_->out)[key] = v;
  if (!j) return *this;
  if (!j->is_string()) state_->wrong_type(key, "a text in quotes", *j);
  v = j->get<std::string>();
  return *this;
}

Fields& Fields::operator()(const char* key, double (&v)[2], Range r) {
  const json* j = state_->take(key);
  state_->list(key, "2 numbers", fmt::format("[{:g}, {:g}]", v[0], v[1]),
               State::words_of(r) + " each");
  if (state_->out) (*state_->out)[key] = {v[0], v[1]};
  if (!j) return *this;
  if (!j->is_array() || j->size() != 2 || !(*j)[0].is_number() || !(*j)[1].is_number())
    state_->wrong_type(key, "a list of two numbers", *j);
  for (int i = 0; i < 2; ++i) {
    v[i] = (*j)[i].get<double>();
    state_->in_range(key, v[i], r);
  }
  return *this;
}

int Fields::choice_index(const char* key, int current, const std::vector<const char*>& names) {
  const json* j = state_->take(key);
  state_->list(key, "choice", names[size_t(current)], join({names.begin(), names.end()}));
  if (state_->out) (*state_->out)[key] = names[current];
  if (!j) return current;
  std::vector<std::string> known(names.begin(), names.end());
  if (!j->is_string()) state_->wrong_type(key, ("one of " + join(known)).c_str(), *j);
  const std::string text = j->get<std::string>();
  for (size_t i = 0; i < known.size(); ++i)
    if (known[i] == text) return int(i);
  fail(Exit::usage, "{}: \"{}\" is not one of {}{}", state_->at(key), text, join(known),
       did_you_mean(text, known));
}

const json* Fields::raw(const char* key) {
  return state_->take(key);
}

void Fields::write_raw(const char* key, const ordered_json& value) {
  if (state_->out) (*state_->out)[key] = value;
}

void Fields::finish() {
  if (!state_->in) return;
  for (const auto& item : state_->in->items())
    if (std::find(state_->known.begin(), state_->known.end(), item.key()) == state_->known.end())
      fail(Exit::usage, "{}: unknown key{}", state_->at(item.key().c_str()),
           did_you_mean(item.key(), state_->known));
}

}  // namespace hgrn
