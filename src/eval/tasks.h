// Zero-shot tasks from JSON lines, scored as EleutherAI's lm-evaluation-harness scores them.
//   choices   {"query", "choices", "gold"}                  acc, acc_norm
//   contexts  {"context_options", "continuation", "gold"}   acc (partial scoring, as WinoGrande's)
//   word      {"context", "continuation"}                   perplexity, acc (LAMBADA)
// docs/evaluation.md says how texts become tokens and what each figure is.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "eval/load.h"

namespace hgrn {

enum class TaskKind { choices, contexts, word };

struct Task {
  std::string name;  // the harness' name
  TaskKind kind;
  bool question = false;  // its prompt is "Question: ...\nAnswer:"
};

// By the harness' name or a usual other one (lambada, arc-easy, openbook_qa, ...). Exit::usage with
// the known names otherwise.
Task find_task(const std::string& name);

// One line of the file. Each pair is scored as context and continuation; a pair's length in
// characters is that of its choice, without the delimiter.
struct TaskItem {
  struct Pair {
    std::string context, continuation;
    int64_t characters = 0;
  };
  std::vector<Pair> pairs;
  int64_t gold = 0;
};

// Exit::data with file, line and the field that is missing or wrong. With a suffix, it is put after
// each query or context as it stands in the file; without, the text is what the harness gives the
// model: for piqa and the arc tasks "Question: ...\nAnswer:", whatever part of that the file has,
// else the query or context alone.
std::vector<TaskItem> read_task(const Task& task, const std::string& path,
                                const std::optional<std::string>& suffix = std::nullopt);

// How the harness joins the two: whitespace at the end of the context moves to the continuation,
// both are encoded together, and what is beyond the context's own tokens is the continuation. An
// empty context is the end-of-text token.
struct EncodedPair {
  std::vector<int32_t> context, continuation;
};
EncodedPair encode_pair(const Tokenizer& tokenizer, int32_t eos, std::string_view context,
                        std::string_view continuation);

struct TaskOptions {
  std::string task, data;
  std::optional<std::string> suffix;  // see read_task
};

struct Metric {
  std::string name;  // "acc", "acc_norm", "perplexity"
  double value = 0, stderr_ = 0;
};

struct TaskResult {
  std::string task;
  int64_t items = 0;
  std::vector<Metric> metrics;
  double seconds = 0;
};

// Called for every scored token, in the order of the file.
using TaskSink =
    std::function<void(int64_t item, int64_t pair, int64_t i, int32_t token, double nll)>;

TaskResult run_task(LoadedModel& m, const TaskOptions& options, const TaskSink& each = {});

// lm-evaluation-harness' shape.
std::string task_json(const TaskResult& r, const TaskOptions& o, const LoadedModel& m);

}  // namespace hgrn
