// The run config: JSON <-> structs. Every key, its default and its meaning; docs/formats.md is the
// user's page. Sections: model, data, optim, train.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/params.h"
#include "ops/ops.h"

namespace hgrn {

enum class InitKind { normal, fairseq };
enum class QueryScale { rsqrt, one };

struct ModelConfig {
  std::string mixer = "hgru2";
  int64_t vocab_size = 0;         // V
  int64_t hidden_size = 0;        // D
  int64_t num_hidden_layers = 0;  // L
  int64_t expand_ratio = 128;     // n, the head dimension
  int64_t intermediate_size = 0;  // F
  bool tie_word_embeddings = true;
  bool use_lower_bound = true;
  Norm norm = Norm::rms;
  double norm_eps = 1e-6;
  bool bias = false;
  Act output_activation = Act::silu;     // act_o
  Act input_activation = Act::identity;  // act_i
  Act hidden_act = Act::silu;            // act_h
  QueryScale query_scale = QueryScale::rsqrt;
  bool scale_embedding = false;
  double dropout = 0;
  InitKind initializer = InitKind::normal;
  double initializer_range = 0.02;
  int64_t eos_token_id = -1;  // -1: the tokenizer's end of text, else none

  // Eps of the norm after the recurrence. fla applies 1e-5 there whatever norm_eps says.
  static constexpr double kOutputNormEps = 1e-5;
};

struct MixturePart {
  std::string path;  // glob
  double weight = 1;
};

struct DataConfig {
  std::vector<MixturePart> train;
  std::string valid;      // glob; empty: none
  std::string tokenizer;  // "byte", a file or a folder; empty: none
  int64_t seq_len = 2048;
  bool shuffle = true;
  bool reset_at_eos = false;
  uint64_t seed = 0;
};

enum class ScheduleKind { cosine, inverse_sqrt, wsd, linear, constant };
enum class DecayKind { matrices, all };

struct OptimConfig {
  double lr = 3e-4;
  double betas[2] = {0.9, 0.95};
  double eps = 1e-8;
  double weight_decay = 0.1;
  DecayKind decay = DecayKind::matrices;
  double clip_norm = 1.0;  // 0: no clipping
  ScheduleKind schedule = ScheduleKind::cosine;
  int64_t warmup_steps = 2000;
  double warmup_init_lr = 0;
  double min_lr_ratio = 0.1;
};

enum class Precision { bf16, fp32 };
enum class Recompute { none, elementwise, block };  // in the order of what they save
enum class OnNonfinite { skip, abort, rollback };
enum class OnSpike { warn, skip };
enum class ReduceDType { fp32, bf16 };

struct TrainConfig {
  int64_t steps = 0;
  int64_t global_batch = 208;  // sequences a step over all ranks and accumulation steps
  int64_t micro_batch = 26;    // sequences a forward pass of one rank
  Precision precision = Precision::bf16;
  Recompute recompute = Recompute::none;
  uint64_t seed = 0;
  int64_t log_every = 10;
  int64_t eval_every = 500;
  int64_t eval_tokens = 1048576;
  int64_t monitor_every = 100;  // gradient norms and forget gates by layer; 0: off
  int64_t sample_every = 1000;  // a text sample, where data.tokenizer is set; 0: off
  std::string sample_prompt;    // its beginning
  int64_t checkpoint_every = 1000;
  int64_t keep_checkpoints = 3;
  OnNonfinite on_nonfinite = OnNonfinite::skip;
  double spike_zscore = 0;  // robust z-score of the loss above which a step is a spike; 0: off
  int64_t spike_window = 128;
  OnSpike on_spike = OnSpike::warn;
  int64_t zero = 1;
  ReduceDType reduce_dtype = ReduceDType::fp32;
};

struct Config {
  ModelConfig model;
  DataConfig data;
  OptimConfig optim;
  TrainConfig train;
};

// Reads FILE (comments allowed), applies "section.key=value" overrides (the value is JSON, else a
// text), checks everything that can be checked without data or devices. Exit::usage with file:key.
Config load_config(const std::string& path, const std::vector<std::string>& overrides = {});
Config parse_config(const std::string& json_text, const std::string& where,
                    const std::vector<std::string>& overrides = {});
// The resolved config: every key, in the order of the structs.
std::string config_to_json(const Config& c);

// docs/config.md: every key with type, default, range and meaning, as Markdown.
std::string config_reference();

// global_batch must be a multiple of ranks * micro_batch; Exit::usage names the nearest that is.
void check_batch(const TrainConfig& t, int64_t ranks);

// Keys in which `now` differs from `before` although a resumed run may not change them
// ("optim.lr"); it may change steps, every *_every, keep_checkpoints, micro_batch, zero and paths.
std::vector<std::string> forbidden_changes(const std::string& before_json,
                                           const std::string& now_json);

}  // namespace hgrn
