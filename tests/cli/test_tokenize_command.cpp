// The tokenize command as a process: texts through a pipe in constant memory, and what stands on
// the disk after it was killed, stopped, or ran out of space.
#include <sys/resource.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "catch.h"
#include "cli/program.h"
#include "core/file.h"
#include "text/shard.h"

using namespace hgrn;
using namespace hgrn::test;
namespace fs = std::filesystem;

namespace {

using Words = std::vector<std::string>;

// `hgrn tokenize WORDS` with its standard input held open by this process.
class Piped {
 public:
  Piped(const TempFolder& tmp, const Words& words, rlim_t file_bytes = RLIM_INFINITY)
      : err_(tmp / "stderr") {
    int ends[2];
    check(::pipe(ends) == 0, "no pipe");
    Words all = {HGRN_BINARY, "tokenize"};
    all.insert(all.end(), words.begin(), words.end());
    std::vector<char*> argv;
    for (std::string& w : all) argv.push_back(w.data());
    argv.push_back(nullptr);
    pid_ = ::fork();
    check(pid_ >= 0, "no fork");
    if (pid_ == 0) {
      ::dup2(ends[0], 0);
      ::close(ends[0]), ::close(ends[1]);
      const int null = ::open("/dev/null", O_RDWR);
      const int err = ::open(err_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
      ::dup2(null, 1), ::dup2(err, 2);
      const rlimit limit = {file_bytes, file_bytes};
      ::setrlimit(RLIMIT_FSIZE, &limit);
      ::signal(SIGXFSZ, SIG_IGN);  // the write then fails, as on a full disk
      ::execv(argv[0], argv.data());
      ::_exit(127);
    }
    ::close(ends[0]);
    to_ = ends[1];
    ::signal(SIGPIPE, SIG_IGN);
  }
  ~Piped() {
    end_input();
    if (pid_ > 0) ::kill(pid_, SIGKILL), ::waitpid(pid_, nullptr, 0);
  }
  Piped(const Piped&) = delete;
  Piped& operator=(const Piped&) = delete;

  bool give(const std::string& text) {
    for (size_t at = 0; at < text.size();) {
      const ssize_t n = ::write(to_, text.data() + at, text.size() - at);
      if (n <= 0) return false;
      at += size_t(n);
    }
    return true;
  }
  void end_input() {
    if (to_ >= 0) ::close(to_);
    to_ = -1;
  }
  void kill(int number) { ::kill(pid_, number); }
  Ended wait(int64_t* peak_bytes = nullptr) {
    int status = 0;
    rusage usage = {};
    ::wait4(pid_, &status, 0, &usage);
    pid_ = -1;
    if (peak_bytes) *peak_bytes = usage.ru_maxrss * 1024;
    Ended e;
    if (WIFEXITED(status)) e.code = WEXITSTATUS(status);
    if (WIFSIGNALED(status)) e.signal = WTERMSIG(status);
    e.err = slurp(err_);
    return e;
  }

 private:
  std::string err_;
  pid_t pid_ = -1;
  int to_ = -1;
};

// Names in the folder, without stderr's.
Words names(const TempFolder& folder) {
  Words out;
  for (const auto& e : fs::directory_iterator(folder.path()))
    if (e.path().filename() != "stderr") out.push_back(e.path().filename().string());
  std::sort(out.begin(), out.end());
  return out;
}

bool wait_for(const std::function<bool()>& condition) {
  for (int i = 0; i < 6000; ++i) {
    if (condition()) return true;
    ::usleep(5000);
  }
  return false;
}

std::string json_line(size_t bytes) {
  return "{\"text\": \"" + std::string(bytes, 'a') + " \\u00e9\"}\n";
}

}  // namespace

TEST_CASE("tokenize: the memory does not grow with the text", "[cli]") {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  WARN("skipped: a sanitizer keeps what is freed");
  return;
#endif
  const TempFolder tmp;
  const auto peak = [&](const Words& flags, const std::string& piece, size_t bytes) {
    Words words = {"--tokenizer", "byte", "--out", tmp / "set", "--jobs", "2"};
    words.insert(words.end(), flags.begin(), flags.end());
    words.push_back("-");
    Piped p(tmp, words);
    for (size_t given = 0; given < bytes; given += piece.size()) REQUIRE(p.give(piece));
    p.end_input();
    int64_t at_most = 0;
    const Ended e = p.wait(&at_most);
    INFO(e.err);
    REQUIRE(e.code == 0);
    return at_most;
  };
  constexpr size_t kSmall = 16 << 20, kLarge = 80 << 20;
  const std::string words(1 << 16, 'a'), line = json_line(5000);
  struct Case {
    const char* name;
    Words flags;
    const std::string& piece;
  };
  for (const Case& c :
       {Case{"one document", {}, words}, Case{"one line", {"--line-end-token"}, words},
        Case{"json lines", {"--json-key", "text", "--valid-fraction", "0.2"}, line}}) {
    INFO(c.name);
    const int64_t small = peak(c.flags, c.piece, kSmall), large = peak(c.flags, c.piece, kLarge);
    INFO(small << " bytes, then " << large);
    CHECK(large < small + (12 << 20));  // 64 MiB more of text
  }
}

TEST_CASE("tokenize: a killed run leaves the earlier set; the next one clears up", "[cli]") {
  const TempFolder tmp;
  const Words words = {"--tokenizer",    "byte",   "--out", tmp / "set",
                       "--shard-tokens", "100000", "-"};
  {
    Piped p(tmp, words);
    p.give("first");
    p.end_input();
    REQUIRE(p.wait().code == 0);
  }
  const std::string shard = slurp(tmp / "set_000000.bin"), manifest = slurp(tmp / "set.json");
  const Words whole = names(tmp);
  CHECK(whole == Words{"set.json", "set_000000.bin"});
  const auto begun = [&] {  // shards of the new set are complete, in its folder
    for (const std::string& n : names(tmp))
      if (n.rfind("set.tmp-", 0) == 0) return fs::exists(tmp / (n + "/set_000003.bin"));
    return false;
  };
  const auto start = [&](Piped& p) {
    REQUIRE(p.give(std::string(3'000'000, 'x')));
    REQUIRE(wait_for(begun));
    CHECK(slurp(tmp / "set_000000.bin") == shard);
  };
  for (int number : {SIGTERM, SIGINT}) {  // clears up by itself
    Piped p(tmp, words);
    start(p);
    p.kill(number);
    const Ended e = p.wait();
    CHECK(e.signal == number);
    CHECK(e.says("no shard was written"));
    CHECK(names(tmp) == whole);
  }
  {
    Piped p(tmp, words);
    start(p);
    p.kill(SIGKILL);
    CHECK(p.wait().signal == SIGKILL);
  }
  CHECK(names(tmp).size() == whole.size() + 1);
  CHECK(slurp(tmp / "set_000000.bin") == shard);
  CHECK(slurp(tmp / "set.json") == manifest);
  Piped p(tmp, words);
  p.give("second");
  p.end_input();
  const Ended e = p.wait();
  CHECK(e.code == 0);
  CHECK(e.says("a run that was killed left it"));
  CHECK(names(tmp) == whole);
  CHECK(Shard(tmp / "set_000000.bin").count() == 7);
}

TEST_CASE("tokenize: a disk that fills is exit 1, and the earlier set stays", "[cli]") {
  const TempFolder tmp;
  const Words words = {"--tokenizer", "byte", "--out", tmp / "set", "-"};
  {
    Piped p(tmp, words);
    p.give("first");
    p.end_input();
    REQUIRE(p.wait().code == 0);
  }
  const std::string shard = slurp(tmp / "set_000000.bin");
  Piped p(tmp, words, 4 << 20);
  while (p.give(std::string(1 << 20, 'x'))) {
  }
  const Ended e = p.wait();
  INFO(e.err);
  CHECK(e.code == 1);
  CHECK(e.errors() == 1);
  CHECK(e.says("set_000000.bin"));
  CHECK(e.says("free some space"));
  CHECK(names(tmp) == Words{"set.json", "set_000000.bin"});
  CHECK(slurp(tmp / "set_000000.bin") == shard);
}

TEST_CASE("tokenize: standard input among files, and its errors", "[cli]") {
  const TempFolder tmp;
  spill(tmp / "a.txt", "before");
  {
    Piped p(tmp, {"--tokenizer", "byte", "--out", tmp / "set", tmp / "a.txt", "-"});
    p.give("piped");
    p.end_input();
    const Ended e = p.wait();
    CHECK(e.code == 0);
    CHECK(e.err.find('\r') == std::string::npos);  // no terminal: plain lines
    CHECK(Shard(tmp / "set_000000.bin").count() == 1 + 6 + 1 + 5);
  }
  const auto refused = [&](const Words& words, int code, const std::string& part) {
    Piped p(tmp, words);
    p.give("{\"text\": \"fine\"}\n{\"text\": 3}\n");
    p.end_input();
    const Ended e = p.wait();
    INFO(e.err);
    CHECK(e.code == code);
    CHECK(e.errors() == 1);
    CHECK(e.says(part));
  };
  refused({"--tokenizer", "byte", "-"}, 2, "--out");
  refused({"--tokenizer", "byte", "--out", tmp / "x", "-", "-"}, 2, "named twice");
  refused({"--tokenizer", "byte", "--out", tmp / "x", "--json-key", "text", "-"}, 3,
          "-:2: \"text\"");
  refused({"--tokenizer", "byte", "--out", tmp / "x", "--valid-fraction", "2", "-"}, 2,
          "--valid-fraction");
}
