#include "train/optimizer.h"

#include <algorithm>

namespace hgrn {

void Optimizer::take(Arena& arena, const ParamTable& table, std::vector<FlatRange> ranges) {
  if (ranges.empty()) ranges.push_back({0, table.total()});
  decayed_ = table.decayed();
  for (RangedTensor* moment : {&m_, &v_}) {
    moment->ranges = ranges;
    moment->data = arena.take("optimizer moments", {total_size(ranges)}, ops_.master_dtype());
  }
  numbers_.all = arena.take("loss and optimizer scalars", {6}, DType::f64);
}

void Optimizer::zero_state() {
  ops_.zero(m_.data);
  ops_.zero(v_.data);
}

void Optimizer::sum_squares(const Weights& w) {
  const Tensor sum = numbers_.square_sum();
  ops_.zero(sum);
  for (const FlatRange& r : m_.ranges)
    if (r.begin < r.end) ops_.square_sum(sum, w.grad.slice(r.begin, r.size()));
}

void Optimizer::decide(double lr, int64_t t) {
  ops_.clip_control(numbers_.control(), numbers_.square_sum(), numbers_.nll_sum(),
                    config_.clip_norm);
  adam_ = {lr, config_.betas[0], config_.betas[1], config_.eps, config_.weight_decay, t};
}

void Optimizer::update(const Weights& w, FlatRange range) {
  for (FlatRange part{range.begin, range.begin}; part.begin < range.end; part.begin = part.end) {
    part.end = range.end;
    for (const int64_t cut : {decayed_, w.master_first})
      if (part.begin < cut) part.end = std::min(part.end, cut);
    AdamStep adam = adam_;
    if (part.begin >= decayed_) adam.weight_decay = 0;
    ops_.adamw(w.master_or_rest(part), w.compute.slice(part.begin, part.size()), m_.part(part),
               v_.part(part), w.grad.slice(part.begin, part.size()), adam, numbers_.control());
  }
}

StepVerdict Optimizer::verdict(int64_t later) const {
  double n[6];
  ops_.fetch(n, later);
  return {n[0], n[1], n[3], n[4], n[5] != 0};
}

int64_t Optimizer::start_step(const Weights& w, double lr, int64_t t) {
  sum_squares(w);
  decide(lr, t);
  for (const FlatRange& r : m_.ranges) update(w, r);
  return numbers_later();
}

void Optimizer::set(const std::vector<float>& m, const std::vector<float>& v) {
  check(int64_t(m.size()) == m_.data.numel() && v.size() == m.size(), "moments of another size");
  ops_.upload(m_.data, m.data());
  ops_.upload(v_.data, v.data());
}

std::vector<float> Optimizer::get(const RangedTensor& moment,
                                  const std::vector<FlatRange>& ranges) const {
  std::vector<float> host;
  for (const FlatRange& r : ranges.empty() ? moment.ranges : ranges) {
    const Tensor part = moment.part(r);
    const size_t before = host.size();
    host.resize(before + size_t(part.numel()));
    if (part.numel() > 0) ops_.download(host.data() + before, part);
  }
  return host;
}

}  // namespace hgrn
