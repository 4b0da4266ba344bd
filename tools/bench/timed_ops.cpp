#include "timed_ops.h"

#include <algorithm>

namespace hgrn::bench {
namespace {

class TimedSeq final : public SeqKernel {
 public:
  TimedSeq(TimedOps& timer, SeqKernel& kernel, std::string name)
      : timer_(timer), kernel_(kernel), name_(std::move(name)) {}
  int64_t packed_width(const SeqShape& s) const override { return kernel_.packed_width(s); }
  Shape state_shape(const SeqShape& s) const override { return kernel_.state_shape(s); }
  std::vector<SavedSpec> saved(const SeqShape& s) const override { return kernel_.saved(s); }
  void forward(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor hT, const SeqInputs& in,
               std::span<const Tensor> saved) override {
    timer_.timed(name_ + " forward", [&] { kernel_.forward(s, o, y, hT, in, saved); });
  }
  void backward(const SeqShape& s, const SeqOptions& o, const SeqGrads& out, Tensor dy, Tensor dhT,
                const SeqInputs& in, std::span<const Tensor> saved) override {
    timer_.timed(name_ + " backward", [&] { kernel_.backward(s, o, out, dy, dhT, in, saved); });
  }
  void step(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor h,
            const SeqInputs& in) override {
    timer_.timed(name_ + " step", [&] { kernel_.step(s, o, y, h, in); });
  }

 private:
  TimedOps& timer_;
  SeqKernel& kernel_;
  std::string name_;
};

// "linear forward (53248, 2304, 768)": rows, outputs, inputs.
std::string linear_name(const char* direction, Tensor y, Tensor w, Tensor x) {
  return fmt::format("linear {} {}", direction,
                     Shape{y.rows(), y.cols(), w ? w.cols() : x.cols()}.str());
}

}  // namespace

void TimedOps::start() {
  ops_.synchronize();
  ops_.forget_marks();
  spans_.clear();
}

std::vector<OpShare> TimedOps::finish() {
  ops_.synchronize();
  std::map<std::string, OpShare> by_name;
  for (const Span& s : spans_) {
    OpShare& share = by_name[s.name];
    share.name = s.name;
    ++share.calls;
    share.ms += ops_.elapsed_ms(s.from, s.to);
  }
  std::vector<OpShare> out;
  for (auto& [name, share] : by_name) out.push_back(std::move(share));
  std::sort(out.begin(), out.end(), [](const OpShare& a, const OpShare& b) { return a.ms > b.ms; });
  return out;
}

void TimedOps::zero(Tensor t) {
  timed("zero", [&] { ops_.zero(t); });
}
void TimedOps::copy(Tensor dst, Tensor src) {
  timed("copy", [&] { ops_.copy(dst, src); });
}
void TimedOps::cast(Tensor dst, Tensor src) {
  timed("cast", [&] { ops_.cast(dst, src); });
}
void TimedOps::upload(Tensor dst, const void* host) {
  timed("upload", [&] { ops_.upload(dst, host); });
}
void TimedOps::embedding_forward(Tensor x, Tensor tokens, Tensor w, float scale, Dropout drop,
                                 Tensor order) {
  timed("embedding forward", [&] { ops_.embedding_forward(x, tokens, w, scale, drop, order); });
}
void TimedOps::embedding_backward(Grad dw, Tensor dx, Tensor tokens, float scale, Dropout drop,
                                  Tensor order) {
  timed("embedding backward", [&] { ops_.embedding_backward(dw, dx, tokens, scale, drop, order); });
}
void TimedOps::linear_forward(Tensor y, Tensor x, Tensor w, Tensor b, Tensor c) {
  timed(linear_name(c ? "forward + residual" : "forward", y, w, x),
        [&] { ops_.linear_forward(y, x, w, b, c); });
}
void TimedOps::linear_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w) {
  timed(linear_name("backward", dy, w, x), [&] { ops_.linear_backward(dx, dw, db, dy, x, w); });
}
void TimedOps::norm_forward(Tensor y, Tensor stats, Tensor x, Tensor w, Tensor b, Norm kind,
                            float eps) {
  timed("norm forward", [&] { ops_.norm_forward(y, stats, x, w, b, kind, eps); });
}
void TimedOps::norm_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w,
                             Tensor stats, Norm kind, NormAgain again) {
  timed("norm backward", [&] { ops_.norm_backward(dx, dw, db, dy, x, w, stats, kind, again); });
}
void TimedOps::residual_norm_forward(Tensor sum, Tensor y, Tensor stats, Tensor x, Tensor branch,
                                     Tensor w, Tensor b, Norm kind, float eps, Dropout drop) {
  timed("residual_norm forward",
        [&] { ops_.residual_norm_forward(sum, y, stats, x, branch, w, b, kind, eps, drop); });
}
void TimedOps::residual_norm_backward(Tensor dsum, Tensor dbranch, Grad dw, Grad db, Tensor dy,
                                      Tensor sum, Tensor w, Tensor stats, Norm kind, Dropout drop,
                                      NormAgain again) {
  timed("residual_norm backward", [&] {
    ops_.residual_norm_backward(dsum, dbranch, dw, db, dy, sum, w, stats, kind, drop, again);
  });
}
void TimedOps::glu_forward(Tensor h, Tensor gu, Act act) {
  timed("glu forward", [&] { ops_.glu_forward(h, gu, act); });
}
void TimedOps::glu_backward(Tensor dgu, Tensor dh, Tensor gu, Act act, Tensor h) {
  timed("glu backward", [&] { ops_.glu_backward(dgu, dh, gu, act, h); });
}
void TimedOps::linear_glu_forward(Tensor h, Tensor gu, Tensor x, Tensor w, Tensor b, Act act) {
  timed(linear_name("+ glu forward", gu, w, x),
        [&] { ops_.linear_glu_forward(h, gu, x, w, b, act); });
}
void TimedOps::glu_linear_backward(Tensor dgu, Tensor dh, Grad dw, Grad db, Grad db_gu, Tensor dy,
                                   Tensor h, Tensor gu, Tensor w, Act act, bool again) {
  timed(linear_name("+ glu backward", dy, w, h),
        [&] { ops_.glu_linear_backward(dgu, dh, dw, db, db_gu, dy, h, gu, w, act, again); });
}
void TimedOps::cross_entropy(Tensor nll, Tensor logits, Tensor targets, int64_t vocab,
                             bool backward, double grad_scale) {
  timed("cross_entropy",
        [&] { ops_.cross_entropy(nll, logits, targets, vocab, backward, grad_scale); });
}
void TimedOps::lower_bound_forward(Tensor beta, Tensor gamma) {
  timed("lower_bound", [&] { ops_.lower_bound_forward(beta, gamma); });
}
void TimedOps::lower_bound_backward(Grad dgamma, Tensor dbeta, Tensor gamma) {
  timed("lower_bound", [&] { ops_.lower_bound_backward(dgamma, dbeta, gamma); });
}
void TimedOps::sum(Tensor out, Tensor x) {
  timed("sum", [&] { ops_.sum(out, x); });
}
void TimedOps::square_sum(Tensor out, Tensor x) {
  timed("square_sum", [&] { ops_.square_sum(out, x); });
}
void TimedOps::clip_control(Tensor control, Tensor square_sum, Tensor nll_sum, double max_norm) {
  timed("clip_control", [&] { ops_.clip_control(control, square_sum, nll_sum, max_norm); });
}
void TimedOps::adamw(Tensor master, Tensor compute, Tensor m, Tensor v, Tensor grad,
                     const AdamStep& step, Tensor control) {
  timed("adamw", [&] { ops_.adamw(master, compute, m, v, grad, step, control); });
}

SeqKernel& TimedOps::seq(std::string_view name) {
  const auto known = seq_.find(name);
  if (known != seq_.end()) return *known->second;
  auto timed_kernel = std::make_unique<TimedSeq>(*this, ops_.seq(name), std::string(name));
  return *seq_.emplace(std::string(name), std::move(timed_kernel)).first->second;
}

}  // namespace hgrn::bench
