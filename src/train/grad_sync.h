// Data parallelism over the flat buffers: which ranges of gradients travel together (buckets), when
// (while backward goes on, as the last micro-batch completes them), and who owns what of them.
//
// A bucket [begin, end) is cut into `world` equal parts of whole 128 elements; rank r owns part r,
// the last rank also the few elements that are left. With ZeRO-1 (Rajbhandari et al. 2020,
// arXiv 1910.02054) gradients are reduce-scattered, each rank updates what it owns, and the
// weights are gathered while the next forward goes on; without it gradients are all-reduced and
// every rank updates all. Checkpoint files are cut the same way in both cases.
// docs/distributed.md has a picture.
#pragma once
#include <functional>
#include <vector>

#include "core/arena.h"
#include "core/flat_range.h"
#include "model/config.h"
#include "model/lm.h"
#include "ops/comm.h"

namespace hgrn {

struct Bucket {
  int64_t begin = 0, end = 0;  // elements of the flat buffers
  int stage = -1;              // of LanguageModel::Hooks: complete after its backward
  int64_t part = 0;            // elements of one rank's equal part
  FlatRange owned(int rank, int world) const;
};

// From the model's last stage to its first; together all of [0, table.total()). A bucket grows to
// `target` elements, but never over a stage that completes later than it must, and ends with a
// stage as soon as it is as large as what is left: the last ones, whose way is hidden under little
// or nothing, are small.
std::vector<Bucket> make_buckets(const LanguageModel& model, int world, int64_t target);

class GradSync {
 public:
  GradSync(Comm& comm, Ops& ops, const LanguageModel& model, const TrainConfig& config);
  // Memory of its own: staging for train.reduce_dtype bf16. `shared`: what collectives move.
  void take(Arena& shared);
  size_t largest_sum_bytes() const;  // of one collective that sums

  const std::vector<Bucket>& buckets() const { return buckets_; }
  // What this rank updates (all without ZeRO), and what it writes to its checkpoint file.
  const std::vector<FlatRange>& updated() const { return sharded_ ? owned_ : all_; }
  const std::vector<FlatRange>& owned() const { return owned_; }
  bool sharded() const { return sharded_; }

  // A step, in order: the last micro-batch begins; its stages complete; the sums are there.
  void last_micro_batch(Tensor grad);
  void after_backward(int stage);
  void finish();
  void drop();  // instead of finish(): the gradients are not wanted, but still on their way

  // update() of all that this rank updates. With ZeRO-1 bucket by bucket, in the order of forward,
  // and each bucket's parts go to all ranks while the next is updated.
  void update_weights(const Weights& w, const std::function<void(FlatRange)>& update);
  void before_forward(int stage);
  // A flat buffer of which each rank has what it updates becomes whole, for a checkpoint. Waits.
  void gather_whole(Tensor flat);

 private:
  void reduce(const Bucket& b);
  void gather(const Bucket& b, Tensor flat, int64_t first = 0);  // flat starts at `first`
  Comm::Ticket last_ = 0;
  Comm& comm_;
  Ops& ops_;
  const bool sharded_, bf16_;
  std::vector<Bucket> buckets_;
  std::vector<FlatRange> owned_, all_;
  Tensor staging_ /*(total) bf16*/, grad_ /*(total)*/;
  bool active_ = false;
  struct Pending {
    int stage;
    Comm::Ticket ticket;
  };
  std::vector<Pending> gathers_;  // not yet waited for, stages ascending
};

}  // namespace hgrn
