#include "train/grad_sync.h"

#include <algorithm>
#include <cstdlib>

#include "model/cluster.h"

namespace hgrn {
namespace {

constexpr int64_t kPartAlign = 128;  // as ParamTable aligns weights

int64_t bucket_elements() {
  const char* set = std::getenv("HGRN_BUCKET_ELEMENTS");  // for tests and experiments
  return set ? std::max<int64_t>(1, std::atoll(set)) : kBucketElements;
}

// Pieces between places where buckets may be cut, ascending.
std::vector<Bucket> pieces_of(const LanguageModel& model) {
  const ParamTable& table = model.params();
  std::vector<ParamId> ids(table.params().size());
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = ParamId(i);
  std::sort(ids.begin(), ids.end(), [&](ParamId a, ParamId b) {
    return table.params()[size_t(a)].offset < table.params()[size_t(b)].offset;
  });
  std::vector<Bucket> pieces;
  for (ParamId id : ids) {
    const Param& p = table.params()[size_t(id)];
    const int stage = model.stage_of(id);
    if (pieces.empty() || p.offset % kPartAlign == 0) {
      if (!pieces.empty()) pieces.back().end = p.offset;
      pieces.push_back({p.offset, 0, stage, 0});
    }
    pieces.back().stage = std::min(pieces.back().stage, stage);
  }
  if (!pieces.empty()) pieces.front().begin = 0, pieces.back().end = table.total();
  return pieces;
}

void append(std::vector<FlatRange>& ranges, FlatRange r) {
  if (r.begin == r.end) return;
  if (!ranges.empty() && ranges.back().end == r.begin)
    ranges.back().end = r.end;
  else
    ranges.push_back(r);
}

}  // namespace

FlatRange Bucket::owned(int rank, int world) const {
  return {begin + rank * part, rank == world - 1 ? end : begin + (rank + 1) * part};
}

std::vector<Bucket> make_buckets(const LanguageModel& model, int world, int64_t target) {
  std::vector<Bucket> pieces = pieces_of(model), buckets;
  const int64_t decayed = model.params().decayed(), wide = model.params().wide_first();
  int64_t left = 0;  // elements of layers and head in pieces to come
  for (const Bucket& p : pieces) left += p.stage >= 0 ? p.end - p.begin : 0;
  const auto full = [&](const Bucket& b, int next_stage) {
    const int64_t size = b.end - b.begin;
    return size >= target ||
           (next_stage < b.stage && size >= std::max(left, target / kSmallBuckets));
  };
  for (auto p = pieces.rbegin(); p != pieces.rend(); ++p) {
    const bool open = !buckets.empty() && buckets.back().begin == p->end && p->end != decayed &&
                      p->end != wide && !full(buckets.back(), p->stage) &&
                      p->stage <= buckets.back().stage &&
                      (p->stage >= 0 || buckets.back().stage < 0);
    if (p->stage >= 0) left -= p->end - p->begin;
    if (!open) {
      buckets.push_back(*p);
      continue;
    }
    Bucket& b = buckets.back();
    b.begin = p->begin;
    b.stage = p->stage;
  }
  std::stable_sort(buckets.begin(), buckets.end(),
                   [](const Bucket& a, const Bucket& b) { return a.stage > b.stage; });
  for (Bucket& b : buckets) b.part = (b.end - b.begin) / world / kPartAlign * kPartAlign;
  return buckets;
}

GradSync::GradSync(Comm& comm, Ops& ops, const LanguageModel& model, const TrainConfig& config)
    : comm_(comm),
      ops_(ops),
      sharded_(config.zero == 1 && comm.world() > 1),
      bf16_(config.reduce_dtype == ReduceDType::bf16 && comm.world() > 1),
      buckets_(make_buckets(model, comm.world(), bucket_elements())) {
  std::vector<Bucket> ascending = buckets_;
  std::sort(ascending.begin(), ascending.end(),
            [](const Bucket& a, const Bucket& b) { return a.begin < b.begin; });
  for (const Bucket& b : ascending) append(owned_, b.owned(comm.rank(), comm.world()));
  if (owned_.empty()) owned_.push_back({0, 0});
  all_ = {{0, model.params().total()}};
}

void GradSync::take(Arena& shared) {
  if (bf16_) staging_ = shared.take("gradients on their way (bf16)", {all_[0].end}, DType::bf16);
}

size_t GradSync::largest_sum_bytes() const {
  int64_t most = 0;
  for (const Bucket& b : buckets_) most = std::max(most, b.end - b.begin);
  return size_t(most) * (bf16_ ? sizeof(uint16_t) : sizeof(float));
}

// ---- gradients

void GradSync::last_micro_batch(Tensor grad) {
  grad_ = grad;
  active_ = comm_.world() > 1;
}

void GradSync::after_backward(int stage) {
  if (!active_) return;
  for (const Bucket& b : buckets_)
    if (b.stage == stage) reduce(b);
}

void GradSync::reduce(const Bucket& b) {
  const int64_t size = b.end - b.begin, even = b.part * comm_.world();
  Tensor x = grad_.slice(b.begin, size);
  if (bf16_) {
    const Tensor narrow = staging_.slice(b.begin, size);
    ops_.cast(narrow, x);
    x = narrow;
  }
  if (sharded_) {
    comm_.reduce_scatter(x.slice(0, even));
    last_ = comm_.all_reduce(x.slice(even, size - even));
  } else {
    last_ = comm_.all_reduce(x);
  }
}

void GradSync::finish() {
  if (!active_) return;
  active_ = false;
  comm_.wait(last_);
  if (!bf16_) return;
  for (const FlatRange& r : updated())
    ops_.cast(grad_.slice(r.begin, r.end - r.begin), staging_.slice(r.begin, r.end - r.begin));
}

void GradSync::drop() {
  if (!active_) return;
  active_ = false;
  comm_.wait(last_);  // the next gradients go where these still travel
}

// ---- weights

void GradSync::gather(const Bucket& b, Tensor flat, int64_t first) {
  const int64_t begin = b.begin - first, even = b.part * comm_.world();
  comm_.all_gather(flat.slice(begin, even));
  last_ = comm_.broadcast(flat.slice(begin + even, b.end - b.begin - even), comm_.world() - 1);
}

void GradSync::update_weights(const Weights& w, const std::function<void(FlatRange)>& update) {
  if (!sharded_) return update(all_[0]);
  gathers_.clear();
  for (auto b = buckets_.rbegin(); b != buckets_.rend(); ++b) {  // forward's order
    update(b->owned(comm_.rank(), comm_.world()));
    gather(*b, w.compute);
    if (w.split() && b->begin >= w.master_first) gather(*b, w.master, w.master_first);
    gathers_.push_back({b->stage, last_});
  }
}

void GradSync::before_forward(int stage) {
  size_t n = 0;
  while (n < gathers_.size() && gathers_[n].stage <= stage) ++n;
  if (n == 0) return;
  comm_.wait(gathers_[n - 1].ticket);
  gathers_.erase(gathers_.begin(), gathers_.begin() + int64_t(n));
}

void GradSync::gather_whole(Tensor flat) {
  if (!sharded_) return;
  before_forward(INT32_MAX);
  for (const Bucket& b : buckets_) gather(b, flat);
  comm_.wait(last_);
}

}  // namespace hgrn
