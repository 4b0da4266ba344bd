// One field list per struct reads it from JSON, writes it, rejects unknown keys with the nearest
// known one, and checks ranges:
//
//   void fields(Fields& f, OptimConfig& c) { f("lr", c.lr, positive()).doc("..."); ... }
//
// A Fields is a reader or a writer over one JSON object, or lists the fields for the reference; the
// code above is the same for all three.
#pragma once
#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"

namespace hgrn {

struct Range {
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
  bool min_open = false;  // min itself is not allowed
  bool max_open = false;
};
inline Range any() {
  return {};
}
inline Range at_least(double v) {
  return {.min = v};
}
inline Range positive() {
  return {.min = 0, .min_open = true};
}
inline Range between(double a, double b) {
  return {.min = a, .max = b};
}
inline Range below(double a, double b) {
  return {.min = a, .max = b, .max_open = true};
}

// A field as the reference shows it.
struct FieldRow {
  std::string key, type, fallback, allowed, meaning;  // fallback: the default, or "required"
};

class Fields {
 public:
  // `where` is "FILE:section" for errors. `object` outlives this.
  static Fields reader(const nlohmann::json& object, std::string where);
  static Fields writer(nlohmann::ordered_json& object);
  static Fields lister(std::vector<FieldRow>& rows);
  ~Fields();
  Fields(Fields&&) noexcept;

  Fields& operator()(const char* key, int64_t& v, Range r = any());
  Fields& operator()(const char* key, uint64_t& v);
  Fields& operator()(const char* key, double& v, Range r = any());
  Fields& operator()(const char* key, bool& v);
  Fields& operator()(const char* key, std::string& v);
  Fields& operator()(const char* key, double (&v)[2], Range r = any());

  template <class E>
  Fields& choice(const char* key, E& v, std::initializer_list<std::pair<const char*, E>> names) {
    std::vector<const char*> texts;
    int at = 0, i = 0;
    for (const auto& [text, value] : names) {
      texts.push_back(text);
      if (value == v) at = i;
      ++i;
    }
    at = choice_index(key, at, texts);
    v = (names.begin() + at)->second;
    return *this;
  }

  // What the field before this means, for the reference.
  Fields& doc(const char* meaning);
  // The same for a field of its own shape: read with raw(), listed with this.
  Fields& doc(const char* key, const char* type, const char* allowed, const char* meaning);

  // Reader: the key must be present. Call before the field itself.
  void require(const char* key);
  bool reading() const;
  // The raw value for fields with a shape of their own; null when absent or writing.
  const nlohmann::json* raw(const char* key);
  void write_raw(const char* key, const nlohmann::ordered_json& value);

  // Reader: every key of the object must have been listed. Exit::usage naming the nearest.
  void finish();

 private:
  struct State;
  explicit Fields(std::unique_ptr<State>);
  int choice_index(const char* key, int current, const std::vector<const char*>& names);
  std::unique_ptr<State> state_;
};

// The name nearest to `word` by edit distance; empty if none is near enough to be meant.
std::string nearest_name(const std::string& word, const std::vector<std::string>& names);
// ", did you mean X?" or "".
std::string did_you_mean(const std::string& word, const std::vector<std::string>& names);

}  // namespace hgrn
