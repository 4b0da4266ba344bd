// The training loop. docs/tour.md follows one step through train_step().
//
// On a GPU the host stays ahead: forward and backward of the next step are started before it waits
// for the loss of this one, so that the card never waits for log lines; with one rank those of a
// micro-batch are one recorded graph. HGRN_RUN_AHEAD and HGRN_CUDA_GRAPH in the environment (0, 1)
// switch the two off or, on a CPU, on; the bits are the same.
#pragma once
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/file.h"
#include "model/config.h"
#include "model/lm.h"
#include "text/tokenizer.h"
#include "train/checkpoint.h"
#include "train/data_loader.h"
#include "train/grad_sync.h"
#include "train/loss_spike.h"
#include "train/optimizer.h"
#include "train/ranks.h"
#include "train/run_monitor.h"
#include "train/signals.h"

namespace hgrn {

struct TrainArgs {
  std::string config;                  // file
  std::vector<std::string> overrides;  // "section.key=value"
  std::string out;                     // run folder; empty: runs/<config's name>
  Device device = Device::automatic;
  std::string resume = "auto";  // auto, never, or a checkpoint or run folder
  std::string init_from;        // weights only; a checkpoint in `out` beats it
  int64_t stop_after = -1;      // stop after this step; the schedule spans train.steps
  // Ends the process: called on another thread where a rank is lost and this one hangs.
  std::function<void(const Error&)> give_up;
  MonitorOptions monitor;
};

class Trainer {
 public:
  explicit Trainer(const TrainArgs& args);
  ~Trainer();

  // Trains to the end. Exit::ok, or Exit::stopped after a signal. Exit::nonfinite is thrown.
  Exit run();

 private:
  void open();
  void join_ranks();
  void open_tokenizer_and_eos();
  void leave_memory_in_use();
  void allocate();
  void check_memory(size_t state_bytes);
  LmShape shape(int64_t micro_batch) const;
  void start();              // from a checkpoint, given weights, or the seed
  std::string find_start();  // the folder to resume from, on rank 0; empty: none
  std::string newest_checkpoint();
  void load_state(const std::string& dir);
  void settle_branch(const std::string& from);
  void open_loader();
  void compare_data();

  Exit train();
  bool train_step();
  void forward_backward(int64_t step);
  void run_ahead(int64_t step);
  void agree();
  int stop_signal();  // the same on all ranks after a step
  void on_nonfinite(double loss, const StepVerdict& verdict);
  void rollback();
  // Before the update: false where the loss is a spike that train.on_spike leaves out.
  bool wants_update(LossSpikes::Verdict& spike);
  void after_update(double loss, bool applied, LossSpikes::Verdict& spike);
  void evaluate();
  void save(bool wait);
  void wait_for_save();

  const TrainArgs args_;
  const RankEnv env_;
  Config config_;
  std::string config_json_, out_;
  std::unique_ptr<FileLock> lock_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Ranks> ranks_;
  std::unique_ptr<Tokenizer> tokenizer_;
  int64_t eos_ = -1;
  std::unique_ptr<LanguageModel> model_;
  WeightStore weights_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<GradSync> sync_;
  Ranks::Memory state_memory_, shared_memory_;  // freed before ops_ and ranks_ go
  std::unique_ptr<CheckpointStore> store_;
  std::unique_ptr<RunMonitor> monitor_;
  std::unique_ptr<DataLoader> loader_;
  std::unique_ptr<ValidLoader> valid_;
  StopSignals signals_;
  LossSpikes spikes_;

  int64_t step_ = 0;               // steps done
  int64_t updates_ = 0;            // updates applied: steps less the skipped ones
  int64_t tokens_ = 0;             // tokens seen
  int64_t next_sample_ = 0;        // data position
  std::vector<double> sequences_;  // of each source of data.train
  int64_t saved_step_ = -1;
  int64_t last_step_ = 0;  // of this call of train()
  // The device has forward and backward of the step after step_ in hand. Nothing of a step counts
  // before train_step() ends it, so that what is ahead may be dropped at any time.
  bool ahead_ = false;
  std::exception_ptr ahead_error_;  // what that met, told when its step comes
  const bool may_run_ahead_, may_record_;
  int asked_signal_ = 0, agreed_signal_ = 0;  // this rank's and all ranks', in the last step
  int64_t rollbacks_ = 0, failed_step_ = -1;  // to get past this step
};

}  // namespace hgrn
