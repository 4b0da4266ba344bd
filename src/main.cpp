// The command line, and nothing else: flags to options, errors to one line and an exit code.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <utility>

#include "core/file.h"
#include "core/log.h"
#include "core/version.h"
#include "eval/generate.h"
#include "eval/perplexity.h"
#include "eval/tasks.h"
#include "launch/launcher.h"
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
  args->give_up = [](const Error& e) {  // the main thread hangs in a collective
    std::fprintf(stderr, "error: %s\n", e.what());
    std::_Exit(int(e.code()));
  };
  return {app, [args] { return Trainer(*args).run(); }};
}

struct EvalArgs {
  std::string checkpoint, tokenizer, json, per_token;
  Device device = Device::automatic;
  PerplexityOptions options;
  TaskOptions task;
};

// A file of lines that appears complete under its name, or not at all.
class LineFile {
 public:
  explicit LineFile(const std::string& path) : path_(path), temp_(path + ".tmp") {
    if (path_.empty()) return;
    file_ = std::fopen(temp_.c_str(), "w");
    check(file_ != nullptr, Exit::failed, "{}: cannot open for writing; choose another --per-token",
          temp_);
  }
  ~LineFile() {
    if (!file_) return;
    std::fclose(file_);
    std::remove(temp_.c_str());
  }
  LineFile(const LineFile&) = delete;
  LineFile& operator=(const LineFile&) = delete;
  explicit operator bool() const { return file_ != nullptr; }
  void write(const std::string& line) { std::fwrite(line.data(), 1, line.size(), file_); }
  void finish() {
    if (!file_) return;
    const bool ok = std::fflush(file_) == 0 && !std::ferror(file_);
    check(std::fclose(std::exchange(file_, nullptr)) == 0 && ok, Exit::failed,
          "{}: cannot write; is the disk full?", temp_);
    rename_path(temp_, path_);
  }

 private:
  std::string path_, temp_;
  std::FILE* file_ = nullptr;
};

Exit run_task_eval(const EvalArgs& a, LoadedModel& m) {
  LineFile each(a.per_token);
  TaskSink sink;
  if (each)
    sink = [&](int64_t item, int64_t pair, int64_t i, int32_t token, double nll) {
      each.write(fmt::format("{{\"item\":{},\"choice\":{},\"i\":{},\"token\":{},\"nll\":{:.9g}}}\n",
                             item, pair, i, token, nll));
    };
  const TaskResult r = run_task(m, a.task, sink);
  each.finish();
  print(fmt::format("task           {}, 0-shot\nitems          {}\n", r.task, r.items));
  for (const Metric& x : r.metrics)
    print(fmt::format("{:<14} {:.4f} +- {:.4f}\n", x.name, x.value, x.stderr_));
  print(fmt::format("seconds        {:.2f}\n", r.seconds));
  if (!a.json.empty()) write_file_atomic(a.json, task_json(r, a.task, m));
  return Exit::ok;
}

Exit run_eval(const EvalArgs& a) {
  const PerplexityOptions& o = a.options;
  check(int(!o.data.empty()) + int(!o.text.empty()) + int(!a.task.task.empty()) == 1, Exit::usage,
        "hgrn eval: give --data SHARDS, --text FILE or --task NAME, one of the three");
  check(a.task.task.empty() == a.task.data.empty(), Exit::usage,
        "hgrn eval: --task NAME and --task-data FILE go together");
  if (!a.task.task.empty()) find_task(a.task.task);  // before the model is read
  LoadedModel m = load_model(a.checkpoint, a.device, a.tokenizer);
  if (!a.task.task.empty()) return run_task_eval(a, m);
  LineFile each(a.per_token);
  TokenSink sink;
  if (each)
    sink = [&](int64_t i, int32_t token, double nll) {
      each.write(fmt::format("{{\"i\":{},\"token\":{},\"nll\":{:.7g}}}\n", i, token, nll));
    };
  const PerplexityResult r = perplexity(m, o, sink);
  each.finish();
  print(fmt::format("protocol       {}\ntokens         {}\n", r.description, r.tokens));
  print(fmt::format("nll            {:.6f} +- {:.6f} a token\nppl            {:.4f} +- {:.4f}\n",
                    r.nll / double(r.tokens), r.nll_stderr, r.ppl(), r.ppl_stderr()));
  if (r.words >= 0)
    print(fmt::format("words          {}\nword ppl       {:.4f} +- {:.4f}\n", r.words, r.word_ppl(),
                      r.word_ppl_stderr()));
  if (r.bytes >= 0)
    print(fmt::format("bytes          {}\nbits per byte  {:.4f} +- {:.4f}\n", r.bytes,
                      r.bits_per_byte(), r.bits_per_byte_stderr()));
  print(fmt::format("seconds        {:.2f}\n", r.seconds));
  if (!a.json.empty()) write_file_atomic(a.json, perplexity_json(r, m));
  return Exit::ok;
}

Command eval_command(CLI::App& root) {
  auto a = std::make_shared<EvalArgs>();
  CLI::App* app =
      root.add_subcommand("eval", "Perplexity of a checkpoint on text or shards, or a task");
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
  app->add_option("--task", a->task.task,
                  "zero-shot task: lambada_openai, hellaswag, piqa, winogrande, arc_easy, "
                  "arc_challenge or openbookqa");
  app->add_option("--task-data", a->task.data, "the task's items, JSON lines (docs/evaluation.md)");
  app->add_option("--task-suffix", a->task.suffix, "text put after each query or context");
  app->add_option("--tokenizer", a->tokenizer, "byte or a file (default: the checkpoint's)");
  add_device(app, a->device);
  app->add_option("--json", a->json, "write the result to this file as JSON");
  app->add_option("--per-token", a->per_token, "write each token's nll to this file (JSON lines)");
  return {app, [a] { return run_eval(*a); }};
}

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

Command launch_command(CLI::App& root) {
  auto o = std::make_shared<LaunchOptions>();
  o->nproc_per_node = 0;
  CLI::App* app = root.add_subcommand("launch", "Start one rank a GPU, or several CPU ranks");
  app->footer(
      "Example:\n  hgrn launch --nproc-per-node 8 --max-restarts 3 -- train --config "
      "configs/hgrn2_1b.json --out runs/1b");
  app->add_flag("--standalone", o->standalone, "one machine, any free port (the default)");
  app->add_option("--nnodes", o->nnodes, "machines")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app->add_option("--node-rank", o->node_rank, "this machine's number, from 0")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  app->add_option("--nproc-per-node", o->nproc_per_node,
                  "ranks on each machine (default: its GPUs, else 1)")
      ->check(CLI::Range(1, 4096));
  app->add_option("--master-addr", o->master_addr, "address of machine 0");
  app->add_option("--master-port", o->master_port,
                  "its port (default: a free one on one machine, else 29500)")
      ->check(CLI::Range(1, 65535));
  app->add_option("--max-restarts", o->max_restarts,
                  "times to go on from the newest checkpoint after exit 1 or a signal")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--log-dir", o->log_dir, "folder for each rank's output, rank-N.log");
  app->add_option("command", o->command, "after --: train and its flags");
  return {app, [o] {
            if (o->nproc_per_node == 0) o->nproc_per_node = std::max(1, cuda_device_count());
            return launch(*o);
          }};
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
    if (word == "--") break;
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
                              tokenize_command(root), plan_command(root), inspect_command(root),
                              launch_command(root)};
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
