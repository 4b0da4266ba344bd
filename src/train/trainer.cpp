// The loop of a run. trainer_start.cpp has how it begins.
#include "train/trainer.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/log.h"
#include "model/hf_config.h"
#include "train/metrics.h"
#include "train/schedule.h"

namespace hgrn {
namespace {

constexpr int kMaxRollbacks = 3;  // before the run gets past the step that failed

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

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
      sync_->drop();  // the save may want the gradients' memory
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
  ops_->zero(optimizer_->numbers().all);
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
                             /*grad_scale=*/1.0 / double(tokens), drop,
                             optimizer_->numbers().nll_sum(),
                             may_record_ && !(last && monitor_->looks_inside(step)));
  }
}

// The same for the step after this one, while the device still works on this one. Not where
// something comes in between that reads gradients, wants their memory (a save), or waits for the
// device. Several ranks decide alike, since gradients leave for their sum here: by the step alone,
// not by a signal of one's own.
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
  agree();
  const double lr = learning_rate(config_.optim, t.steps, step);
  LossSpikes::Verdict spike;
  const bool wanted = wants_update(spike);
  optimizer_->decide(lr, updates_ + 1);
  sync_->update_weights(weights_.weights(), [&](FlatRange range) {
    if (wanted) optimizer_->update(weights_.weights(), range);
  });
  const int64_t numbers = optimizer_->numbers_later();
  run_ahead(step + 1);
  const StepVerdict verdict = optimizer_->verdict(numbers);
  ranks_->comm().throw_if_failed();  // nothing of a step that was given up gets past here
  agreed_signal_ = verdict.stop == 0 || asked_signal_ == 0 ? int(verdict.stop) : asked_signal_;
  const double loss = verdict.nll_sum / double(tokens);

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
bool Trainer::wants_update(LossSpikes::Verdict& spike) {
  if (!spikes_.on() || config_.train.on_spike != OnSpike::skip) return true;
  double nll_sum = 0;
  ops_->download(&nll_sum, optimizer_->numbers().nll_sum());
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

// Gradients, their norm, the loss, and whether some rank was asked to stop, over all ranks, so that
// all do the same. The device alone waits; the host hears of it once the step is done.
void Trainer::agree() {
  const StepNumbers& numbers = optimizer_->numbers();
  sync_->finish();
  optimizer_->sum_squares(weights_.weights());
  if (ranks_->alone()) return;
  const double mine = asked_signal_ = signals_.received();
  if (mine != 0) ops_->upload(numbers.stop(), &mine);
  ranks_->comm().agree(numbers.agreed(sync_->sharded()));
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
  store_->wait();  // or the copies below would stand beside those of the save before
  sync_->before_forward(INT32_MAX);  // whole masters are gathered by the update
  s.master = weights_.get(
      *ops_, [this](Tensor flat) { sync_->gather_whole(flat); }, /*wanted=*/ranks_->first());
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
