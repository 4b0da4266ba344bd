// The fused forms in terms of the plain operations: what a backend does that has nothing better.
#include "ops/ops.h"

namespace hgrn {

void Ops::norm_linear_forward(Tensor y, const NormInput& in, Tensor w, Tensor b) {
  if (in.branch)
    residual_norm_forward(in.sum, in.normed, in.stats, in.x, in.branch, in.w, in.b, in.kind, in.eps,
                          {});
  else
    norm_forward(in.normed, in.stats, in.x, in.w, in.b, in.kind, in.eps);
  linear_forward(y, in.normed, w, b);
}

void Ops::glu_linear_forward(Tensor y, Tensor h, Tensor gu, Act act, Tensor w, Tensor b) {
  glu_forward(h, gu, act);
  linear_forward(y, h, w, b);
}

void Ops::linear_glu_forward(Tensor h, Tensor gu, Tensor x, Tensor w, Tensor b, Act act) {
  linear_forward(gu, x, w, b);
  glu_forward(h, gu, act);
}

void Ops::glu_linear_backward(Tensor dgu, Tensor dh, Tensor dw, Tensor db, Tensor dy, Tensor h,
                              Tensor gu, Tensor w, Act act) {
  linear_backward(dh, dw, db, dy, h, w);
  glu_backward(dgu, dh, gu, act);
}

namespace {

class Repeat final : public Recording {
 public:
  explicit Repeat(std::function<void()> work) : work_(std::move(work)) {}
  void replay() override { work_(); }

 private:
  std::function<void()> work_;
};

}  // namespace

std::unique_ptr<Recording> Ops::record(std::function<void()> work) {
  return std::make_unique<Repeat>(std::move(work));
}

}  // namespace hgrn
