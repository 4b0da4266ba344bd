#include "text/shard_manifest.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "core/check.h"
#include "core/file.h"
#include "core/json_text.h"

namespace hgrn {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kVersion = 1;

// Reads one object, naming what is wrong.
class Reader {
 public:
  Reader(const Json& j, std::string where) : j_(j), where_(std::move(where)) {
    check(j.is_object(), Exit::data, "{}: not a JSON object; tokenize again", where_);
  }
  const Json& at(const char* key) const {
    const auto it = j_.find(key);
    check(it != j_.end(), Exit::data, "{}: no key \"{}\"; tokenize again", where_, key);
    return *it;
  }
  std::string text(const char* key) const {
    check(at(key).is_string(), Exit::data, "{}: \"{}\" is not a text", where_, key);
    return at(key).get<std::string>();
  }
  std::string text_or_null(const char* key) const { return at(key).is_null() ? "" : text(key); }
  int64_t number(const char* key) const {
    const bool good = at(key).is_number_integer() && at(key).get<int64_t>() >= 0;
    check(good, Exit::data, "{}: \"{}\" is not a whole number", where_, key);
    return at(key).get<int64_t>();
  }
  bool flag(const char* key) const {
    check(at(key).is_boolean(), Exit::data, "{}: \"{}\" is not true or false", where_, key);
    return at(key).get<bool>();
  }
  double fraction(const char* key) const {
    check(at(key).is_number(), Exit::data, "{}: \"{}\" is not a number", where_, key);
    return at(key).get<double>();
  }
  uint64_t hash(const char* key) const {
    const std::string s = text(key);
    uint64_t h = 0;
    const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), h, 16);
    const bool good = error == std::errc() && end == s.data() + s.size() && s.size() == 16;
    check(good, Exit::data, "{}: \"{}\" is not 16 hexadecimal digits", where_, key);
    return h;
  }
  Reader object(const char* key) const { return {at(key), where_ + ":" + key}; }
  std::vector<Reader> list(const char* key) const {
    check(at(key).is_array(), Exit::data, "{}: \"{}\" is not a list", where_, key);
    std::vector<Reader> out;
    for (const Json& e : at(key)) out.emplace_back(e, where_ + ":" + key);
    return out;
  }
  const std::string& where() const { return where_; }

 private:
  const Json& j_;
  std::string where_;
};

Json or_null(const std::string& s) {
  return s.empty() ? Json() : Json(s);
}

const char* ends_name(const ShardManifest& m) {
  return m.line_end_token ? "lines" : "documents";
}

ShardManifest::Part read_part(const Reader& r, const std::string& name, const char* ends) {
  ShardManifest::Part part{name, {}};
  for (const Reader& s : r.list("shards")) {
    ShardManifest::Shard& shard = part.shards.emplace_back();
    shard = {s.text("file"), s.number("tokens"), s.number("bytes"), s.number(ends), s.hash("xxh3")};
    const bool plain = !shard.file.empty() && shard.file.find('/') == std::string::npos;
    check(plain, Exit::data, "{}: \"file\" is not a plain file name: {}", s.where(), shard.file);
  }
  return part;
}

}  // namespace

ShardManifest::Shard ShardManifest::Part::total() const {
  Shard sum;
  for (const Shard& s : shards) sum.tokens += s.tokens, sum.bytes += s.bytes, sum.ends += s.ends;
  return sum;
}

std::string shard_manifest_to_json(const ShardManifest& m) {
  Json j;
  j["format"] = kShardManifestFormat;
  j["version"] = kVersion;
  j["program"] = m.program;
  Json& t = j["tokenizer"];
  t = {{"name", m.tokenizer},
       {"vocab_size", m.vocab_size},
       {"end_of_text", m.eos},
       {"fingerprint", hex16(m.fingerprint)}};
  t["files"] = Json::array();
  for (const ShardManifest::File& f : m.tokenizer_files)
    t["files"].push_back({{"name", f.name}, {"bytes", f.bytes}, {"xxh3", hex16(f.xxh3)}});
  j["options"] = {{"line_end_token", m.line_end_token},
                  {"special_tokens", m.special_tokens},
                  {"document_separator", or_null(m.document_separator)},
                  {"json_key", or_null(m.json_key)},
                  {"shard_tokens", m.shard_tokens},
                  {"valid_fraction", m.valid_fraction}};
  j["inputs"] = Json::array();
  for (const ShardManifest::File& f : m.inputs)
    j["inputs"].push_back({{"path", f.name}, {"bytes", f.bytes < 0 ? Json() : Json(f.bytes)}});
  const auto counts = [&](const ShardManifest::Shard& s) {
    return Json{{"tokens", s.tokens}, {"bytes", s.bytes}, {ends_name(m), s.ends}};
  };
  for (const ShardManifest::Part& part : m.parts) {
    Json& p = j["parts"][part.name] = counts(part.total());
    p["shards"] = Json::array();
    for (const ShardManifest::Shard& s : part.shards) {
      Json shard = {{"file", s.file}};
      shard.update(counts(s));
      shard["xxh3"] = hex16(s.xxh3);
      p["shards"].push_back(shard);
    }
  }
  return j.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

bool is_shard_manifest(std::string_view start) {
  const size_t brace = start.find('{');
  return brace != std::string_view::npos && brace < 16 &&
         start.substr(0, 128).find(kShardManifestFormat) != std::string_view::npos;
}

ShardManifest shard_manifest_from_json(std::string_view text, const std::string& path) {
  const Json j = parse_json(text, path);
  const Reader r(j, path);
  check(r.text("format") == kShardManifestFormat, Exit::data,
        "{}: \"format\" is not \"{}\": not a manifest of token shards", path, kShardManifestFormat);
  check(r.number("version") == kVersion, Exit::data,
        "{}: version {} is not known, {} is; use the program that wrote it", path,
        r.number("version"), kVersion);
  ShardManifest m;
  m.program = r.text("program");
  const Reader t = r.object("tokenizer");
  m.tokenizer = t.text("name");
  m.vocab_size = t.number("vocab_size");
  m.eos = t.number("end_of_text");
  m.fingerprint = t.hash("fingerprint");
  for (const Reader& f : t.list("files"))
    m.tokenizer_files.push_back({f.text("name"), f.number("bytes"), f.hash("xxh3")});
  const Reader o = r.object("options");
  m.line_end_token = o.flag("line_end_token");
  m.special_tokens = o.flag("special_tokens");
  m.document_separator = o.text_or_null("document_separator");
  m.json_key = o.text_or_null("json_key");
  m.shard_tokens = o.number("shard_tokens");
  m.valid_fraction = o.fraction("valid_fraction");
  for (const Reader& f : r.list("inputs"))
    m.inputs.push_back({f.text("path"), f.at("bytes").is_null() ? -1 : f.number("bytes"), 0});
  const Reader parts = r.object("parts");
  for (const auto& [name, part] : r.at("parts").items())
    m.parts.push_back(read_part(parts.object(name.c_str()), name, ends_name(m)));
  return m;
}

}  // namespace hgrn
