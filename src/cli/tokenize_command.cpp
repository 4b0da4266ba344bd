// hgrn tokenize: flags to TokenizeOptions, a progress line on stderr.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "cli/command.h"
#include "core/log.h"
#include "text/tokenize.h"

namespace hgrn {
namespace {

Exit run_tokenize(TokenizeOptions o) {
  const bool terminal = stderr_is_terminal();
  o.progress = [terminal](const TokenizeProgress& p) {
    if (terminal) std::fprintf(stderr, "\r%s\x1b[K", p.str().c_str());
  };
  const TokenizeReport r = tokenize(o);
  if (terminal) std::fprintf(stderr, "\n");
  for (const std::string& path : r.removed)
    log_warn("{}: removed, it was of an earlier, longer set", path);
  for (const std::string& path : r.shards) print(path + "\n");
  log_info("{} tokens of {} bytes in {} shards, {:.1f} s", r.encoded.tokens, r.encoded.bytes,
           r.shards.size(), r.seconds);
  return Exit::ok;
}

}  // namespace

Command tokenize_command(CLI::App& root) {
  auto o = std::make_shared<TokenizeOptions>();
  CLI::App* app = root.add_subcommand("tokenize", "Text files to token shards");
  app->footer("Example:\n  hgrn tokenize --tokenizer byte --out data/books book1.txt book2.txt");
  app->add_option("--tokenizer", o->tokenizer, "byte or a tokenizer file")->required();
  app->add_option("--out", o->out, "PREFIX: writes PREFIX_000000.bin, ...");
  app->add_option("--shard-tokens", o->shard_tokens, "tokens a shard")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_flag("--line-end-token", o->line_end_token,
                "strip each line and put an end-of-text token after it");
  app->add_flag("--special-tokens", o->special_tokens,
                "special tokens spelled out in the text (<|endoftext|>) are tokens, not text");
  app->add_option("--document-separator", o->document_separator,
                  "split files into documents at this text");
  app->add_option("--jobs", o->jobs, "threads")->check(CLI::Range(1, 1024))->capture_default_str();
  app->add_option("files", o->files, "text files")->required();
  return {app, [o] { return run_tokenize(*o); }};
}

}  // namespace hgrn
