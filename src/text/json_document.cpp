#include "text/json_document.h"

#include <nlohmann/json.hpp>
#include <vector>

#include "core/check.h"

namespace hgrn {
namespace {

// Keeps the one text that is wanted, builds nothing else.
class TextUnderKey final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit TextUnderKey(const std::string& wanted) : wanted_(wanted) {}

  std::string text;
  size_t error_at = 0;  // byte of the line, from 1
  int found = 0;
  bool is_object = false;
  const char* kind = "a text";  // of what stood under the key
  std::vector<std::string> keys;

  bool null() override { return other("null"); }
  bool boolean(bool) override { return other("true or false"); }
  bool number_integer(number_integer_t) override { return other("a number"); }
  bool number_unsigned(number_unsigned_t) override { return other("a number"); }
  bool number_float(number_float_t, const string_t&) override { return other("a number"); }
  bool binary(binary_t&) override { return other("binary"); }
  bool string(string_t& value) override {
    if (take_) text = std::move(value);
    take_ = false;
    return true;
  }
  bool start_object(size_t) override {
    if (depth_ == 0) is_object = true;
    other("an object");
    ++depth_;
    return true;
  }
  bool start_array(size_t) override {
    other("a list");
    ++depth_;
    return true;
  }
  bool end_object() override { return --depth_ >= 0; }
  bool end_array() override { return --depth_ >= 0; }
  bool key(string_t& name) override {
    if (depth_ != 1) return true;
    if (keys.size() < 8) keys.push_back(name);
    take_ = name == wanted_;
    found += take_ ? 1 : 0;
    return true;
  }
  bool parse_error(size_t at, const std::string&, const nlohmann::detail::exception&) override {
    error_at = at;
    return false;
  }

 private:
  bool other(const char* what) {
    if (take_) kind = what;
    take_ = false;
    return true;
  }
  const std::string& wanted_;
  int depth_ = 0;
  bool take_ = false;  // the next value is the wanted one
};

}  // namespace

std::string json_document(std::string_view line, const std::string& key, const std::string& file,
                          int64_t line_number) {
  TextUnderKey found(key);
  const bool whole = nlohmann::json::sax_parse(line.begin(), line.end(), &found);
  check(whole, Exit::data, "{}:{}: not valid JSON at byte {} of the line; mend or remove the line",
        file, line_number, found.error_at);
  check(found.is_object, Exit::data,
        "{}:{}: not a JSON object; a line is an object with the text under \"{}\"", file,
        line_number, key);
  if (found.found == 0) {
    std::string keys;
    for (const std::string& k : found.keys) keys += (keys.empty() ? "" : ", ") + k;
    fail(Exit::data, "{}:{}: no key \"{}\"; the line has {}; give the right --json-key, or mend it",
         file, line_number, key, keys.empty() ? "none" : keys);
  }
  check(found.found == 1, Exit::data, "{}:{}: the key \"{}\" stands there twice; leave one", file,
        line_number, key);
  check(std::string_view(found.kind) == "a text", Exit::data,
        "{}:{}: \"{}\" is {}, not a text; give the --json-key of a text, or mend the line", file,
        line_number, key, found.kind);
  return std::move(found.text);
}

}  // namespace hgrn
