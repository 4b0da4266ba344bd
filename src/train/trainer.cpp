#include "train/trainer.h"

#include <chrono>
#include <cmath>
#include <ctime>
#include <filesystem>

#include "core/log.h"
#include "model/hf_config.h"
#include "train/schedule.h"

namespace hgrn {
namespace {

constexpr int kMaxRollbacks = 3;  // before the run gets past the step that failed

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string default_out(const std::string& config_path) {
  return "runs/" + std::filesystem::path(config_path).stem().string();
}

}  // namespace

Trainer::Trainer(const TrainArgs& args)
    : args_(args), config_(load_config(args.config, args.overrides)) {
  check_batch(config_.train, /*ranks=*/1);
  out_ = args_.out.empty() ? default_out(args_.config) : args_.out;
  open_tokenizer_and_eos();
  config_json_ = config_to_json(config_);
  make_dirs(out_);
  lock_ = std::make_unique<FileLock>(out_);
  log_to_file(out_ + "/log.txt");

  ops_ = open_ops(args_.device, config_.train.precision == Precision::bf16 ? "bf16" : "fp32");
  log_info("{}", ops_->describe());
  model_ =
      std::make_unique<LanguageModel>(*ops_, config_.model, config_.optim.decay == DecayKind::all);
  if (!fla_can_load(config_.model))
    log_info("this parameterisation is outside of fla's HGRN2: checkpoints load in hgrn only");
  allocate();
  store_ = std::make_unique<CheckpointStore>(out_, int(config_.train.keep_checkpoints));
  start();
  write_file_atomic(out_ + "/config.json", config_json_);
  metrics_ = std::make_unique<MetricsFile>(out_, step_);
  open_loader();
}

Trainer::~Trainer() = default;

// ---- start

void Trainer::open_tokenizer_and_eos() {
  eos_ = config_.model.eos_token_id;
  if (!config_.data.tokenizer.empty()) {
    tokenizer_ = open_tokenizer(config_.data.tokenizer);
    check(tokenizer_->vocab_size() <= config_.model.vocab_size, Exit::usage,
          "{}:model.vocab_size: {} is smaller than the tokenizer's {}; raise it", args_.config,
          config_.model.vocab_size, tokenizer_->vocab_size());
    if (eos_ < 0) eos_ = tokenizer_->eos();
  }
  check(!config_.data.reset_at_eos || eos_ >= 0, Exit::usage,
        "{}:data.reset_at_eos: no end-of-text token is known; set model.eos_token_id or "
        "data.tokenizer",
        args_.config);
}

void Trainer::allocate() {
  optimizer_ = std::make_unique<Optimizer>(*ops_, config_.optim);
  Arena arena("weights and optimizer");
  auto layout = [&] {
    weights_.take(arena, *ops_, model_->params(), /*with_grad=*/true);
    optimizer_->take(arena, model_->params());
    nll_sum_ = arena.take("loss", {1}, DType::f64);
  };
  layout();
  state_memory_ = {ops_->alloc(arena.peak(), arena.name()), [this](void* p) { ops_->free(p); }};
  arena.bind(state_memory_.get());
  layout();
  model_->use(weights_.weights());
  model_->prepare({.B = config_.train.micro_batch,
                   .T = config_.data.seq_len,
                   .train = true,
                   .recompute = config_.train.recompute,
                   .state = false});
  // Padding between weights is never written again; it must not hold NaN for the norm to meet.
  ops_->zero(weights_.weights().master);
  ops_->zero(weights_.weights().grad);
}

void Trainer::start() {
  std::string from;
  if (args_.resume == "auto") {
    std::vector<std::string> complaints;
    const auto found = store_->newest_valid(&complaints);
    for (const std::string& c : complaints) log_warn("not resumed from: {}", c);
    if (found) from = found->dir;
  } else if (args_.resume == "never") {
    if (exists(store_->folder())) {  // nothing is lost: the old run stays beside the new one
      const std::string suffix = fmt::format(".before-{}", std::time(nullptr));
      rename_path(store_->folder(), store_->folder() + suffix);
      if (exists(out_ + "/metrics.jsonl"))
        rename_path(out_ + "/metrics.jsonl", out_ + "/metrics.jsonl" + suffix);
      log_warn("--resume never: the earlier checkpoints are now {}{}", store_->folder(), suffix);
    }
  } else {
    from = args_.resume;
    if (exists(from + "/checkpoints")) {
      const auto found = CheckpointStore(from, 0).newest_valid(nullptr);
      check(found.has_value(), Exit::data, "{}: the run folder holds no checkpoint", from);
      from = found->dir;
    }
    verify_checkpoint(from);
  }

  if (!from.empty()) {
    load_state(from);
    log_info("resumed from {} at step {}", from, step_);
    return;
  }
  std::vector<float> master;
  if (!args_.init_from.empty()) {
    const std::vector<std::string> differ =
        model_differences(read_hf_config(args_.init_from), config_.model);
    check(differ.empty(), Exit::data,
          "--init-from {}: its model differs from {} in {}; use the same values", args_.init_from,
          args_.config, fmt::format("{}", differ.empty() ? "" : "model." + differ[0]));
    master.assign(size_t(model_->params().total()), 0.0f);
    load_weights(args_.init_from, model_->params(), master.data());
    log_info("weights from {}", args_.init_from);
  } else {
    master = initial_weights(model_->params(), config_.train.seed);
  }
  weights_.set(*ops_, master);
  optimizer_->zero_state();
}

void Trainer::load_state(const std::string& dir) {
  const size_t total = size_t(model_->params().total());
  std::vector<float> master(total), m(total), v(total);
  TrainerState state;
  load_checkpoint(dir, model_->params(), master.data(), m.data(), v.data(), &state);
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
  saved_step_ = step_;
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
  loader_.reset();
  loader_ = std::make_unique<DataLoader>(o);
  if (!config_.data.valid.empty() && config_.train.eval_every > 0 && !valid_) {
    ValidOptions v;
    v.path = config_.data.valid;
    v.seq_len = config_.data.seq_len;
    v.batch = config_.train.micro_batch;
    v.vocab_size = config_.model.vocab_size;
    v.max_tokens = config_.train.eval_tokens;
    v.reset_token = o.reset_token;
    valid_ = std::make_unique<ValidLoader>(v);
  }
}

// ---- the loop

Exit Trainer::run() {
  const TrainConfig& t = config_.train;
  const int64_t last = args_.stop_after >= 0 ? std::min(args_.stop_after, t.steps) : t.steps;
  log_info("{} parameters, {} sequences of {} tokens in {} files, step {} of {}",
           model_->params().count(), loader_->sequences(), config_.data.seq_len,
           loader_->files().size(), step_, t.steps);
  auto due = [&](int64_t every) { return every > 0 && step_ % every == 0; };
  while (step_ < last) {
    const bool advanced = train_step();
    if (advanced && due(t.eval_every)) evaluate();
    if (advanced && due(t.checkpoint_every)) save(/*wait=*/false);
    if (signals_.received() != 0) {
      save(/*wait=*/true);
      log_warn("stopped by signal {} after step {}; the same command goes on from there",
               signals_.received(), step_);
      return Exit::stopped;
    }
  }
  if (t.eval_every > 0 && !due(t.eval_every)) evaluate();
  save(/*wait=*/true);
  log_info("done: step {}, {} tokens, {}", step_, tokens_, out_);
  return Exit::ok;
}

// data -> forward and backward of each micro-batch -> verdict and update -> log.
// False where it ended in a rollback.
bool Trainer::train_step() {
  const double started = now_s();
  const TrainConfig& t = config_.train;
  const int64_t step = step_ + 1, tokens = t.global_batch * config_.data.seq_len;

  ops_->zero(weights_.weights().grad);
  ops_->zero(nll_sum_);
  for (int64_t done = 0; done < t.global_batch; done += t.micro_batch) {
    const Batch batch = loader_->next();
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
                             /*grad_scale=*/1.0 / double(tokens), drop, nll_sum_);
  }
  const double lr = learning_rate(config_.optim, t.steps, step);
  const StepVerdict verdict = optimizer_->step(weights_.weights(), nll_sum_, lr, updates_ + 1);
  double nll_sum = 0;
  ops_->download(&nll_sum, nll_sum_);
  const double loss = nll_sum / double(tokens);

  step_ = step;
  tokens_ += tokens;
  next_sample_ += t.global_batch;
  if (verdict.ok)
    ++updates_;
  else
    on_nonfinite(loss, verdict);
  window_seconds_ += now_s() - started;
  ++window_steps_;
  if (step_ != step) return false;
  if (step_ > failed_step_) rollbacks_ = 0;
  if (t.log_every > 0 && (step % t.log_every == 0 || step == t.steps)) log_step(loss, verdict, lr);
  return true;
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
  const auto found = store_->newest_valid(nullptr);
  if (!found) {
    log_warn("rollback: no checkpoint yet; only this step is left out");
    return;
  }
  failed_step_ = std::max(failed_step_, step_);
  check(++rollbacks_ <= kMaxRollbacks, Exit::nonfinite,
        "step {}: still not finite after {} rollbacks to {}; lower optim.lr", step_, kMaxRollbacks,
        found->dir);
  const int64_t position = next_sample_;
  load_state(found->dir);
  next_sample_ = position;
  saved_step_ = -1;  // the data position differs from what is on the disk
  log_warn("rolled back to {}; going on with sample {}", found->dir, next_sample_);
  metrics_.reset();
  metrics_ = std::make_unique<MetricsFile>(out_, step_);
  open_loader();
}

void Trainer::log_step(double loss, const StepVerdict& verdict, double lr) {
  const TrainConfig& t = config_.train;
  const double tokens = double(t.global_batch * config_.data.seq_len);
  StepMetrics m;
  m.step = step_;
  m.steps = t.steps;
  m.tokens = tokens_;
  m.loss = loss;
  m.grad_norm = verdict.grad_norm;
  m.lr = lr;
  m.step_ms = 1e3 * window_seconds_ / double(window_steps_);
  m.tokens_per_s = tokens * double(window_steps_) / window_seconds_;
  if (ops_->peak_flops() > 0)
    m.mfu = 6.0 * double(model_->params().count()) * m.tokens_per_s / ops_->peak_flops();
  const MemoryInfo memory = ops_->memory();
  m.memory_gib = double(memory.total - memory.free) / double(1 << 30);
  m.eta_s = double(t.steps - step_) * m.step_ms / 1e3;
  m.skipped = step_ - updates_;
  log_info("{}", log_line(m));
  metrics_->write(m);
  window_seconds_ = 0;
  window_steps_ = 0;
}

void Trainer::evaluate() {
  if (!valid_) return;
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
  const EvalMetrics m{step_, nll / double(tokens), tokens};
  log_info("step {}  valid loss {:.4f}  ppl {:.3f}  ({} tokens)", step_, m.valid_loss,
           std::exp(m.valid_loss), tokens);
  metrics_->write(m);
}

void Trainer::save(bool wait) {
  if (saved_step_ == step_) {
    store_->wait();
    return;
  }
  const double started = now_s();
  Snapshot s;
  s.table = &model_->params();
  s.master = weights_.get(*ops_);
  s.m = optimizer_->get_m();
  s.v = optimizer_->get_v();
  s.state.step = step_;
  s.state.updates = updates_;
  s.state.tokens = tokens_;
  s.state.next_sample = next_sample_;
  s.state.seed = config_.train.seed;
  s.state.config_json = config_json_;
  s.hf_config_json = hf_config_json(config_.model, eos_, config_.data.seq_len);
  if (tokenizer_)
    for (const TokenizerFile& file : tokenizer_->files())
      s.extra_files.push_back({file.name, file.path});
  store_->save_async(std::move(s));
  saved_step_ = step_;
  if (wait) store_->wait();
  log_info("checkpoint of step {}: training waited {:.0f} ms{}", step_, 1e3 * (now_s() - started),
           wait ? " (to the end of the save)" : "");
}

}  // namespace hgrn
