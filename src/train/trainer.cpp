#include "train/trainer.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <utility>

#include "core/log.h"
#include "model/hf_config.h"
#include "model/plan.h"
#include "train/manifest.h"
#include "train/metrics.h"
#include "train/schedule.h"

namespace hgrn {
namespace {

constexpr int kMaxRollbacks = 3;  // before the run gets past the step that failed

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

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
    leave_memory_in_use();
    throw ranks_->failed(e);
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
  gathered_memory_.release();
}

// ---- start

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
  Arena arena("weights and optimizer"), gathered("compute weights");
  auto layout = [&] {
    weights_.take(arena, *ops_, model_->params(), /*with_grad=*/true,
                  sync_->sharded() ? &gathered : nullptr);
    optimizer_->take(arena, model_->params(), sync_->updated(),
                     sync_->sharded() ? &ranks_->comm() : nullptr);
    sync_->take(arena);
    monitor_->take(arena);
    nll_sum_ = arena.take("loss", {1}, DType::f64);
    stop_ = arena.take("loss", {1}, DType::f64);
  };
  layout();
  check_memory(arena.peak() + gathered.peak());
  const auto free = [this](void* p) { ops_->free(p); };
  state_memory_ = {ops_->alloc(arena.peak(), arena.name()), free};
  arena.bind(state_memory_.get());
  if (gathered.peak() > 0) {
    void* memory = ranks_->comm().alloc_gathered(gathered.peak());
    if (!memory) {
      memory = ops_->alloc(gathered.peak(), gathered.name());
      gathered_memory_ = {memory, free};
    }
    gathered.bind(memory);
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
  const auto bytes = [&](int64_t B) {
    Arena arena("activations");
    model_->layout(arena, shape(B));
    return state_bytes + arena.peak();
  };
  const int64_t B = config_.train.micro_batch;
  if (free == 0 || double(bytes(B)) <= free) return;
  int64_t fits = std::min(B, largest_micro_batch(bytes, free));
  while (fits > 0 && config_.train.global_batch % fits != 0) --fits;
  constexpr double kGiB = double(1 << 30);
  const std::string mend =
      fits > 0 ? fmt::format("the largest that fits and divides train.global_batch is {}", fits)
               : std::string("not one sequence fits");
  fail(Exit::failed,
       "{}:train.micro_batch: {} sequences of {} tokens need {:.2f} GiB, of which {:.2f} for "
       "weights and optimizer; {:.2f} GiB are free: {}{}",
       args_.config, B, config_.data.seq_len, double(bytes(B)) / kGiB, double(state_bytes) / kGiB,
       free / kGiB, mend,
       config_.train.recompute == Recompute::block ? "" : "; or set train.recompute to \"block\"");
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
  const size_t total = size_t(model_->params().total());
  size_t owned = 0;
  for (const FlatRange& r : sync_->updated()) owned += size_t(r.end - r.begin);
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

// ---- the loop

Exit Trainer::run() {
  try {
    return train();
  } catch (const Error& e) {
    store_->abandon();
    throw ranks_->failed(e);
  }
}

Exit Trainer::train() {
  const TrainConfig& t = config_.train;
  last_step_ = args_.stop_after >= 0 ? std::min(args_.stop_after, t.steps) : t.steps;
  log_info("{} parameters, {} sequences of {} tokens in {} files, step {} of {}",
           model_->params().count(), loader_->sequences(), config_.data.seq_len,
           loader_->files().size(), step_, t.steps);
  auto due = [&](int64_t every) { return every > 0 && step_ % every == 0; };
  while (step_ < last_step_) {
    const bool advanced = train_step();
    if (advanced && due(t.eval_every)) evaluate();
    if (advanced && due(t.checkpoint_every)) save(/*wait=*/false);
    if (const int signal = stop_signal(); signal != 0) {
      // Ranks that save must have begun the same collectives before.
      if (!ranks_->alone() && ahead_error_) std::rethrow_exception(std::exchange(ahead_error_, {}));
      save(/*wait=*/true);
      if (ranks_->first())
        log_warn("stopped by signal {} after step {}; the same command{} goes on from there",
                 signal, step_, args_.resume == "auto" ? "" : " with --resume auto");
      return Exit::stopped;
    }
  }
  if (t.eval_every > 0 && !due(t.eval_every)) evaluate();
  save(/*wait=*/true);
  log_info("done: step {}, {} tokens, {}", step_, tokens_, out_);
  return Exit::ok;
}

int Trainer::stop_signal() {
  return ranks_->alone() ? signals_.received() : agreed_signal_;
}

// Starts a step: data -> forward and backward of each micro-batch.
void Trainer::forward_backward(int64_t step) {
  const TrainConfig& t = config_.train;
  const int64_t tokens = t.global_batch * config_.data.seq_len;
  model_->begin_step();
  ops_->zero(nll_sum_);
  const int64_t share = t.global_batch / ranks_->world();
  for (int64_t done = 0; done < share; done += t.micro_batch) {
    const Batch batch = loader_->next();
    const bool last = done + t.micro_batch == share;
    if (last) {
      sync_->last_micro_batch(weights_.weights().grad);
      monitor_->last_micro_batch(step);
    }
    Dropout drop;
    drop.p = float(config_.model.dropout);
    drop.seed = t.seed;
    drop.step = uint64_t(step);
    drop.row0 = batch.first_sample * batch.T;
    model_->forward_backward({.B = batch.B,
                              .T = batch.T,
                              .inputs = batch.inputs.data(),
                              .targets = batch.targets.data(),
                              .reset = batch.reset.empty() ? nullptr : batch.reset.data()},
                             /*grad_scale=*/1.0 / double(tokens), drop, nll_sum_,
                             may_record_ && !(last && monitor_->looks_inside(step)));
  }
}

// The same for the step after this one, while the device still works on this one. Not where
// something comes in between that reads gradients or waits for the device. Several ranks decide
// alike, since gradients leave for their sum here: by the step alone, not by a signal of one's own.
void Trainer::run_ahead(int64_t step) {
  const TrainConfig& t = config_.train;
  const auto due = [&](int64_t every) { return every > 0 && (step - 1) % every == 0; };
  if (!may_run_ahead_ || step > last_step_ || (ranks_->alone() && signals_.received() != 0)) return;
  if (due(t.eval_every) || due(t.checkpoint_every) || due(t.sample_every)) return;
  if (monitor_->looks_inside(step - 1) || monitor_->looks_inside(step)) return;
  ahead_ = true;
  try {
    forward_backward(step);
  } catch (...) {
    ahead_error_ = std::current_exception();
  }
}

// forward and backward -> verdict and update -> log. False where it ended in a rollback.
bool Trainer::train_step() {
  const double started = now_s();
  const TrainConfig& t = config_.train;
  const int64_t step = step_ + 1, tokens = t.global_batch * config_.data.seq_len;

  if (!std::exchange(ahead_, false)) forward_backward(step);
  if (ahead_error_) std::rethrow_exception(std::exchange(ahead_error_, nullptr));
  const int64_t wish = sum_over_ranks();
  const double lr = learning_rate(config_.optim, t.steps, step);
  LossSpikes::Verdict spike;
  const int64_t nll = ops_->download_later(nll_sum_);
  const bool wanted = wants_update(spike, nll);
  const int64_t update =
      optimizer_->start_step(weights_.weights(), nll_sum_, lr, updates_ + 1, wanted);
  sync_->gather_weights(weights_.weights());
  run_ahead(step + 1);
  const StepVerdict verdict = optimizer_->verdict(update);
  double nll_sum = 0;
  ops_->fetch(&nll_sum, nll);
  hear_ranks(wish);
  const double loss = nll_sum / double(tokens);

  step_ = step;
  tokens_ += tokens;
  next_sample_ += t.global_batch;
  const bool applied = verdict.ok && wanted;
  updates_ += applied;
  after_update(loss, applied, spike);
  if (!verdict.ok) on_nonfinite(loss, verdict);
  if (step_ != step) return false;
  if (step_ > failed_step_) rollbacks_ = 0;
  StepMetrics m;
  m.step = step_;
  m.tokens = tokens_;
  m.loss = loss;
  m.grad_norm = verdict.grad_norm;
  m.lr = lr;
  m.skipped = step_ - updates_;
  if (spikes_.on()) m.spikes = spikes_.spikes();
  m.loss_z = spike.z;
  monitor_->step_done(m, now_s() - started);
  return true;
}

// The loss is fetched ahead of the update only where it decides about it: one wait for the device
// more a step.
bool Trainer::wants_update(LossSpikes::Verdict& spike, int64_t nll) {
  if (!spikes_.on() || config_.train.on_spike != OnSpike::skip) return true;
  double nll_sum = 0;
  ops_->fetch(&nll_sum, nll);
  spike = spikes_.judge(nll_sum / double(config_.train.global_batch * config_.data.seq_len));
  return !spike.spike;
}

void Trainer::after_update(double loss, bool applied, LossSpikes::Verdict& spike) {
  if (!spikes_.on()) return;
  if (config_.train.on_spike == OnSpike::warn) spike = spikes_.judge(loss);
  if (spike.spike)
    log_warn("step {}: loss {:.4f} is a spike, {:.1f} robust deviations above the median {:.4f}{}",
             step_, loss, spike.z, spike.median, applied ? "" : "; the update was left out");
  if (applied)
    spikes_.applied(loss, spike);
  else if (spikes_.left_out(spike))
    log_warn(
        "step {}: {} spikes in a row were left out; the loss has a new level, from here on "
        "updates are applied and the window starts anew",
        step_, int(LossSpikes::kMaxInARow));
}

// Gradients, loss, and whether some rank was asked to stop: all ranks then do the same. Returns the
// download of the last.
int64_t Trainer::sum_over_ranks() {
  if (ranks_->alone()) return 0;
  const double mine = signals_.received();
  ops_->upload(stop_, &mine);
  asked_signal_ = int(mine);
  ranks_->comm().all_reduce(nll_sum_);
  const Comm::Ticket last = ranks_->comm().all_reduce(stop_);
  sync_->finish();
  ranks_->comm().wait(last);
  return ops_->download_later(stop_);
}

// What sum_over_ranks() summed, once the host has waited for the step anyway: a wait before the
// update would leave the device idle. Nothing of a step that was given up gets past here.
void Trainer::hear_ranks(int64_t wish) {
  if (ranks_->alone()) return;
  double sum = 0;
  ops_->fetch(&sum, wish);
  ranks_->comm().throw_if_failed();
  agreed_signal_ = sum == 0 || asked_signal_ == 0 ? int(sum) : asked_signal_;
}

void Trainer::on_nonfinite(double loss, const StepVerdict& verdict) {
  const std::string what =
      fmt::format("step {}: loss {}, gradient norm {}: not finite, the update was left out", step_,
                  loss, verdict.grad_norm);
  switch (config_.train.on_nonfinite) {
    case OnNonfinite::skip: log_warn("{}", what); return;
    case OnNonfinite::abort:
      fail(Exit::nonfinite,
           "{}; train.on_nonfinite is abort. Lower optim.lr, or set train.on_nonfinite to skip or "
           "rollback, and start again: the newest checkpoint is intact",
           what);
    case OnNonfinite::rollback: log_warn("{}", what); rollback();
  }
}

// Back to the newest checkpoint; the data position stays, so the batches in between are left out.
void Trainer::rollback() {
  store_->wait();
  std::string dir;
  if (ranks_->first())
    if (const auto found = store_->newest_valid(nullptr)) dir = found->dir;
  dir = ranks_->from_first(dir);
  if (dir.empty()) {
    log_warn("rollback: no checkpoint yet; only this step is left out");
    return;
  }
  ahead_ = false;  // its gradients are those of weights that go; the samples come again
  ahead_error_ = nullptr;
  sync_->drop();
  failed_step_ = std::max(failed_step_, step_);
  check(++rollbacks_ <= kMaxRollbacks, Exit::nonfinite,
        "step {}: still not finite after {} rollbacks to {}; lower optim.lr", step_, kMaxRollbacks,
        dir);
  const int64_t position = next_sample_;
  sync_->before_forward(INT32_MAX);  // no gather may still write what is loaded
  load_state(dir);
  next_sample_ = position;
  settle_branch(dir);
  saved_step_ = -1;  // the data position differs from what is on the disk
  log_warn("rolled back to {}; going on with sample {}", dir, next_sample_);
  monitor_->rolled_back(step_);
  open_loader();
}

void Trainer::evaluate() {
  if (!valid_) return;
  monitor_->phase("evaluating");
  double nll = 0;
  int64_t tokens = 0;
  Batch batch;
  std::vector<float> row;
  valid_->rewind();
  while (valid_->next(batch)) {
    const Tensor t = model_->forward({.B = batch.B,
                                      .T = batch.T,
                                      .inputs = batch.inputs.data(),
                                      .targets = batch.targets.data(),
                                      .reset = batch.reset.empty() ? nullptr : batch.reset.data()});
    row.resize(size_t(t.numel()));
    ops_->download(row.data(), t);
    for (size_t i = 0; i < row.size(); ++i)
      if (batch.targets[i] >= 0) nll += double(row[i]), ++tokens;
  }
  if (!ranks_->alone()) {
    double all_nll = 0, all_tokens = 0;
    for (double x : ranks_->gather(nll)) all_nll += x;
    for (double x : ranks_->gather(double(tokens))) all_tokens += x;
    nll = all_nll;
    tokens = int64_t(all_tokens);
  }
  monitor_->evaluated({step_, nll / double(tokens), tokens});
}

// The end of a save that the run waits for: it counts only where every rank has done its part.
void Trainer::wait_for_save() {
  if (ranks_->alone()) return store_->wait();
  std::exception_ptr met;
  try {
    store_->wait();
  } catch (...) {
    met = std::current_exception();
  }
  const std::vector<double> well = ranks_->gather(met ? 0 : 1);
  if (met) std::rethrow_exception(met);
  for (size_t r = 0; r < well.size(); ++r)
    check(well[r] != 0, Exit::failed, "rank {} of {} could not save step {}; see its log", r,
          well.size(), step_);
}

void Trainer::save(bool wait) {
  if (saved_step_ == step_) return wait_for_save();
  monitor_->phase("saving");
  const double started = now_s();
  Snapshot s;
  s.table = &model_->params();
  sync_->gather_master(weights_.weights());
  store_->wait();  // or the copies below would stand beside those of the save before
  if (ranks_->first()) s.master = weights_.get(*ops_);
  s.ranges = sync_->owned();
  s.m = optimizer_->get_m(s.ranges);
  s.v = optimizer_->get_v(s.ranges);
  ranks_->comm().throw_if_failed();
  s.state.step = step_;
  s.state.updates = updates_;
  s.state.tokens = tokens_;
  s.state.next_sample = next_sample_;
  s.state.seed = config_.train.seed;
  s.state.config_json = config_json_;
  if (!sequences_.empty()) s.state.series["sequences"] = sequences_;
  spikes_.save(s.state.series);
  s.hf_config_json = hf_config_json(config_.model, eos_, config_.data.seq_len);
  if (tokenizer_)
    for (const TokenizerFile& file : tokenizer_->files())
      s.extra_files.push_back({file.name, file.path});
  store_->save_async(std::move(s));
  saved_step_ = step_;
  if (wait) wait_for_save();
  log_info("checkpoint of step {}: training waited {:.0f} ms{}", step_, 1e3 * (now_s() - started),
           wait ? " (to the end of the save)" : "");
}

}  // namespace hgrn
