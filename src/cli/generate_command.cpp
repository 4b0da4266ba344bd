// hgrn generate: prompts in, text out as it is made.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <sstream>

#include "cli/command.h"
#include "core/file.h"
#include "eval/generate.h"

namespace hgrn {
namespace {

struct GenerateArgs {
  std::string checkpoint, tokenizer, prompt, prompts;
  Device device = Device::automatic;
  bool json = false;
  GenerateOptions options;
};

std::vector<std::string> prompts_of(const GenerateArgs& a) {
  if (a.prompts.empty()) return {a.prompt};
  std::vector<std::string> lines;
  std::istringstream in(read_file(a.prompts, uint64_t(1) << 30));
  for (std::string line; std::getline(in, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    lines.push_back(line);
  }
  check(!lines.empty(), Exit::data, "{}: no line; write one prompt a line", a.prompts);
  return lines;
}

Exit run_generate(GenerateArgs a) {
  check(a.prompt.empty() || a.prompts.empty(), Exit::usage,
        "hgrn generate: give --prompt TEXT or --prompts FILE, one of the two");
  a.options.prompts = prompts_of(a);
  LoadedModel m = load_model(a.checkpoint, a.device, a.tokenizer);
  const std::vector<std::string>& prompts = a.options.prompts;
  const size_t batch = size_t(a.options.batch), count = prompts.size() * batch;
  const bool stream = count == 1 && !a.json;
  std::vector<std::string> rows(stream ? 0 : count);
  if (stream) print(prompts[0]);
  const GenerateReport r = generate(m, a.options, [&](int64_t row, std::string_view text) {
    if (stream)
      print(text);
    else
      rows[size_t(row)] += text;
  });
  if (stream) print("\n");
  for (size_t i = 0; i < rows.size(); ++i)
    print(a.json ? generated_json(r, i, prompts[i / batch], rows[i])
                 : fmt::format("--- {}\n{}{}\n", i, prompts[i / batch], rows[i]));
  std::fprintf(stderr,
               "%lld tokens; time to first token %.1f ms (prompt of %lld tokens); then %.1f "
               "tokens/s\n",
               static_cast<long long>(r.tokens), 1e3 * r.first_token_seconds,
               static_cast<long long>(r.prompt_tokens), r.tokens_per_s());
  return Exit::ok;
}

}  // namespace

Command generate_command(CLI::App& root) {
  auto a = std::make_shared<GenerateArgs>();
  CLI::App* app = root.add_subcommand("generate", "Sample text from a checkpoint");
  app->footer(
      "Example:\n  hgrn generate --checkpoint runs/quickstart --prompt 'The ' --tokens 200 "
      "--temperature 0.8");
  app->add_option("--checkpoint", a->checkpoint, "checkpoint, run or Hugging Face folder")
      ->required();
  app->add_option("--prompt", a->prompt, "text to go on from");
  app->add_option("--prompts", a->prompts, "file with a prompt a line, instead of --prompt");
  app->add_option("--tokens", a->options.tokens, "tokens to make")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--temperature", a->options.sampling.temperature, "0: the most likely token")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--top-k", a->options.sampling.top_k, "sample from the k most likely; 0: off")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--top-p", a->options.sampling.top_p, "sample from the smallest set of this mass")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app->add_option("--repetition-penalty", a->options.sampling.repetition_penalty,
                  "divides the logits of tokens already seen, above 1; 1: off")
      ->check(CLI::Range(0.01f, 100.0f))
      ->capture_default_str();
  app->add_option("--seed", a->options.sampling.seed, "seed of the draws")->capture_default_str();
  app->add_option("--stop", a->options.stop, "end before this text; repeatable")
      ->take_all()
      ->allow_extra_args(false);
  app->add_flag("--json", a->json, "one JSON object a row on stdout, instead of the text");
  app->add_option("--batch", a->options.batch, "independent samples of each prompt")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app->add_option("--tokenizer", a->tokenizer, "byte or a file (default: the checkpoint's)");
  add_device(app, a->device);
  return {app, [a] { return run_generate(*a); }};
}

}  // namespace hgrn
