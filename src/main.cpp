// The command line, and nothing else: flags to options, errors to one line and an exit code.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>

#include "core/file.h"
#include "core/log.h"
#include "core/version.h"
#include "eval/generate.h"
#include "eval/perplexity.h"
#include "model/config.h"
#include "model/fields.h"
#include "model/plan.h"
#include "text/tokenize.h"
#include "train/inspect.h"
#include "train/trainer.h"

namespace hgrn {
namespace {

const std::map<std::string, Device> kDevices = {
    {"auto", Device::automatic}, {"cpu", Device::cpu}, {"cuda", Device::cuda}};
const std::map<std::string, Protocol> kProtocols = {
    {"blocks", Protocol::blocks}, {"carry", Protocol::carry}, {"lines", Protocol::lines}};

struct Command {
  CLI::App* app = nullptr;
  std::function<Exit()> run;
};

void print(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

void add_device(CLI::App* app, Device& device) {
  app->add_option("--device", device, "auto, cpu or cuda")
      ->transform(CLI::CheckedTransformer(kDevices, CLI::ignore_case).description(""))
      ->default_str("auto");
}

Command train_command(CLI::App& root) {
  auto args = std::make_shared<TrainArgs>();
  CLI::App* app = root.add_subcommand("train", "Pretrain a model from a config");
  app->footer(
      "Example:\n  hgrn train --config configs/quickstart.json --set optim.lr=1e-3 --out "
      "runs/first");
  app->add_option("--config", args->config, "config file (JSON, comments allowed)")->required();
  app->add_option("--set", args->overrides, "KEY=VALUE, overrides a config key; repeatable")
      ->take_all();
  app->add_option("--out", args->out, "run folder (default: runs/<config's name>)");
  add_device(app, args->device);
  app->add_option("--resume", args->resume,
                  "auto: from the newest complete checkpoint in --out; never; or a folder")
      ->default_str("auto");
  app->add_option("--init-from", args->init_from,
                  "weights from a Hugging Face HGRN2 folder or a checkpoint");
  app->add_option("--steps", args->stop_after,
                  "stop after this step; the schedule still spans train.steps")
      ->check(CLI::NonNegativeNumber);
  return {app, [args] { return Trainer(*args).run(); }};
}

struct EvalArgs {
  std::string checkpoint, tokenizer, json, per_token;
  Device device = Device::automatic;
  PerplexityOptions options;
};

Exit run_eval(const EvalArgs& a) {
  check(a.options.data.empty() != a.options.text.empty(), Exit::usage,
        "hgrn eval: give --data SHARDS or --text FILE, one of the two");
  LoadedModel m = load_model(a.checkpoint, a.device, a.tokenizer);
  std::FILE* each = nullptr;
  const std::string temp = a.per_token + ".tmp";
  if (!a.per_token.empty()) {
    each = std::fopen(temp.c_str(), "w");
    check(each != nullptr, Exit::failed, "{}: cannot open for writing; choose another --per-token",
          temp);
  }
  const PerplexityResult r =
      perplexity(m, a.options,
                 each ? TokenSink([&](int64_t i, int32_t token, double nll) {
                   std::fprintf(each, "{\"i\":%lld,\"token\":%d,\"nll\":%.7g}\n",
                                static_cast<long long>(i), token, nll);
                 })
                      : TokenSink());
  if (each) {
    const bool ok = std::fflush(each) == 0;
    check(std::fclose(each) == 0 && ok, Exit::failed, "{}: cannot write; is the disk full?", temp);
    rename_path(temp, a.per_token);
  }
  print(
      fmt::format("protocol       {}\ntokens         {}\nnll            {:.6f} +- {:.6f} a token\n"
                  "ppl            {:.4f}\n",
                  r.description, r.tokens, r.nll / double(r.tokens), r.nll_stderr, r.ppl()));
  if (r.words >= 0)
    print(fmt::format("words          {}\nword ppl       {:.4f}\n", r.words, r.word_ppl()));
  if (r.bytes >= 0)
    print(fmt::format("bytes          {}\nbits per byte  {:.4f}\n", r.bytes, r.bits_per_byte()));
  print(fmt::format("seconds        {:.2f}\n", r.seconds));
  if (!a.json.empty()) write_file_atomic(a.json, perplexity_json(r, m));
  return Exit::ok;
}

Command eval_command(CLI::App& root) {
  auto a = std::make_shared<EvalArgs>();
  CLI::App* app = root.add_subcommand("eval", "Perplexity of a checkpoint on text or shards");
  app->footer(
      "Example:\n  hgrn eval --checkpoint runs/quickstart --text README.md --protocol carry");
  app->add_option("--checkpoint", a->checkpoint, "checkpoint, run or Hugging Face folder")
      ->required();
  app->add_option("--data", a->options.data, "token shards (a glob)");
  app->add_option("--text", a->options.text, "text file");
  app->add_flag("--line-end-token", a->options.line_end_token,
                "strip each line and put an end-of-text token after it");
  app->add_option("--protocol", a->options.protocol, "blocks, carry or lines (docs/formats.md)")
      ->transform(CLI::CheckedTransformer(kProtocols, CLI::ignore_case).description(""))
      ->default_str("blocks");
  app->add_option("--seq-len", a->options.seq_len,
                  "row length of blocks, tokens (default: the config's)")
      ->check(CLI::PositiveNumber);
  app->add_option("--tokenizer", a->tokenizer, "byte or a file (default: the checkpoint's)");
  add_device(app, a->device);
  app->add_option("--json", a->json, "write the result to this file as JSON");
  app->add_option("--per-token", a->per_token, "write each token's nll to this file (JSON lines)");
  return {app, [a] { return run_eval(*a); }};
}

struct GenerateArgs {
  std::string checkpoint, tokenizer;
  Device device = Device::automatic;
  GenerateOptions options;
};

Exit run_generate(const GenerateArgs& a) {
  LoadedModel m = load_model(a.checkpoint, a.device, a.tokenizer);
  std::vector<std::string> rows(size_t(a.options.batch));
  const bool stream = a.options.batch == 1;
  if (stream) print(a.options.prompt);
  const GenerateReport r = generate(m, a.options, [&](int64_t row, std::string_view text) {
    if (stream)
      print(text);
    else
      rows[size_t(row)] += text;
  });
  if (stream) print("\n");
  for (size_t b = 0; !stream && b < rows.size(); ++b)
    print(fmt::format("--- {}\n{}{}\n", b, a.options.prompt, rows[b]));
  std::fprintf(stderr, "%lld tokens in %.2f s: %.1f tokens/s (prompt: %lld in %.2f s)\n",
               static_cast<long long>(r.tokens), r.seconds,
               r.seconds > 0 ? double(r.tokens) / r.seconds : 0.0,
               static_cast<long long>(r.prompt_tokens), r.prompt_seconds);
  return Exit::ok;
}

Command generate_command(CLI::App& root) {
  auto a = std::make_shared<GenerateArgs>();
  CLI::App* app = root.add_subcommand("generate", "Sample text from a checkpoint");
  app->footer(
      "Example:\n  hgrn generate --checkpoint runs/quickstart --prompt 'The ' --tokens 200 "
      "--temperature 0.8");
  app->add_option("--checkpoint", a->checkpoint, "checkpoint, run or Hugging Face folder")
      ->required();
  app->add_option("--prompt", a->options.prompt, "text to go on from")->required();
  app->add_option("--tokens", a->options.tokens, "tokens to make")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--temperature", a->options.temperature, "0: the most likely token")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--top-k", a->options.top_k, "sample from the k most likely; 0: off")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--top-p", a->options.top_p, "sample from the smallest set of this mass")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app->add_option("--seed", a->options.seed, "seed of the draws")->capture_default_str();
  app->add_option("--batch", a->options.batch, "independent samples")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app->add_option("--tokenizer", a->tokenizer, "byte or a file (default: the checkpoint's)");
  add_device(app, a->device);
  return {app, [a] { return run_generate(*a); }};
}

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

Command plan_command(CLI::App& root) {
  struct Args {
    std::string config;
    std::vector<std::string> overrides;
    PlanOptions options;
  };
  auto a = std::make_shared<Args>();
  CLI::App* app = root.add_subcommand("plan", "Parameters, memory, FLOPs and limits of a config");
  app->footer("Example:\n  hgrn plan --config configs/hgrn2_1b.json --gpus 8 --device-memory 80");
  app->add_option("--config", a->config, "config file")->required();
  app->add_option("--set", a->overrides, "KEY=VALUE, overrides a config key; repeatable")
      ->take_all();
  app->add_option("--gpus", a->options.gpus, "GPUs")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--device-memory", a->options.device_memory_gib, "memory of a GPU, GiB")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_flag("--cpu", a->options.cpu, "plan for the CPU");
  return {app, [a] {
            print(plan_text(load_config(a->config, a->overrides), a->options));
            return Exit::ok;
          }};
}

Command inspect_command(CLI::App& root) {
  struct Args {
    std::string path;
    bool verify = false;
  };
  auto a = std::make_shared<Args>();
  CLI::App* app =
      root.add_subcommand("inspect", "What a checkpoint, shard, tokenizer or metrics file holds");
  app->footer("Example:\n  hgrn inspect runs/quickstart --verify");
  app->add_option("path", a->path, "file or folder")->required();
  app->add_flag("--verify", a->verify, "check every byte against its checksum");
  return {app, [a] {
            print(inspect(a->path, a->verify));
            return Exit::ok;
          }};
}

// Flags are written with - or _; CLI11 knows the - form.
std::vector<std::string> normalised(int argc, char** argv) {
  std::vector<std::string> words;
  bool options = true;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word == "--") options = false;
    if (options && word.rfind("--", 0) == 0)
      for (char& c : word) {
        if (c == '=') break;
        if (c == '_') c = '-';
      }
    words.push_back(word);
  }
  return words;
}

std::string usage_error(const CLI::App& root, const CLI::ParseError& e,
                        const std::vector<std::string>& words) {
  const CLI::App* app = &root;
  std::vector<std::string> commands, flags;
  for (const CLI::App* sub : root.get_subcommands(nullptr)) {
    commands.push_back(sub->get_name());
    if (sub->parsed() || (!words.empty() && words[0] == sub->get_name())) app = sub;
  }
  if (!words.empty() && app == &root && words[0].rfind("-", 0) != 0)
    return fmt::format("hgrn {}: unknown command{}", words[0], did_you_mean(words[0], commands));
  for (const CLI::Option* o : app->get_options())
    for (const std::string& name : o->get_lnames()) flags.push_back("--" + name);
  for (const std::string& word : words) {
    const std::string flag = word.substr(0, word.find('='));
    if (flag.rfind("--", 0) == 0 && flag.size() > 2 &&
        std::find(flags.begin(), flags.end(), flag) == flags.end())
      return fmt::format("hgrn {}: unknown flag {}{}", app->get_name(), flag,
                         did_you_mean(flag, flags));
  }
  return fmt::format("hgrn {}: {}; see hgrn {} --help", app->get_name(), e.what(), app->get_name());
}

int run(int argc, char** argv) {
  CLI::App root("hgrn: trainer for HGRN2 language models", "hgrn");
  root.set_version_flag("--version",
                        std::string("hgrn ") + version() + "\nCUDA: " + cuda_versions());
  root.require_subcommand(1);
  root.footer(
      "Example:\n  hgrn train --config configs/quickstart.json\nhgrn COMMAND --help shows a "
      "command's flags.");
  const Command commands[] = {train_command(root),    eval_command(root), generate_command(root),
                              tokenize_command(root), plan_command(root), inspect_command(root)};
  const std::vector<std::string> words = normalised(argc, argv);
  try {
    root.parse(std::vector<std::string>(words.rbegin(), words.rend()));
  } catch (const CLI::CallForHelp&) {
    print(root.help());
    return 0;
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return root.exit(e);
    std::fprintf(stderr, "error: %s\n", usage_error(root, e, words).c_str());
    return int(Exit::usage);
  }
  for (const Command& c : commands)
    if (c.app->parsed()) return int(c.run());
  return int(Exit::usage);
}

}  // namespace
}  // namespace hgrn

int main(int argc, char** argv) {
  hgrn::log_init(/*rank=*/0, /*world_size=*/1);
  try {
    return hgrn::run(argc, argv);
  } catch (const hgrn::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return int(e.code());
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "error: out of memory; lower train.micro_batch or close other programs\n");
    return int(hgrn::Exit::failed);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return int(hgrn::Exit::failed);
  }
}
