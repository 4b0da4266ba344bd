// `hgrn tokenize` beyond plain texts: JSON lines, the split into training and validation, the
// manifest beside the shards, and what is left of earlier sets.
#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "catch.h"
#include "core/file.h"
#include "text/json_document.h"
#include "text/shard.h"
#include "text/shard_files.h"
#include "text/shard_manifest.h"
#include "text/tokenize.h"
#include "train/inspect.h"

using namespace hgrn;
using namespace hgrn::test;
using nlohmann::json;

namespace {

std::vector<int32_t> tokens_of(const std::string& glob) {
  std::vector<int32_t> all;
  for (const std::string& path : expand_glob(glob, "test")) {
    const Shard shard(path);
    const size_t before = all.size();
    all.resize(before + size_t(shard.count()));
    shard.read(0, shard.count(), all.data() + before);
  }
  return all;
}

// The documents of a byte-tokenizer set, by text.
std::vector<std::string> documents_of(const std::string& glob) {
  std::vector<std::string> out;
  for (int32_t token : tokens_of(glob)) {
    if (token == 256) out.emplace_back();
    if (token != 256) out.back().push_back(char(token));
  }
  return out;
}

TokenizeOptions options_for(const TempFolder& folder, const std::vector<std::string>& files) {
  TokenizeOptions o;
  for (const std::string& f : files) o.files.push_back(folder / f);
  o.out = folder / "set";
  return o;
}

std::vector<std::string> random_documents(unsigned seed, size_t count, size_t longest) {
  std::mt19937 random(seed);
  std::vector<std::string> out;
  for (size_t i = 0; i < count; ++i) {
    std::string d(1 + random() % longest, ' ');
    for (char& c : d) c = "abcdef \n\"\\"[random() % 10];
    out.push_back(d + std::to_string(i));
  }
  return out;
}

std::string json_lines(const std::vector<std::string>& documents) {
  std::string lines;
  for (const std::string& d : documents)
    lines += json{{"id", 7}, {"text", d}, {"meta", {{"text", "not this"}}}}.dump() + "\n";
  return lines;
}

}  // namespace

TEST_CASE("json lines: the text under the key, and nothing else", "[text]") {
  const auto text = [](const std::string& line) {
    return json_document(line, "text", "f.jsonl", 3);
  };
  CHECK(text(R"({"text": "a\u00e9\n\"", "n": 1})") == "a\xc3\xa9\n\"");
  CHECK(text(R"( {"meta": {"text": 1}, "l": [{"text": "x"}], "text": "y", "z": null})"
             "\r") == "y");
  CHECK(text(R"({"text": "\ud83d\udc4d"})") == "\xf0\x9f\x91\x8d");
  CHECK(text(R"({"text": ""})").empty());
  const auto refused = [&](const std::string& line, const std::string& part) {
    const Error e = error_of([&] { text(line); });
    INFO(line << ": " << e.what());
    CHECK(e.code() == Exit::data);
    CHECK(has(e, "f.jsonl:3: "));
    CHECK(has(e, part));
  };
  refused(R"({"text": "a)", "not valid JSON at byte 12");
  refused(R"({"text": "a"} {)", "not valid JSON");
  refused("{\"text\": \"\xff\"}", "not valid JSON");
  refused(R"({"text": "\ud800"})", "not valid JSON");
  refused(R"(["text"])", "not a JSON object");
  refused("3", "not a JSON object");
  refused(R"({"body": "a", "n": {"text": "b"}})", "no key \"text\"; the line has body, n");
  refused("{}", "the line has none");
  refused(R"({"text": null})", "\"text\" is null");
  refused(R"({"text": 3})", "a number");
  refused(R"({"text": ["a"]})", "a list");
  refused(R"({"text": {"text": "a"}})", "an object");
  refused(R"({"text": "a", "text": "b"})", "twice");
}

TEST_CASE("json lines: each object is a document, for any number of jobs", "[text]") {
  TempFolder folder;
  std::vector<std::string> documents = random_documents(3, 4000, 900);
  documents[17] = std::string(2'500'000, 'x');  // longer than a piece
  const std::string lines = json_lines(documents);
  write_bytes(folder / "a.jsonl", "\n" + lines.substr(0, lines.size() - 1));  // no last newline
  write_bytes(folder / "b.jsonl", "{\"text\":\"\"}\r\n\r\n{\"text\":\"last\"}\r\n");
  documents.push_back("last");
  TokenizeOptions o = options_for(folder, {"a.jsonl", "b.jsonl"});
  o.json_key = "text";
  for (int jobs : {1, 3}) {
    o.jobs = jobs;
    const TokenizeReport r = tokenize(o);
    CHECK(documents_of(folder / "set_*.bin") == documents);
    CHECK(r.encoded.documents == int64_t(documents.size()));
  }
  write_bytes(folder / "b.jsonl", "{\"text\":\"\"}\n\n{\"txt\":\"last\"}\n");
  const Error e = error_of([&] { tokenize(o); });
  CHECK(e.code() == Exit::data);
  CHECK(has(e, "b.jsonl:3: no key"));
  for (auto* wrong : {"line", "separator"}) {
    TokenizeOptions w = o;
    if (std::string(wrong) == "line")
      w.line_end_token = true;
    else
      w.document_separator = "x";
    CHECK(error_of([&] { tokenize(w); }).code() == Exit::usage);
  }
}

TEST_CASE("split: a document's part depends on the document alone", "[text]") {
  TempFolder folder;
  std::vector<std::string> documents = random_documents(4, 3000, 60);
  for (int i = 0; i < 12; ++i)  // longer than what is hashed; alike but for the end or the start
    documents.push_back((i % 2 ? std::to_string(i) : "") + std::string(1'200'000, char('a' + i)) +
                        " end");
  std::map<std::string, bool> valid;
  const auto run = [&](const std::vector<std::string>& all, int jobs, bool as_json,
                       double fraction) {
    const size_t half = all.size() / 2;
    const std::vector<std::string> a(all.begin(), all.begin() + int64_t(half)),
        b(all.begin() + int64_t(half), all.end());
    const auto plain = [](const std::vector<std::string>& of) {
      std::string text;
      for (const std::string& d : of) text += (text.empty() ? "" : "#~#") + d;
      return text;
    };
    write_bytes(folder / "a", as_json ? json_lines(a) : plain(a));
    write_bytes(folder / "b", as_json ? json_lines(b) : plain(b));
    TokenizeOptions o = options_for(folder, {"a", "b"});
    o.jobs = jobs;
    o.valid_fraction = fraction;
    (as_json ? o.json_key : o.document_separator) = as_json ? "text" : "#~#";
    const TokenizeReport r = tokenize(o);
    const auto train = documents_of(folder / "set_train_*.bin");
    const auto held = documents_of(folder / "set_valid_*.bin");
    CHECK(train.size() + held.size() == all.size());
    CHECK(r.encoded.valid_documents == int64_t(held.size()));
    CHECK(r.encoded.documents == int64_t(all.size()));
    // In the order of the input, within each part.
    std::vector<std::string> merged;
    std::map<std::string, bool> parts;
    for (const auto& d : train) parts[d] = false;
    for (const auto& d : held) parts[d] = true;
    size_t t = 0, h = 0;
    for (const std::string& d : all) {
      const bool held_out = parts.at(d);
      CHECK((held_out ? held.at(h++) : train.at(t++)) == d);
    }
    return parts;
  };
  const auto first = run(documents, 1, false, 0.1);
  const auto share = std::count_if(first.begin(), first.end(), [](auto& p) { return p.second; });
  CHECK(share > 3012 * 0.07);
  CHECK(share < 3012 * 0.13);
  std::shuffle(documents.begin(), documents.end(), std::mt19937(1));
  CHECK(run(documents, 3, false, 0.1) == first);
  CHECK(run(documents, 2, true, 0.1) == first);
  // A larger fraction takes more, and all that the smaller one took.
  const auto more = run(documents, 2, true, 0.5);
  for (const auto& [document, held_out] : first) CHECK((!held_out || more.at(document)));

  TokenizeOptions o = options_for(folder, {"a"});
  o.valid_fraction = 0.5;
  o.line_end_token = true;
  CHECK(has(error_of([&] { tokenize(o); }), "--valid-fraction"));
  o.line_end_token = false;
  for (double x : {-0.1, 1.0, 1.5}) {
    o.valid_fraction = x;
    CHECK(error_of([&] { tokenize(o); }).code() == Exit::usage);
  }
}

TEST_CASE("manifest: counts of every shard and of the whole, checksums, options", "[text]") {
  TempFolder folder;
  std::vector<std::string> documents = random_documents(5, 300, 50);
  write_bytes(folder / "a", json_lines(documents));
  TokenizeOptions o = options_for(folder, {"a"});
  o.json_key = "text";
  o.shard_tokens = 1000;
  o.valid_fraction = 0.2;
  const TokenizeReport r = tokenize(o);
  REQUIRE(r.manifest == folder / "set.json");
  const std::string text = read_bytes(r.manifest);
  CHECK(is_shard_manifest(text));
  const json j = json::parse(text);
  CHECK(j["tokenizer"]["name"] == "byte");
  CHECK(j["tokenizer"]["vocab_size"] == 257);
  CHECK(j["options"]["json_key"] == "text");
  CHECK(j["options"]["document_separator"].is_null());
  CHECK(j["options"]["valid_fraction"] == 0.2);
  CHECK(j["inputs"][0]["bytes"] == read_bytes(folder / "a").size());
  int64_t shards = 0, documents_seen = 0, bytes = 0;
  for (const char* part : {"train", "valid"}) {
    const json& p = j["parts"][part];
    int64_t tokens = 0, ends = 0, spelled = 0;
    for (const json& s : p["shards"]) {
      const std::string file = folder / s["file"].get<std::string>();
      const std::vector<int32_t> held = tokens_of(file);
      const auto eos = std::count(held.begin(), held.end(), 256);
      CHECK(s["tokens"] == held.size());
      CHECK(s["documents"] == eos);
      CHECK(s["bytes"] == int64_t(held.size()) - eos);
      CHECK(s["xxh3"] == hex16(xxh3_file(file)));
      tokens += int64_t(held.size()), ends += eos, spelled += int64_t(held.size()) - eos;
      ++shards;
    }
    CHECK(p["tokens"] == tokens);
    CHECK(p["documents"] == ends);
    CHECK(p["bytes"] == spelled);
    documents_seen += ends, bytes += spelled;
  }
  CHECK(shards == int64_t(r.shards.size()));
  CHECK(shards > 4);
  CHECK(documents_seen == 300);
  int64_t of_all = 0;
  for (const std::string& d : documents) of_all += int64_t(d.size());
  CHECK(bytes == of_all);
  CHECK(shard_manifest_to_json(shard_manifest_from_json(text, "m")) == text);
  o.jobs = 3;
  tokenize(o);
  CHECK(read_bytes(r.manifest) == text);

  CHECK(inspect(r.manifest, true).find("verified") != std::string::npos);
  CHECK(inspect(r.manifest, false).find("300 documents") == std::string::npos);  // of parts
  put_token(r.shards[0], 3, 77);
  CHECK_NOTHROW(inspect(r.manifest, false));
  const Error wrong = error_of([&] { inspect(r.manifest, true); });
  CHECK(wrong.code() == Exit::data);
  CHECK(has(wrong, "set_train_000000.bin"));

  // Damaged manifests name the key.
  for (const char* key : {"version", "tokenizer", "options", "parts", "inputs", "program"}) {
    json damaged = j;
    damaged.erase(key);
    const Error e = error_of([&] { shard_manifest_from_json(damaged.dump(), "m.json"); });
    CHECK(e.code() == Exit::data);
    CHECK(has(e, key));
    CHECK(has(e, "m.json"));
  }
  json outside = j;
  outside["parts"]["train"]["shards"][0]["file"] = "../x.bin";
  CHECK(has(error_of([&] { shard_manifest_from_json(outside.dump(), "m"); }), "plain"));
}

TEST_CASE("sets: an earlier set of another shape is replaced whole", "[text]") {
  TempFolder folder;
  write_bytes(folder / "a", json_lines(random_documents(6, 200, 50)));
  TokenizeOptions o = options_for(folder, {"a"});
  o.json_key = "text";
  o.shard_tokens = 1500;
  const size_t plain = tokenize(o).shards.size();
  REQUIRE(plain > 2);
  write_bytes(folder / "set_extra.bin", "not of the set");
  o.valid_fraction = 0.3;
  const TokenizeReport r = tokenize(o);
  CHECK(r.removed.size() == plain);
  CHECK(folder.files() == 1 + 1 + 1 + r.shards.size());  // input, extra, manifest, shards
  o.valid_fraction = 0;
  CHECK(tokenize(o).removed.size() == r.shards.size());
  CHECK(read_bytes(folder / "set_extra.bin") == "not of the set");

  // A damaged manifest of an earlier set is no obstacle; another JSON file is not touched.
  write_bytes(folder / "set.json", R"({"format": "hgrn-token-shards", "version": )");
  CHECK(tokenize(o).shards.size() == plain);
  write_bytes(folder / "set.json", R"({"text": "mine"})");
  const Error e = error_of([&] { tokenize(o); });
  CHECK(e.code() == Exit::usage);
  CHECK(has(e, "set.json"));
  CHECK(has(e, "--out"));
  CHECK(read_bytes(folder / "set.json") == R"({"text": "mine"})");
}

TEST_CASE("sets: what a killed run left is removed, what another one holds is not", "[text]") {
  TempFolder folder;
  write_bytes(folder / "a", "text");
  std::filesystem::create_directory(folder / "set.tmp-12345");
  write_bytes(folder / "set.tmp-12345/set_000000.bin", "half");
  std::filesystem::create_directory(folder / "set.tmp-67890");
  std::filesystem::create_directory(folder / "set.tmp-12x");
  std::filesystem::create_directory(folder / "settle.tmp-12345");
  const Fd held(::open((folder / "set.tmp-67890").c_str(), O_RDONLY | O_DIRECTORY));
  REQUIRE(::flock(held.get(), LOCK_EX) == 0);
  const TokenizeReport r = tokenize(options_for(folder, {"a"}));
  CHECK(r.stale == std::vector<std::string>{folder / "set.tmp-12345"});
  CHECK(folder.files() == 1 + 3 + 2);  // text, folders that stay, shard and manifest
}
