// The fused forms in terms of the plain operations: what a backend does that has nothing better.
#include "ops/ops.h"

#include <cstring>

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

void Ops::glu_linear_backward(Tensor dgu, Tensor dh, Grad dw, Grad db, Grad db_gu, Tensor dy,
                              Tensor h, Tensor gu, Tensor w, Act act, bool again) {
  linear_backward(dh, {}, {}, dy, {}, w);
  glu_backward(dgu, dh, gu, act, again ? h : Tensor());
  linear_backward({}, dw, db, dy, h, w);
  if (db_gu) linear_backward({}, {}, db_gu, dgu, {}, {});
}

int64_t Ops::download_later(Tensor src) {
  check(src.bytes() <= kLaterBytes, "{} bytes are no small download", src.bytes());
  Later& slot = later_[laters_ % kLaterSlots];
  slot.size = src.bytes();
  download(slot.bytes, src);
  return laters_++;
}

void Ops::fetch(void* host, int64_t ticket) {
  check(ticket >= 0 && ticket < laters_ && ticket >= laters_ - kLaterSlots,
        "download {} of {} is not there any more", ticket, laters_);
  const Later& slot = later_[ticket % kLaterSlots];
  std::memcpy(host, slot.bytes, slot.size);
}

std::vector<ProductTrial> Ops::time_product(const Product&, const ProductTrials&) {
  return {};
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
