// Checkpoints: complete or not there. A folder is built under a name that is never resumed from,
// its manifest is written last, everything is fsynced, and one rename makes it a checkpoint.
// Grammar of the files: docs/checkpoints.md. What is promised and how it is tested:
// docs/reliability.md. The same state gives the same bytes.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/flat_range.h"
#include "core/params.h"
#include "train/manifest.h"

namespace hgrn {

// trainer.json
struct TrainerState {
  int64_t step = 0, updates = 0, tokens = 0;
  int64_t next_sample = 0;  // data position: global sample index, so any rank count can go on
  uint64_t seed = 0;        // random numbers are counter-based: seed and step are all their state
  std::string config_json;  // the resolved config; comes back as equal JSON, maybe other text
  std::map<std::string, std::vector<double>> series;  // loss-spike window and the like, exact
};

// Host copies of one moment.
struct Snapshot {
  const ParamTable* table = nullptr;  // outlives the save
  std::vector<float> master;          // (total); ranks > 0 leave it empty
  std::vector<float> m, v;            // (range), the moments that this rank owns
  FlatRange range;                    // default: all
  std::vector<FlatRange> ranges;      // instead, where there are several: ascending, m and v joined
  TrainerState state;
  std::string hf_config_json;                                    // becomes config.json
  std::vector<std::pair<std::string, std::string>> extra_files;  // name here, path to copy
};

// Which rank saves. `token` names this start of the run, equal on all ranks and new at each start
// (needed for world > 1 only). Ranks never talk here: each writes its optimizer file, rank 0 waits
// for all of them (timeout_s) and then completes the folder.
struct SaveRank {
  int rank = 0, world = 1;
  std::string token;
  double timeout_s = 1800;
};

class CheckpointStore {
 public:
  // Checkpoints live in run_dir/checkpoints/step-00001000. keep <= 0 keeps all. The constructor
  // touches nothing; the owner of the run folder's FileLock is the only one who may save.
  CheckpointStore(const std::string& run_dir, int keep, SaveRank rank = {});
  ~CheckpointStore();  // waits; an error not yet seen goes to the log

  // Returns the folder (on ranks > 0: where rank 0 will complete it). All ranks call it in the same
  // order. An older folder of the same step is
  // replaced once the new one is complete; then those beyond the newest `keep` are removed.
  std::string save(const Snapshot& snapshot);
  // The same on a background thread, one at a time: waits for the one before. Its error is thrown
  // by the next save, save_async or wait.
  void save_async(Snapshot&& snapshot);
  void wait();
  // The run has failed: a save in progress stops waiting for other ranks, and fails.
  void abandon() { abandoned_ = true; }

  struct Found {
    std::string dir;
    int64_t step;
  };
  // The newest folder whose manifest, sizes and checksums hold; one complaint for each newer one
  // that does not. None there: nullopt. Some there but none valid: Exit::data.
  std::optional<Found> newest_valid(std::vector<std::string>* complaints,
                                    Checksums checksums = Checksums::all) const;

  // The run goes on from `dir`, which holds `step`. Checkpoints here that are not its past are set
  // aside, whole, in folder()/abandoned-K, and newest_valid no longer finds them: later steps, or
  // all where `dir` is not of this store. Then the caller saves at once: until it has,
  // newest_valid refuses rather than find nothing. Complete at every moment: a process that dies
  // in it leaves the earlier state or the new one, which finish_go_on() at the next start
  // completes. Both return where the checkpoints lie now; empty if none moved. Rank 0 alone acts.
  std::string go_on_from(const std::string& dir, int64_t step);
  std::string finish_go_on();
  bool owns(const std::string& dir) const;  // a checkpoint in folder()

  const std::string& folder() const { return folder_; }  // run_dir/checkpoints

 private:
  std::string write(const Snapshot& snapshot, int64_t sequence);
  void build(const Snapshot& snapshot, const std::string& tmp) const;
  void contribute(const Snapshot& snapshot, const std::string& tmp) const;
  std::string folder_;
  int keep_;
  SaveRank rank_;
  int64_t saves_ = 0;
  std::atomic<bool> abandoned_ = false;
  std::thread thread_;
  std::exception_ptr error_;
};

std::string checkpoint_name(int64_t step);  // "step-00001000"

// Manifest, sizes, checksums, and the parts that a checkpoint must have. Throws Exit::data naming
// the file. Reads every byte that is to be checked. Returns the step.
int64_t verify_checkpoint(const std::string& dir, Checksums checksums = Checksums::all);

// The newest valid checkpoint of a run folder; damaged ones are passed over with a warning. Any
// other folder is taken for a checkpoint itself, and verified where it has a manifest: a Hugging
// Face folder of another program has none. Exit::data where nothing is left.
std::string find_checkpoint(const std::string& dir, Checksums checksums);

// Into flat host buffers: master (total), m and v (range); padding becomes zero. Null ones are left
// out. Any number of optimizer files serves any range. Sizes are checked against the manifest, the
// checksums are not: call verify_checkpoint first for a folder that newest_valid did not give.
void load_checkpoint(const std::string& dir, const ParamTable& table, float* master, float* m,
                     float* v, TrainerState* state, FlatRange range = {});
// The same for several ranges, ascending: m and v hold them one after another.
void load_checkpoint(const std::string& dir, const ParamTable& table, float* master, float* m,
                     float* v, TrainerState* state, const std::vector<FlatRange>& ranges);

// Weights alone, from any Hugging Face HGRN2 folder: F32, BF16, F16 or F64, one file or shards.
// Names that only one side has are Exit::data.
void load_weights(const std::string& dir, const ParamTable& table, float* master);

// The same a parameter at a time: each(id, values of its true shape), which are gone after the
// call.
void read_weights(const std::string& dir, const ParamTable& table,
                  const std::function<void(ParamId, const float*)>& each);

// trainer.json as text, and back (`where` for messages). Exit::data if it is damaged.
std::string trainer_state_to_json(const TrainerState& state);
TrainerState trainer_state_from_json(const std::string& text, const std::string& where);

}  // namespace hgrn
