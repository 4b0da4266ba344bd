#include "train/optimizer.h"

#include <algorithm>

namespace hgrn {

void Optimizer::take(Arena& arena, const ParamTable& table, std::vector<FlatRange> ranges,
                     Comm* comm) {
  if (ranges.empty()) ranges.push_back({0, table.total()});
  ranges_ = std::move(ranges);
  comm_ = comm;
  int64_t size = 0;
  for (const FlatRange& r : ranges_) size += r.end - r.begin;
  m_ = arena.take("optimizer moments", {size}, ops_.master_dtype());
  v_ = arena.take("optimizer moments", {size}, ops_.master_dtype());
  square_sum_ = arena.take("optimizer scalars", {1}, DType::f64);
  control_ = arena.take("optimizer scalars", {3}, DType::f64);
}

void Optimizer::zero_state() {
  ops_.zero(m_);
  ops_.zero(v_);
}

int64_t Optimizer::start_step(const Weights& w, Tensor nll_sum, double lr, int64_t t, bool apply) {
  ops_.zero(square_sum_);
  for (const FlatRange& r : ranges_)
    if (r.begin < r.end) ops_.square_sum(square_sum_, w.grad.slice(r.begin, r.end - r.begin));
  if (comm_) comm_->wait(comm_->all_reduce(square_sum_));
  ops_.clip_control(control_, square_sum_, nll_sum, config_.clip_norm);

  AdamStep adam{lr, config_.betas[0], config_.betas[1], config_.eps, config_.weight_decay, t};
  auto update = [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    if (count <= 0 || !apply) return;
    ops_.adamw(w.master.slice(first, count), w.compute.slice(first, count),
               moment(m_, {first, last}), moment(v_, {first, last}), w.grad.slice(first, count),
               adam, control_);
  };
  const int64_t decayed = w.table->decayed();
  for (const FlatRange& r : ranges_) {
    adam.weight_decay = config_.weight_decay;
    update(r.begin, std::min(r.end, decayed));
    adam.weight_decay = 0;
    update(std::max(r.begin, decayed), r.end);
  }

  return ops_.download_later(control_);
}

StepVerdict Optimizer::verdict(int64_t started) {
  double control[3];
  ops_.fetch(control, started);
  return {control[0], control[1], control[2] != 0};
}

void Optimizer::set(const std::vector<float>& m, const std::vector<float>& v) {
  check(int64_t(m.size()) == m_.numel() && v.size() == m.size(), "moments of another size");
  ops_.upload(m_, m.data());
  ops_.upload(v_, v.data());
}

// A part of a moment by its place in the flat buffers; it must lie in one of ranges_.
Tensor Optimizer::moment(Tensor t, FlatRange range) const {
  int64_t before = 0;
  for (const FlatRange& r : ranges_) {
    if (r.begin <= range.begin && range.end <= r.end)
      return t.slice(before + range.begin - r.begin, range.end - range.begin);
    before += r.end - r.begin;
  }
  fail(Exit::failed, "moments of [{}, {}) are not on this rank", range.begin, range.end);
}

std::vector<float> Optimizer::get(Tensor t, const std::vector<FlatRange>& ranges) const {
  std::vector<float> host;
  if (ranges.empty()) {
    host.resize(size_t(t.numel()));
    ops_.download(host.data(), t);
    return host;
  }
  for (const FlatRange& r : ranges) {
    const Tensor part = moment(t, r);
    const size_t before = host.size();
    host.resize(before + size_t(part.numel()));
    if (part.numel() > 0) ops_.download(host.data() + before, part);
  }
  return host;
}

}  // namespace hgrn
