#include "text/tokenize.h"

#include <algorithm>
#include <random>
#include <sstream>

#include "catch.h"
#include "text/shard.h"
#include "text/shard_files.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int32_t E = 256;

std::vector<int32_t> bytes_of(std::string_view text) {
  std::vector<int32_t> tokens;
  for (char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

// "a|b" means: token a, end-of-text, token b.
std::vector<int32_t> stream(const std::string& text) {
  std::vector<int32_t> tokens = bytes_of(text);
  for (int32_t& token : tokens)
    if (token == '|') token = E;
  return tokens;
}

std::vector<int32_t> encode(const Tokenizer& tokenizer, const EncodeOptions& options,
                            EncodeReport* report = nullptr) {
  std::vector<int32_t> all;
  const EncodeReport r = encode_files(tokenizer, options, [&](std::span<const int32_t> tokens) {
    all.insert(all.end(), tokens.begin(), tokens.end());
  });
  CHECK(r.tokens == int64_t(all.size()));
  if (report) *report = r;
  return all;
}

std::vector<int32_t> tokens_of(const std::vector<std::string>& shards) {
  std::vector<int32_t> all;
  for (const std::string& path : shards) {
    const Shard shard(path);
    std::vector<int32_t> tokens(static_cast<size_t>(shard.count()));
    shard.read(0, shard.count(), tokens.data());
    all.insert(all.end(), tokens.begin(), tokens.end());
  }
  return all;
}

// One token a word or run of spaces (its length, its first byte): where a text is cut matters, as
// it does for BPE. A cut is safe between a letter and a space.
class RunTokenizer final : public Tokenizer {
 public:
  static bool space(char c) { return c == ' ' || c == '\n'; }
  void encode(std::string_view text, std::vector<int32_t>& out) const override {
    for (size_t i = 0, n; i < text.size(); i += n) {
      for (n = 1; i + n < text.size() && space(text[i + n]) == space(text[i]);) ++n;
      out.push_back(int32_t(n) * 256 + static_cast<unsigned char>(text[i]));
    }
  }
  std::string decode(std::span<const int32_t>) const override { return {}; }
  size_t safe_prefix(std::string_view text) const override {
    for (size_t n = text.size(); n-- > 1;)
      if (space(text[n]) && !space(text[n - 1])) return n;
    return 0;
  }
  int64_t vocab_size() const override { return int64_t(1) << 31; }
  int32_t eos() const override { return 0; }
  std::string name() const override { return "runs"; }
  std::vector<TokenizerFile> files() const override { return {}; }
  uint64_t fingerprint() const override { return 1; }
};

// Several pieces' worth of text with long and short documents, lines and runs of spaces.
std::string long_text(unsigned seed, size_t size) {
  std::mt19937 random(seed);
  std::string text;
  while (text.size() < size) {
    const unsigned what = random() % 1000;
    if (what < 700) text += std::string(1 + random() % 9, char('a' + random() % 26));
    if (what < 900) text += std::string(1 + random() % 3, ' ');
    if (what >= 990) text += "\n\n";
    if (what == 980) text += std::string(random() % 5000, ' ');
    if (what == 981) text += "\xe2\x80\x83";
  }
  return text;
}

}  // namespace

TEST_CASE("documents: one end-of-text before each, none for empty ones", "[text]") {
  TempFolder folder;
  const auto byte = open_tokenizer("byte");
  write_bytes(folder / "a", "one\ntwo\n");
  write_bytes(folder / "b", "");
  write_bytes(folder / "c", "x##y##y#y####z##");
  EncodeReport report;
  CHECK(encode(*byte, {{folder / "a", folder / "b", folder / "c"}, false, "", 1}, &report) ==
        stream("|one\ntwo\n|x##y##y#y####z##"));
  CHECK(report.documents == 2);
  CHECK(report.bytes == 8 + 16);
  CHECK(encode(*byte, {{folder / "c"}, false, "##", 1}, &report) == stream("|x|y|y#y|z"));
  CHECK(report.documents == 4);
}

TEST_CASE("lines: stripped, one end-of-text after each, empty lines too", "[text]") {
  TempFolder folder;
  const auto byte = open_tokenizer("byte");
  EncodeReport report;
  struct Case {
    std::string text, tokens;
  };
  for (const Case& c :
       {Case{" = Title = \n\n  b c\t\r\nlast", "= Title =||b c|last|"}, Case{"a\n", "a|"},
        Case{"a\n\n", "a||"}, Case{"", ""}, Case{"\n", "|"}, Case{" ", "|"}, Case{"a\n ", "a||"},
        Case{"\xe2\x80\x83\xc2\xa0x\xe3\x80\x80\ny\xc3\xa9", "x|y\xc3\xa9|"}}) {
    write_bytes(folder / "a", c.text);
    INFO(c.text);
    CHECK(encode(*byte, {{folder / "a"}, true, "", 1}, &report) == stream(c.tokens));
    CHECK(report.lines == std::count(c.tokens.begin(), c.tokens.end(), '|'));
  }
  write_bytes(folder / "a", "a");  // a file's end ends its last line
  write_bytes(folder / "b", "b");
  CHECK(encode(*byte, {{folder / "a", folder / "b"}, true, "", 1}) == stream("a|b|"));
}

TEST_CASE("strip takes Unicode whitespace, whole characters only", "[text]") {
  CHECK(strip(" \t\x1c a b \n") == "a b");
  CHECK(strip("\xc2\x85\xe1\x9a\x80x\xe2\x80\xa8\xe2\x81\x9f") == "x");
  CHECK(strip("\xe2\x80\x8b") == "\xe2\x80\x8b");    // zero-width space is not White_Space
  CHECK(strip("\xa0x\x80\x83") == "\xa0x\x80\x83");  // not UTF-8
  CHECK(strip("\xe2\x80") == "\xe2\x80");
  CHECK(strip("").empty());
  CHECK(strip("\xe3\x80\x80").empty());
}

TEST_CASE("long texts are encoded in pieces with the same result, for any number of jobs",
          "[text]") {
  TempFolder folder;
  const std::string text = long_text(1, 5'000'000);
  write_bytes(folder / "a", text);
  const RunTokenizer runs;

  std::vector<int32_t> whole = {runs.eos()};
  runs.encode(text, whole);
  for (int jobs : {1, 3}) CHECK(encode(runs, {{folder / "a"}, false, "", jobs}) == whole);

  std::vector<int32_t> split;
  for (size_t begin = 0, end; begin < text.size(); begin = end + 2) {
    end = std::min(text.find("\n\n", begin), text.size());
    if (end == begin) continue;
    split.push_back(runs.eos());
    runs.encode(std::string_view(text).substr(begin, end - begin), split);
  }
  for (int jobs : {1, 2}) CHECK(encode(runs, {{folder / "a"}, false, "\n\n", jobs}) == split);

  std::vector<int32_t> lined;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    runs.encode(strip(line), lined);
    lined.push_back(runs.eos());
  }
  for (int jobs : {1, 2}) CHECK(encode(runs, {{folder / "a"}, true, "", jobs}) == lined);
}

TEST_CASE("one line longer than a piece is stripped at its real ends only", "[text]") {
  TempFolder folder;
  const auto byte = open_tokenizer("byte");
  const std::string wide_space = "\xe2\x80\x83";
  // The whitespace runs cross the places where the file is read in pieces.
  for (size_t shift : {0, 1, 2, 3}) {
    const std::string inner = std::string((1 << 20) - 8 + shift, 'x') + wide_space + wide_space +
                              std::string(3'000'000, ' ') + "y" + std::string(1 << 20, 'z');
    std::string text = std::string(1'500'000, ' ') + wide_space + inner;
    for (int i = 0; i < 700'000; ++i) text += wide_space;
    text += "\nnext";
    write_bytes(folder / "a", text);
    CHECK(encode(*byte, {{folder / "a"}, true, "", 1}) == stream(inner + "|next|"));
  }
}

TEST_CASE("a text that cannot be cut is encoded whole", "[text]") {
  TempFolder folder;
  const RunTokenizer runs;
  write_bytes(folder / "a", std::string(5'000'000, 'x'));
  CHECK(encode(runs, {{folder / "a"}, false, "", 2}) ==
        std::vector<int32_t>{0, 5'000'000 * 256 + 'x'});
}

TEST_CASE("tokenize writes a set of shards that holds the stream", "[text]") {
  TempFolder folder;
  write_bytes(folder / "a.txt", "hello");
  write_bytes(folder / "b.txt", "world!");
  TokenizeOptions options;
  options.files = {folder / "a.txt", folder / "b.txt"};
  options.out = folder / "new/set";
  options.shard_tokens = 5;
  int calls = 0;
  options.progress = [&](const TokenizeProgress& progress) {
    ++calls;
    CHECK(progress.total_bytes == 11);
    CHECK_FALSE(progress.str().empty());
  };
  TokenizeReport report = tokenize(options);
  CHECK(calls >= 1);
  CHECK(report.shards == std::vector<std::string>{folder / "new/set_000000.bin",
                                                  folder / "new/set_000001.bin",
                                                  folder / "new/set_000002.bin"});
  CHECK(tokens_of(report.shards) == stream("|hello|world!"));
  CHECK(Shard(report.shards[0]).count() == 5);
  CHECK(Shard(report.shards[2]).count() == 3);
  CHECK_FALSE(Shard(report.shards[0]).wide());
  CHECK(report.vocab_size == 257);
  CHECK(report.encoded.documents == 2);
  CHECK(report.removed.empty());

  SECTION("a shorter set leaves none of the longer one behind") {
    options.shard_tokens = 100;
    report = tokenize(options);
    CHECK(report.shards.size() == 1);
    CHECK(report.removed.size() == 2);
    CHECK(tokens_of(expand_glob(folder / "new/set_*.bin", "k")) == stream("|hello|world!"));
  }
  SECTION("a set that fills its last shard has no empty one") {
    options.shard_tokens = 13;
    CHECK(tokenize(options).shards.size() == 1);
  }
  SECTION("without a prefix the first file gives it") {
    options.out.clear();
    report = tokenize(options);
    CHECK(report.shards[0] == folder / "a_000000.bin");
    CHECK(report.manifest == folder / "a.json");
  }
}

TEST_CASE("jobs change no byte of the shards", "[text]") {
  TempFolder folder;
  write_bytes(folder / "a.txt", long_text(2, 3'000'000));
  TokenizeOptions options;
  options.files = {folder / "a.txt"};
  options.shard_tokens = 1'000'000;
  options.document_separator = "\n\n";
  std::vector<std::vector<std::string>> bytes;
  for (int jobs : {1, 2, 5}) {
    options.jobs = jobs;
    options.out = folder / fmt::format("j{}", jobs);
    std::vector<std::string>& files = bytes.emplace_back();
    for (const std::string& shard : tokenize(options).shards) files.push_back(read_bytes(shard));
  }
  CHECK(bytes[0].size() == 3);
  CHECK(bytes[0] == bytes[1]);
  CHECK(bytes[0] == bytes[2]);
}

TEST_CASE("tokenize refuses what it cannot do, and leaves nothing behind", "[text]") {
  TempFolder folder;
  write_bytes(folder / "a.txt", "text");
  write_bytes(folder / "empty.txt", "");
  const auto refused = [&](const std::function<void(TokenizeOptions&)>& change) {
    TokenizeOptions options;
    options.files = {folder / "a.txt"};
    options.out = folder / "out";
    change(options);
    return error_of([&] { tokenize(options); });
  };
  CHECK(refused([](auto& o) { o.files.clear(); }).code() == Exit::usage);
  CHECK(refused([](auto& o) { o.shard_tokens = 1; }).code() == Exit::usage);
  CHECK(refused([](auto& o) { o.jobs = 0; }).code() == Exit::usage);
  CHECK(refused([](auto& o) { o.line_end_token = true, o.document_separator = "x"; }).code() ==
        Exit::usage);
  const Error absent = refused([&](auto& o) { o.files.push_back(folder / "absent.txt"); });
  CHECK(absent.code() == Exit::data);
  CHECK(has(absent, "absent.txt"));
  CHECK(refused([&](auto& o) { o.files = {folder / ""}; }).code() == Exit::data);
  CHECK(refused([&](auto& o) { o.files = {folder / "empty.txt"}; }).code() == Exit::data);
  CHECK(refused([&](auto& o) { o.out = folder / "a.txt/x"; }).code() == Exit::failed);
  CHECK(folder.files() == 2);
}

TEST_CASE("an error leaves the earlier set as it was", "[text]") {
  TempFolder folder;
  write_bytes(folder / "a.txt", "hello");
  write_bytes(folder / "b.txt", std::string(3'000'000, 'x'));
  TokenizeOptions options;
  options.files = {folder / "a.txt"};
  options.out = folder / "set";
  tokenize(options);
  const std::string before = read_bytes(folder / "set_000000.bin");
  options.files = {folder / "b.txt"};
  options.shard_tokens = 1000;
  options.progress = [](const TokenizeProgress& p) {  // after shards of the new set are complete
    check(p.tokens < 1'500'000, Exit::failed, "stop");
  };
  CHECK(has(error_of([&] { tokenize(options); }), "stop"));
  CHECK(read_bytes(folder / "set_000000.bin") == before);
  CHECK(folder.files() == 4);  // two texts, the shard and its manifest
}

TEST_CASE("the progress line shows share, speed and time left", "[text]") {
  TokenizeProgress progress{50'000'000, 200'000'000, 12, 10};
  CHECK(progress.eta_s() == Approx(30));
  CHECK(progress.str() == "50.0 of 200.0 MB (25%), 12 tokens, 5.0 MB/s, ETA 0:00:30");
  CHECK(TokenizeProgress{}.eta_s() < 0);
  CHECK(TokenizeProgress{2'000'000, 0, 7, 0}.str() == "2.0 MB, 7 tokens");
}
