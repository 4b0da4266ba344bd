#include "train/optimizer.h"

#include <algorithm>

namespace hgrn {

void Optimizer::take(Arena& arena, const ParamTable& table, std::vector<FlatRange> ranges) {
  if (ranges.empty()) ranges.push_back({0, table.total()});
  ranges_ = std::move(ranges);
  decayed_ = table.decayed();
  int64_t size = 0;
  for (const FlatRange& r : ranges_) size += r.end - r.begin;
  m_ = arena.take("optimizer moments", {size}, ops_.master_dtype());
  v_ = arena.take("optimizer moments", {size}, ops_.master_dtype());
  numbers_.all = arena.take("loss and optimizer scalars", {6}, DType::f64);
}

void Optimizer::zero_state() {
  ops_.zero(m_);
  ops_.zero(v_);
}

void Optimizer::sum_squares(const Weights& w) {
  const Tensor sum = numbers_.square_sum();
  ops_.zero(sum);
  for (const FlatRange& r : ranges_)
    if (r.begin < r.end) ops_.square_sum(sum, w.grad.slice(r.begin, r.end - r.begin));
}

void Optimizer::decide(double lr, int64_t t) {
  ops_.clip_control(numbers_.control(), numbers_.square_sum(), numbers_.nll_sum(),
                    config_.clip_norm);
  adam_ = {lr, config_.betas[0], config_.betas[1], config_.eps, config_.weight_decay, t};
}

void Optimizer::update(const Weights& w, FlatRange range) {
  const auto part = [&](int64_t first, int64_t last, double weight_decay) {
    const int64_t count = last - first;
    if (count <= 0) return;
    AdamStep adam = adam_;
    adam.weight_decay = weight_decay;
    ops_.adamw(w.master.slice(first, count), w.compute.slice(first, count),
               moment(m_, {first, last}), moment(v_, {first, last}), w.grad.slice(first, count),
               adam, numbers_.control());
  };
  part(range.begin, std::min(range.end, decayed_), config_.weight_decay);
  part(std::max(range.begin, decayed_), range.end, 0);
}

StepVerdict Optimizer::verdict(int64_t later) const {
  double n[6];
  ops_.fetch(n, later);
  return {n[0], n[1], n[3], n[4], n[5] != 0};
}

int64_t Optimizer::start_step(const Weights& w, double lr, int64_t t) {
  sum_squares(w);
  decide(lr, t);
  for (const FlatRange& r : ranges_) update(w, r);
  return numbers_later();
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
