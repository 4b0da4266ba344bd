// How a run begins: ranks meet, memory is taken, weights come from a checkpoint, a folder or the
// seed, and the data from where it was. trainer.cpp has the loop.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <filesystem>

#include "core/log.h"
#include "model/hf_config.h"
#include "model/plan.h"
#include "train/metrics.h"
#include "train/trainer.h"

namespace hgrn {
namespace {

void tell_set_aside(const std::string& folder) {
  if (!folder.empty())
    log_warn(
        "checkpoints that this run does not go on from were set aside: {}; remove them when "
        "they are no longer wanted",
        folder);
}

// A switch in the environment, for comparisons and tests.
bool switched(const char* name, bool otherwise) {
  const char* const set = std::getenv(name);
  return set && set[0] ? set[0] != '0' : otherwise;
}

std::string default_out(const std::string& config_path) {
  return "runs/" + std::filesystem::path(config_path).stem().string();
}

}  // namespace

Trainer::Trainer(const TrainArgs& args)
    : args_(args),
      env_(read_rank_env()),
      config_(load_config(args.config, args.overrides)),
      spikes_(config_.train.spike_zscore, config_.train.spike_window),
      may_run_ahead_(switched("HGRN_RUN_AHEAD", resolve_device(args.device) == Device::cuda)),
      may_record_(env_.world == 1 &&
                  switched("HGRN_CUDA_GRAPH", resolve_device(args.device) == Device::cuda)) {
  if (env_.world > 1) log_init(env_.rank, env_.world, env_.prefixed);
  check_batch(config_.train, env_.world);
  out_ = args_.out.empty() ? default_out(args_.config) : args_.out;
  open_tokenizer_and_eos();
  config_json_ = config_to_json(config_);
  join_ranks();
  try {
    open();
  } catch (const Error& e) {
    const Error last = ranks_->failed(e);
    leave_memory_in_use();
    throw last;
  }
}

void Trainer::join_ranks() {
  const Device device = resolve_device(args_.device);
  if (env_.world == 1) {
    make_dirs(out_);
    lock_ = std::make_unique<FileLock>(out_);
    log_to_file(out_ + "/log.txt");
  }
  ops_ = open_ops(device, config_.train.precision == Precision::bf16 ? "bf16" : "fp32",
                  env_.local_rank);
  Ranks::Options o;
  o.env = env_;
  o.agreed = fmt::format("{}\n{}\n{}\n{}\n{}\n{}", config_json_, args_.resume, args_.init_from,
                         args_.stop_after, device == Device::cuda ? "cuda" : "cpu",
                         may_run_ahead_ ? "ahead" : "waits");
  o.stopped = [this] { return signals_.received() != 0; };
  o.give_up = args_.give_up;
  ranks_ = std::make_unique<Ranks>(device, *ops_, o);
}

void Trainer::open() {
  if (env_.world > 1) {
    if (ranks_->first()) {
      make_dirs(out_);
      lock_ = std::make_unique<FileLock>(out_);
      log_to_file(out_ + "/log.txt");
    }
    ranks_->check_shared_folder(out_);
  }
  log_info("{}", ops_->describe());
  model_ =
      std::make_unique<LanguageModel>(*ops_, config_.model, config_.optim.decay == DecayKind::all);
  if (!fla_can_load(config_.model))
    log_info("this parameterisation is outside of fla's HGRN2: checkpoints load in hgrn only");
  allocate();
  SaveRank save;
  save.rank = ranks_->rank();
  save.world = ranks_->world();
  if (!ranks_->alone())
    save.token = ranks_->from_first(fmt::format("{}x{}", std::time(nullptr), ::getpid()));
  store_ = std::make_unique<CheckpointStore>(out_, int(config_.train.keep_checkpoints), save);
  start();
  if (ranks_->first()) write_file_atomic(out_ + "/config.json", config_json_);
  monitor_->open(step_);
  open_loader();
}

Trainer::~Trainer() {
  if (ranks_) leave_memory_in_use();
}

// Nothing may still travel when the memory goes; where it does, the process is about to end.
void Trainer::leave_memory_in_use() {
  if (ranks_->close()) return;
  state_memory_.release();
  shared_memory_.release();
}

void Trainer::open_tokenizer_and_eos() {
  eos_ = config_.model.eos_token_id;
  if (!config_.data.tokenizer.empty()) {
    tokenizer_ = open_tokenizer(config_.data.tokenizer);
    check(tokenizer_->vocab_size() <= config_.model.vocab_size, Exit::usage,
          "{}:model.vocab_size: {} is smaller than the tokenizer's {}; raise it, or name the "
          "tokenizer of the shards (data.tokenizer is {})",
          args_.config, config_.model.vocab_size, tokenizer_->vocab_size(), config_.data.tokenizer);
    if (eos_ < 0) eos_ = tokenizer_->eos();
  }
  check(!config_.data.reset_at_eos || eos_ >= 0, Exit::usage,
        "{}:data.reset_at_eos: no end-of-text token is known; set model.eos_token_id or "
        "data.tokenizer",
        args_.config);
}

void Trainer::allocate() {
  optimizer_ = std::make_unique<Optimizer>(*ops_, config_.optim);
  sync_ = std::make_unique<GradSync>(ranks_->comm(), *ops_, *model_, config_.train);
  monitor_ =
      std::make_unique<RunMonitor>(RunMonitor::Run{config_, out_, *ops_, *model_, *sync_, *ranks_,
                                                   weights_, tokenizer_.get(), eos_},
                                   args_.monitor);
  Arena arena("weights and optimizer"), shared("weights and gradients that ranks exchange");
  auto layout = [&] {
    weights_.take(arena, *ops_, model_->params(), /*with_grad=*/true,
                  ranks_->alone() ? nullptr : &shared, sync_->updated());
    optimizer_->take(arena, model_->params(), sync_->updated());
    sync_->take(shared);
    monitor_->take(arena);
  };
  layout();
  // Copies between GPUs need a place to land.
  const size_t landing = ranks_->alone() || !ops_->asynchronous() ? 0 : sync_->largest_sum_bytes();
  check_memory(arena.peak() + shared.peak() + landing);
  state_memory_ = {ops_->alloc(arena.peak(), arena.name()), [this](void* p) { ops_->free(p); }};
  arena.bind(state_memory_.get());
  if (shared.peak() > 0) {
    shared_memory_ = ranks_->alloc_shared(shared.peak(), landing, shared.name());
    shared.bind(shared_memory_.get());
  }
  layout();
  model_->use(weights_.weights());
  model_->set_hooks({[this](int stage) { sync_->before_forward(stage); },
                     [this](int stage) {
                       sync_->after_backward(stage);
                       monitor_->after_backward(stage);
                     }});
  model_->prepare(shape(config_.train.micro_batch));
  // Padding between weights is never written again; it must not hold NaN for the norm to meet.
  ops_->zero(weights_.weights().master);
  ops_->zero(weights_.weights().grad);
}

LmShape Trainer::shape(int64_t micro_batch) const {
  return {.B = micro_batch,
          .T = config_.data.seq_len,
          .train = true,
          .recompute = config_.train.recompute,
          .state = false};
}

// Before anything large is allocated, so that the error can say what would fit.
void Trainer::check_memory(size_t state_bytes) {
  const double free = double(ops_->memory().free);
  const auto bytes_with = [&](int64_t B, Recompute recompute) {
    Arena arena("activations");
    LmShape s = shape(B);
    s.recompute = recompute;
    model_->layout(arena, s);
    return state_bytes + arena.peak();
  };
  const auto bytes = [&](int64_t B) { return bytes_with(B, config_.train.recompute); };
  const int64_t B = config_.train.micro_batch;
  if (free == 0 || double(bytes(B)) <= free) return;
  int64_t fits = std::min(B, largest_micro_batch(bytes, free));
  while (fits > 0 && config_.train.global_batch % fits != 0) --fits;
  constexpr double kGiB = double(1 << 30);
  const std::string mend =
      fits > 0 ? fmt::format("the largest that fits and divides train.global_batch is {}", fits)
               : std::string("not one sequence fits");
  // Of what saves more memory than the configured, the cheapest that would do; else the most there
  // is.
  std::string recompute;
  for (const auto& [value, name] :
       {std::pair{Recompute::elementwise, "elementwise"}, std::pair{Recompute::block, "block"}}) {
    if (value <= config_.train.recompute) continue;
    recompute = fmt::format("; or set train.recompute to \"{}\"", name);
    if (double(bytes_with(B, value)) <= free) break;
  }
  fail(Exit::failed,
       "{}:train.micro_batch: {} sequences of {} tokens need {:.2f} GiB, of which {:.2f} for "
       "weights and optimizer; {:.2f} GiB are free: {}{}",
       args_.config, B, config_.data.seq_len, double(bytes(B)) / kGiB, double(state_bytes) / kGiB,
       free / kGiB, mend, recompute);
}

std::string Trainer::newest_checkpoint() {
  std::vector<std::string> complaints;
  const auto found = store_->newest_valid(&complaints);
  for (const std::string& c : complaints) log_warn("not resumed from: {}", c);
  return found ? found->dir : "";
}

std::string Trainer::find_start() {
  if (args_.resume != "never") tell_set_aside(store_->finish_go_on());
  if (args_.resume == "auto") return newest_checkpoint();
  // Ranks that a launcher started again go on from what they wrote, whatever the flag said first.
  if (env_.restarts > 0)
    if (const std::string own = newest_checkpoint(); !own.empty()) return own;
  if (args_.resume == "never") {
    if (exists(store_->folder())) {  // nothing is lost: the old run stays beside the new one
      std::string suffix = fmt::format(".before-{}", std::time(nullptr));
      while (exists(store_->folder() + suffix) || exists(out_ + "/metrics.jsonl" + suffix))
        suffix += "+";  // a clock may show one second twice
      rename_path(store_->folder(), store_->folder() + suffix);
      set_metrics_aside(out_, suffix);
      log_warn("--resume never: the earlier checkpoints are now {}{}", store_->folder(), suffix);
    }
    return "";
  }
  const std::string from = find_checkpoint(args_.resume, Checksums::all);
  check_folder(from, Checksums::none);  // weights alone are no state to go on from
  return from;
}

void Trainer::start() {
  // Rank 0 decides, the others follow: nobody else reads every byte, and all begin alike.
  const std::string from = ranks_->from_first(ranks_->first() ? find_start() : "");
  if (!from.empty()) {
    load_state(from);
    log_info("resumed from {} at step {}", from, step_);
    settle_branch(from);
    return;
  }
  std::vector<float> master;
  if (!args_.init_from.empty()) {
    const std::string init = ranks_->from_first(
        ranks_->first() ? find_checkpoint(args_.init_from, Checksums::without_optimizer) : "");
    const std::vector<std::string> differ = model_differences(read_hf_config(init), config_.model);
    check(differ.empty(), Exit::data,
          "--init-from {}: its model differs from {} in {}; use the same values", args_.init_from,
          args_.config, fmt::format("{}", differ.empty() ? "" : "model." + differ[0]));
    master.assign(size_t(model_->params().total()), 0.0f);
    load_weights(init, model_->params(), master.data());
    log_info("weights from {}", init);
  } else {
    master = initial_weights(model_->params(), config_.train.seed);
  }
  weights_.set(*ops_, master);
  optimizer_->zero_state();
}

void Trainer::load_state(const std::string& dir) {
  const size_t total = size_t(model_->params().total()),
               owned = size_t(total_size(sync_->updated()));
  std::vector<float> master(total), m(owned), v(owned);
  TrainerState state;
  load_checkpoint(dir, model_->params(), master.data(), m.data(), v.data(), &state,
                  sync_->updated());
  const std::vector<std::string> changed = forbidden_changes(state.config_json, config_json_);
  check(changed.empty(), Exit::usage,
        "{}:{}: differs from the run in {}; a resumed run may not change it (restore the value, or "
        "start a new --out with --init-from)",
        args_.config, changed.empty() ? "" : changed[0], dir);
  weights_.set(*ops_, master);
  optimizer_->set(m, v);
  step_ = state.step;
  updates_ = state.updates;
  tokens_ = state.tokens;
  next_sample_ = state.next_sample;
  sequences_ = state.series["sequences"];
  spikes_.load(state.series, dir);
  saved_step_ = step_;
}

// What is in the run folder but is not the past of `from` must not win the next resume.
void Trainer::settle_branch(const std::string& from) {
  if (ranks_->first()) tell_set_aside(store_->go_on_from(from, step_));
  if (store_->owns(from)) return;
  saved_step_ = -1;
  save(/*wait=*/true);
}

void Trainer::open_loader() {
  LoaderOptions o;
  for (const MixturePart& p : config_.data.train) o.sources.push_back({p.path, p.weight});
  o.seq_len = config_.data.seq_len;
  o.micro_batch = config_.train.micro_batch;
  o.global_batch = config_.train.global_batch;
  o.vocab_size = config_.model.vocab_size;
  o.shuffle = config_.data.shuffle;
  o.seed = config_.data.seed;
  o.reset_token = config_.data.reset_at_eos ? int32_t(eos_) : -1;
  o.first_sample = next_sample_;
  o.rank = ranks_->rank();
  o.world = ranks_->world();
  loader_.reset();
  loader_ = std::make_unique<DataLoader>(o);
  compare_data();
  ranks_->check_equal(fmt::format("{} {}", loader_->sequences(), loader_->tokens()),
                      "training data (sequences or tokens)");
  if (!config_.data.valid.empty() && config_.train.eval_every > 0 && !valid_) {
    ValidOptions v;
    v.path = config_.data.valid;
    v.seq_len = config_.data.seq_len;
    v.batch = config_.train.micro_batch;
    v.vocab_size = config_.model.vocab_size;
    v.max_tokens = config_.train.eval_tokens;
    v.reset_token = o.reset_token;
    v.rank = o.rank;
    v.world = o.world;
    valid_ = std::make_unique<ValidLoader>(v);
  }
}

// A shard that went or came between two starts makes another order of samples: allowed, but told.
void Trainer::compare_data() {
  const std::vector<int64_t> counts = loader_->by_source();
  const std::vector<double> now(counts.begin(), counts.end());
  if (!sequences_.empty() && now != sequences_)
    log_warn(
        "data.train holds {} sequences, it held {} when the checkpoint was saved: from here "
        "on the samples come in another order",
        fmt::join(now, " + "), fmt::join(sequences_, " + "));
  sequences_ = now;
}

}  // namespace hgrn
