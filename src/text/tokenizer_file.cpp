#include "text/tokenizer_file.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/check.h"
#include "text/utf8.h"

namespace hgrn {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 64;

size_t line_of(std::string_view text, size_t byte) {
  return 1 + size_t(std::count(text.begin(), text.begin() + ptrdiff_t(std::min(byte, text.size())),
                               '\n'));
}

// Reads a JSON text as a stream. The two large parts go into plain lists: the object of integers at
// vocab_path ("" is the root) and the list at merges_path; all else becomes a json value.
class Reader : public nlohmann::json_sax<json> {
 public:
  Reader(std::string_view text, const std::string& file, TokenizerDefinition& def,
         std::string vocab_path, std::string merges_path)
      : text_(text),
        file_(file),
        def_(def),
        vocab_path_(std::move(vocab_path)),
        merges_path_(std::move(merges_path)) {}

  json rest;  // everything but the vocabulary and the merges
  bool saw_vocab = false, saw_merges = false;

  bool null() override { return value(nullptr); }
  bool boolean(bool v) override { return value(v); }
  bool number_integer(number_integer_t v) override { return integer(v); }
  bool number_unsigned(number_unsigned_t v) override {
    return integer(v > uint64_t(INT64_MAX) ? INT64_MAX : int64_t(v));
  }
  bool number_float(number_float_t v, const string_t&) override { return value(v); }
  bool binary(binary_t&) override { return false; }
  bool string(string_t& v) override {
    if (in_ == In::merges) return add_merge(v), true;
    if (in_ == In::merge_pair) return pair_.push_back(std::move(v)), true;
    return value(std::move(v));
  }
  bool start_object(size_t) override {
    check(in_ == In::rest, Exit::data, "{}: {}: an object stands where {} is due", file_, path(),
          in_ == In::vocab ? "an id" : "a merge");
    if (!saw_vocab && path() == vocab_path_) {
      in_ = In::vocab, saw_vocab = true;
      return enter();
    }
    return open(json::object());
  }
  bool key(string_t& k) override {
    if (in_ == In::vocab) return key_ = std::move(k), true;
    check(!stack_.back()->contains(k), Exit::data, "{}: the key {}.{} appears twice; remove one",
          file_, path(), k);
    key_ = std::move(k);
    return true;
  }
  bool end_object() override {
    if (in_ == In::vocab) return in_ = In::rest, leave();
    stack_.pop_back();
    return leave();
  }
  bool start_array(size_t) override {
    if (in_ == In::merges) return in_ = In::merge_pair, pair_.clear(), true;
    check(in_ == In::rest, Exit::data, "{}: {}: a list stands where {} is due", file_, path(),
          in_ == In::vocab ? "an id" : "a token");
    if (!saw_merges && path() == merges_path_) {
      in_ = In::merges, saw_merges = true;
      return enter();
    }
    return open(json::array());
  }
  bool end_array() override {
    if (in_ == In::merge_pair) {
      check(pair_.size() == 2, Exit::data, "{}: merge {} has {} tokens, not 2", file_,
            def_.merges.size() + 1, pair_.size());
      def_.merges.push_back({std::move(pair_[0]), std::move(pair_[1]), def_.merges.size() + 1});
      return in_ = In::merges, true;
    }
    if (in_ == In::merges) return in_ = In::rest, leave();
    stack_.pop_back();
    return leave();
  }
  bool parse_error(size_t byte, const std::string&, const nlohmann::detail::exception&) override {
    fail(Exit::data, "{}: not valid JSON at byte {} (line {}); copy or download the file again",
         file_, byte, line_of(text_, byte));
  }

 private:
  enum class In { rest, vocab, merges, merge_pair };

  std::string path() const {
    std::string p;
    for (const std::string& name : names_) p += (p.empty() ? "" : ".") + name;
    if (!stack_.empty() && stack_.back()->is_object()) p += (p.empty() ? "" : ".") + key_;
    return p;
  }
  bool enter() {
    names_.push_back(key_);
    check(names_.size() <= kMaxDepth, Exit::data, "{}: JSON nested deeper than {} levels", file_,
          kMaxDepth);
    return true;
  }
  bool leave() {
    names_.pop_back();
    return true;
  }
  json* put(json v) {
    if (stack_.empty()) return rest = std::move(v), &rest;
    if (stack_.back()->is_array())
      return stack_.back()->push_back(std::move(v)), &stack_.back()->back();
    return &((*stack_.back())[key_] = std::move(v));
  }
  bool open(json v) {
    json* placed = put(std::move(v));
    enter();
    stack_.push_back(placed);
    return true;
  }
  bool value(json v) {
    check(in_ != In::vocab, Exit::data, "{}: the id of \"{}\" is {}, not a whole number", file_,
          key_, v.dump());
    check(in_ == In::rest, Exit::data, "{}: merge {} is {}, not a pair of tokens", file_,
          def_.merges.size() + 1, v.dump());
    put(std::move(v));
    return true;
  }
  bool integer(int64_t v) {
    if (in_ != In::vocab) return value(v);
    def_.vocab.emplace_back(std::move(key_), v);
    return true;
  }
  void add_merge(const std::string& line) {
    const size_t space = line.find(' ');
    const bool two = space != std::string::npos && space > 0 && space + 1 < line.size() &&
                     line.find(' ', space + 1) == std::string::npos;
    check(two, Exit::data, "{}: merge {} is \"{}\", not two tokens with a space between", file_,
          def_.merges.size() + 1, line);
    def_.merges.push_back({line.substr(0, space), line.substr(space + 1), def_.merges.size() + 1});
  }

  std::string_view text_;
  const std::string& file_;
  TokenizerDefinition& def_;
  const std::string vocab_path_, merges_path_;
  In in_ = In::rest;
  std::vector<json*> stack_;  // the arrays and objects of `rest` that are open
  std::vector<std::string> names_;
  std::string key_;
  std::vector<std::string> pair_;
};

void parse(Reader& reader, std::string_view text, const std::string& path) {
  try {
    json::sax_parse(text.begin(), text.end(), &reader);
  } catch (const json::exception& e) {
    fail(Exit::data, "{}: not valid JSON: {}", path, e.what());
  }
}

// ---- tokenizer.json, part by part

// A value's text for errors, cut short.
std::string shown(const json& j) {
  std::string s = j.dump(-1, ' ', true, json::error_handler_t::replace);
  return s.size() > 80 ? s.substr(0, 77) + "..." : s;
}

const json& member(const json& object, const char* key) {
  static const json kNull;
  if (!object.is_object()) return kNull;
  const auto found = object.find(key);
  return found == object.end() ? kNull : *found;
}

bool flag(const json& object, const char* key, bool otherwise, const std::string& where) {
  const json& v = member(object, key);
  if (v.is_null()) return otherwise;
  check(v.is_boolean(), Exit::data, "{}.{}: {} is not true or false", where, key, shown(v));
  return v.get<bool>();
}

std::string text_of(const json& object, const char* key, const std::string& where) {
  const json& v = member(object, key);
  check(v.is_string(), Exit::data, "{}.{}: {} is not a text", where, key, shown(v));
  return v.get<std::string>();
}

void check_list(const json& v, const std::string& where) {
  check(v.is_array(), Exit::data, "{}: {} is not a list", where, shown(v));
}

void read_model(const json& model, TokenizerDefinition& def, const std::string& path) {
  const std::string where = path + ": model";
  check(model.is_object(), Exit::data,
        "{} is missing; this is no tokenizer.json: give one of Hugging Face, a GPT-2 folder, or "
        "'byte'",
        where);
  const json& type = member(model, "type");
  check(type.is_null() || type == "BPE", Exit::data,
        "{}.type: {} is not supported; byte-level BPE is", where, shown(type));
  const json& dropout = member(model, "dropout");
  check(dropout.is_null() || (dropout.is_number() && dropout.get<double>() == 0), Exit::data,
        "{}.dropout: {}: tokens would be random; set it to null", where, shown(dropout));
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const json& v = member(model, key);
    check(v.is_null() || v == "", Exit::data, "{}.{}: {} is not supported; byte-level BPE has none",
          where, key, shown(v));
  }
  def.ignore_merges = flag(model, "ignore_merges", false, where);
}

void read_normalizer(const json& n, TokenizerDefinition& def, const std::string& where) {
  if (n.is_null()) return;
  const std::string type = text_of(n, "type", where);
  if (type == "NFC") {
    def.nfc = true;
  } else if (type == "Sequence") {
    const json& list = member(n, "normalizers");
    check_list(list, where + ".normalizers");
    for (const json& part : list) read_normalizer(part, def, where + ".normalizers");
  } else {
    fail(Exit::data, "{}.type: {} is not supported; supported are NFC, Sequence of it, and null",
         where, shown(n["type"]));
  }
}

std::string escaped(const std::string& literal) {
  std::string out;
  for (char c : literal) {
    if (std::string_view("\\.+*?()|[]{}^$#&-~").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

void read_split(const json& p, TokenizerDefinition& def, const std::string& where) {
  const json& pattern = member(p, "pattern");
  Split split;
  if (member(pattern, "Regex").is_string())
    split.pattern = pattern["Regex"].get<std::string>();
  else if (member(pattern, "String").is_string())
    split.pattern = escaped(pattern["String"].get<std::string>());
  else
    fail(Exit::data, "{}.pattern: {} is neither {{\"Regex\": ..}} nor {{\"String\": ..}}", where,
         shown(pattern));
  const std::string behavior = text_of(p, "behavior", where);
  const bool invert = flag(p, "invert", false, where);
  const bool total = split.pattern == kGpt2Pattern || split.pattern == kLlama3Pattern ||
                     split.pattern == kQwen2Pattern;
  split.contiguous = behavior == "Contiguous" && !invert;
  // To remove what does not match changes nothing where everything matches.
  const bool keeps_all =
      behavior == "Isolated" || split.contiguous || (behavior == "Removed" && invert && total);
  check(keeps_all, Exit::data,
        "{}.behavior: {}{} is not supported; supported are Isolated and Contiguous, and Removed "
        "with invert for the patterns of GPT-2, Llama 3 and Qwen 2",
        where, shown(p["behavior"]), invert ? " with invert" : "");
  def.steps.push_back(std::move(split));
}

void read_pre_tokenizer(const json& p, TokenizerDefinition& def, const std::string& where,
                        bool& byte_level) {
  check(!p.is_null(), Exit::data, "{}: null is not supported; ByteLevel is needed", where);
  const std::string type = text_of(p, "type", where);
  check(!byte_level, Exit::data, "{}: {} after ByteLevel is not supported; make ByteLevel the last",
        where, shown(p["type"]));
  if (type == "Sequence") {
    const json& list = member(p, "pretokenizers");
    check_list(list, where + ".pretokenizers");
    for (size_t i = 0; i < list.size(); ++i)
      read_pre_tokenizer(list[i], def, fmt::format("{}.pretokenizers[{}]", where, i), byte_level);
  } else if (type == "ByteLevel") {
    check(!flag(p, "add_prefix_space", true, where), Exit::data,
          "{}.add_prefix_space: true is not supported: it adds spaces to the text; set it to false",
          where);
    if (flag(p, "use_regex", true, where)) def.steps.push_back({kGpt2Pattern, false});
    byte_level = true;
  } else if (type == "Split") {
    read_split(p, def, where);
  } else if (type == "Digits") {
    def.steps.push_back({R"(\p{N})", !flag(p, "individual_digits", false, where)});
  } else {
    fail(Exit::data,
         "{}.type: {} is not supported; supported are ByteLevel, Split, Digits and Sequence", where,
         shown(p["type"]));
  }
}

void read_added(const json& list, TokenizerDefinition& def, const std::string& path) {
  if (list.is_null()) return;
  check_list(list, path + ": added_tokens");
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string where = fmt::format("{}: added_tokens[{}]", path, i);
    const json& t = list[i];
    AddedToken a;
    a.content = text_of(t, "content", where);
    check(!a.content.empty(), Exit::data, "{}.content is empty; remove the token", where);
    const json& id = member(t, "id");
    check(id.is_number_integer() && id.get<int64_t>() >= 0 && id.get<int64_t>() < INT32_MAX,
          Exit::data, "{}.id: {} is not an id", where, shown(id));
    a.id = id.get<int32_t>();
    a.special = flag(t, "special", false, where);
    a.single_word = flag(t, "single_word", false, where);
    a.lstrip = flag(t, "lstrip", false, where);
    a.rstrip = flag(t, "rstrip", false, where);
    a.normalized = flag(t, "normalized", !a.special, where);
    def.added.push_back(std::move(a));
  }
}

}  // namespace

TokenizerDefinition read_tokenizer_json(std::string_view text, const std::string& path) {
  TokenizerDefinition def;
  def.file = def.merges_file = path;
  def.merge_unit = "merge";
  Reader reader(text, path, def, "model.vocab", "model.merges");
  parse(reader, text, path);
  const json& j = reader.rest;
  check(j.is_object(), Exit::data, "{}: not a JSON object, so no tokenizer.json", path);
  read_model(member(j, "model"), def, path);
  check(reader.saw_vocab, Exit::data, "{}: model.vocab is missing or no object", path);
  check(reader.saw_merges, Exit::data, "{}: model.merges is missing or no list", path);
  read_normalizer(member(j, "normalizer"), def, path + ": normalizer");
  bool byte_level = false;
  read_pre_tokenizer(member(j, "pre_tokenizer"), def, path + ": pre_tokenizer", byte_level);
  check(byte_level, Exit::data,
        "{}: pre_tokenizer: ByteLevel is missing; only byte-level BPE is supported", path);
  read_added(member(j, "added_tokens"), def, path);
  // post_processor, decoder, truncation and padding do not change which tokens a text has.
  return def;
}

TokenizerDefinition read_gpt2_files(std::string_view vocab, const std::string& vocab_path,
                                    std::string_view merges, const std::string& merges_path) {
  TokenizerDefinition def;
  def.file = vocab_path;
  def.merges_file = merges_path;
  Reader reader(vocab, vocab_path, def, "", "\n");  // no list of merges in this file
  parse(reader, vocab, vocab_path);
  check(reader.saw_vocab, Exit::data, "{}: not a JSON object of tokens and ids", vocab_path);

  size_t line_number = 0;
  for (size_t at = 0; at < merges.size();) {
    const size_t end = std::min(merges.find('\n', at), merges.size());
    std::string_view line = merges.substr(at, end - at);
    at = end + 1;
    ++line_number;
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (line.substr(0, 8) == "#version" || (line.empty() && at >= merges.size())) continue;
    const size_t space = line.find(' ');
    const bool two = space != std::string_view::npos && space > 0 && space + 1 < line.size() &&
                     line.find(' ', space + 1) == std::string_view::npos;
    check(two, Exit::data, "{}:{}: \"{}\" is not two tokens with a space between", merges_path,
          line_number, line.substr(0, 80));
    def.merges.push_back(
        {std::string(line.substr(0, space)), std::string(line.substr(space + 1)), line_number});
  }
  def.steps.push_back({kGpt2Pattern, false});
  def.end_of_text = "<|endoftext|>";
  for (const auto& [token, id] : def.vocab)
    if (token == def.end_of_text && id >= 0 && id < INT32_MAX)
      def.added.push_back({token, int32_t(id), false, false, false, false, true});
  check(!def.added.empty(), Exit::data,
        "{}: the token \"<|endoftext|>\" is missing; add it with the next free id", vocab_path);
  return def;
}

std::string read_eos_token(std::string_view text, const std::string& path) {
  TokenizerDefinition unused;
  Reader reader(text, path, unused, "\n", "\n");
  parse(reader, text, path);
  const json& eos = member(reader.rest, "eos_token");
  if (eos.is_string()) return eos.get<std::string>();
  const json& content = member(eos, "content");
  return content.is_string() ? content.get<std::string>() : "";
}

}  // namespace hgrn
