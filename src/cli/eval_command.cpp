// hgrn eval: perplexity or a zero-shot task, as lines, JSON and token by token.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>
#include <utility>

#include "cli/command.h"
#include "core/file.h"
#include "eval/perplexity.h"
#include "eval/tasks.h"

namespace hgrn {
namespace {

const std::map<std::string, Protocol> kProtocols = {
    {"blocks", Protocol::blocks}, {"carry", Protocol::carry}, {"lines", Protocol::lines}};

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

}  // namespace

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
  app->add_option_function<std::string>(
      "--task-suffix", [a](const std::string& s) { a->task.suffix = s; },
      "take each query or context as it stands and put this text after it (default: the "
      "harness' prompt)");
  app->add_option("--tokenizer", a->tokenizer, "byte or a file (default: the checkpoint's)");
  add_device(app, a->device);
  app->add_option("--json", a->json, "write the result to this file as JSON");
  app->add_option("--per-token", a->per_token, "write each token's nll to this file (JSON lines)");
  return {app, [a] { return run_eval(*a); }};
}

}  // namespace hgrn
