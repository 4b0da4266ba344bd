// hgrn tokenize: flags to TokenizeOptions, progress on stderr.
#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>

#include "cli/command.h"
#include "core/log.h"
#include "text/tokenize.h"

namespace hgrn {
namespace {

constexpr double kSecondsBetweenLines = 5;  // where stderr is no terminal

volatile std::sig_atomic_t g_signal = 0;

// The first signal unwinds, so that nothing half-written stays; a second one ends at once.
struct Stopped {};

void catch_signals() {
  struct sigaction action = {};
  action.sa_handler = [](int number) { g_signal = number; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // no SA_RESTART: a waiting read returns
  sigemptyset(&action.sa_mask);
  for (int number : {SIGINT, SIGTERM, SIGHUP}) sigaction(number, &action, nullptr);
}

// A line that rewrites itself on a terminal, else one every few seconds.
class ProgressLine {
 public:
  void show(const TokenizeProgress& p) {
    if (terminal_) {
      std::fprintf(stderr, "\r%s\x1b[K", p.str().c_str());
      shown_ = true;
    } else if (p.seconds - last_ >= kSecondsBetweenLines) {
      last_ = p.seconds;
      log_info("{}", p.str());
    }
  }
  void end() {
    if (shown_) std::fputc('\n', stderr);
    shown_ = false;
  }

 private:
  const bool terminal_ = stderr_is_terminal();
  bool shown_ = false;
  double last_ = 0;
};

Exit run_tokenize(TokenizeOptions o) {
  catch_signals();
  o.interrupted = [] {
    if (g_signal) throw Stopped();
  };
  ProgressLine line;
  o.progress = [&](const TokenizeProgress& p) { line.show(p); };
  TokenizeReport r;
  try {
    r = tokenize(o);
  } catch (const Stopped&) {
    line.end();
    std::fprintf(stderr, "stopped by signal %d; no shard was written\n", int(g_signal));
    std::signal(g_signal, SIG_DFL);
    std::raise(g_signal);
    return Exit::failed;
  } catch (...) {
    line.end();
    throw;
  }
  line.end();
  for (const std::string& path : r.stale)
    log_warn("{}: removed, a run that was killed left it", path);
  for (const std::string& path : r.removed) log_warn("{}: removed, it was of an earlier set", path);
  for (const std::string& path : r.shards) print(path + "\n");
  if (o.valid_fraction > 0)
    log_info("{} of {} documents with {} tokens are for validation", r.encoded.valid_documents,
             r.encoded.documents, r.encoded.valid_tokens);
  if (o.valid_fraction > 0 &&
      (r.encoded.valid_documents == 0 || r.encoded.valid_documents == r.encoded.documents))
    log_warn(
        "one part is empty: {} documents are few for --valid-fraction {}; is a document a file "
        "here? (--document-separator, --json-key)",
        r.encoded.documents, o.valid_fraction);
  log_info("{} tokens of {} bytes in {} shards, {:.1f} s; what they hold: {}", r.encoded.tokens,
           r.encoded.bytes, r.shards.size(), r.seconds, r.manifest);
  return Exit::ok;
}

}  // namespace

Command tokenize_command(CLI::App& root) {
  auto o = std::make_shared<TokenizeOptions>();
  CLI::App* app = root.add_subcommand("tokenize", "Text files to token shards");
  app->footer(
      "Example:\n  hgrn tokenize --tokenizer byte --out data/books book1.txt book2.txt\n"
      "  zstdcat pile.jsonl.zst | hgrn tokenize --tokenizer gpt2 --json-key text \\\n"
      "    --valid-fraction 0.001 --jobs 16 --out data/pile -");
  app->add_option("--tokenizer", o->tokenizer, "byte or a tokenizer file")->required();
  app->add_option("--out", o->out, "PREFIX: writes PREFIX_000000.bin, ... and PREFIX.json");
  app->add_option("--shard-tokens", o->shard_tokens, "tokens a shard")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_flag("--line-end-token", o->line_end_token,
                "strip each line and put an end-of-text token after it");
  app->add_flag("--special-tokens", o->special_tokens,
                "special tokens spelled out in the text (<|endoftext|>) are tokens, not text");
  app->add_option("--document-separator", o->document_separator,
                  "split files into documents at this text");
  app->add_option("--json-key", o->json_key,
                  "files are JSON lines; each line's text under this key is a document");
  app->add_option("--valid-fraction", o->valid_fraction,
                  "share of the documents, chosen by their hash, that go to PREFIX_valid_*.bin; "
                  "the others go to PREFIX_train_*.bin")
      ->capture_default_str();
  app->add_option("--jobs", o->jobs, "threads")->check(CLI::Range(1, 1024))->capture_default_str();
  app->add_option("files", o->files, "text files; - is standard input")->required();
  return {app, [o] { return run_tokenize(*o); }};
}

}  // namespace hgrn
