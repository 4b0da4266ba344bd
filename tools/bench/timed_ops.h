// A backend that passes every call on and notes how long it took on the device, by operation: the
// breakdown that `hgrn-bench step` prints.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bench.h"
#include "ops/ops.h"

namespace hgrn::bench {

class TimedOps final : public Ops {
 public:
  explicit TimedOps(Ops& ops) : ops_(ops) {}

  void enable(bool on) { on_ = on; }
  // Forgets what was noted before.
  void start();
  // Waits for the device; one entry an operation, the longest first.
  std::vector<OpShare> finish();

  std::string describe() const override { return ops_.describe(); }
  DType act_dtype() const override { return ops_.act_dtype(); }
  DType stat_dtype() const override { return ops_.stat_dtype(); }
  DType master_dtype() const override { return ops_.master_dtype(); }
  int64_t vocab_multiple() const override { return ops_.vocab_multiple(); }
  int64_t width_multiple() const override { return ops_.width_multiple(); }
  double peak_flops() const override { return ops_.peak_flops(); }
  MemoryInfo memory() const override { return ops_.memory(); }
  void* alloc(size_t bytes, std::string_view what) override { return ops_.alloc(bytes, what); }
  void free(void* p) override { ops_.free(p); }
  void download(void* host, Tensor src) override { ops_.download(host, src); }
  void synchronize() override { ops_.synchronize(); }
  bool asynchronous() const override { return ops_.asynchronous(); }
  int64_t download_later(Tensor src) override { return ops_.download_later(src); }
  void fetch(void* host, int64_t ticket) override { ops_.fetch(host, ticket); }
  // While operations are timed one by one nothing is recorded.
  std::unique_ptr<Recording> record(std::function<void()> work) override {
    return on_ ? Ops::record(std::move(work)) : ops_.record(std::move(work));
  }
  size_t scratch_bytes(int64_t N, int64_t D) const override { return ops_.scratch_bytes(N, D); }
  void use_scratch(Tensor bytes) override { ops_.use_scratch(bytes); }
  int64_t mark() override { return ops_.mark(); }
  double elapsed_ms(int64_t from, int64_t to) override { return ops_.elapsed_ms(from, to); }
  void forget_marks() override { ops_.forget_marks(); }

  void zero(Tensor t) override;
  void copy(Tensor dst, Tensor src) override;
  void cast(Tensor dst, Tensor src) override;
  void upload(Tensor dst, const void* host) override;
  int64_t embedding_order_size(int64_t N, int64_t V, int64_t D) const override {
    return ops_.embedding_order_size(N, V, D);
  }
  void embedding_forward(Tensor x, Tensor tokens, Tensor w, float scale, Dropout drop,
                         Tensor order) override;
  void embedding_backward(Grad dw, Tensor dx, Tensor tokens, float scale, Dropout drop,
                          Tensor order) override;
  void linear_forward(Tensor y, Tensor x, Tensor w, Tensor b, Tensor c) override;
  void linear_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w) override;
  void norm_forward(Tensor y, Tensor stats, Tensor x, Tensor w, Tensor b, Norm kind,
                    float eps) override;
  void norm_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w, Tensor stats,
                     Norm kind, NormAgain again) override;
  void residual_norm_forward(Tensor sum, Tensor y, Tensor stats, Tensor x, Tensor branch, Tensor w,
                             Tensor b, Norm kind, float eps, Dropout drop) override;
  void residual_norm_backward(Tensor dsum, Tensor dbranch, Grad dw, Grad db, Tensor dy, Tensor sum,
                              Tensor w, Tensor stats, Norm kind, Dropout drop,
                              NormAgain again) override;
  void glu_forward(Tensor h, Tensor gu, Act act) override;
  void glu_backward(Tensor dgu, Tensor dh, Tensor gu, Act act, Tensor h) override;
  void linear_glu_forward(Tensor h, Tensor gu, Tensor x, Tensor w, Tensor b, Act act) override;
  void glu_linear_backward(Tensor dgu, Tensor dh, Grad dw, Grad db, Grad db_gu, Tensor dy, Tensor h,
                           Tensor gu, Tensor w, Act act, bool again) override;
  void cross_entropy(Tensor nll, Tensor logits, Tensor targets, int64_t vocab, bool backward,
                     double grad_scale) override;
  void lower_bound_forward(Tensor beta, Tensor gamma) override;
  void lower_bound_backward(Grad dgamma, Tensor dbeta, Tensor gamma) override;
  void sum(Tensor out, Tensor x) override;
  void square_sum(Tensor out, Tensor x) override;
  void clip_control(Tensor control, Tensor square_sum, Tensor nll_sum, double max_norm) override;
  void adamw(Tensor master, Tensor compute, Tensor m, Tensor v, Tensor grad, const AdamStep& step,
             Tensor control) override;
  void split(Tensor compute, Tensor rest, Tensor master) override {
    ops_.split(compute, rest, master);
  }
  void join(Tensor master, Tensor compute, Tensor rest) override {
    ops_.join(master, compute, rest);
  }
  void sample(Tensor tokens, Tensor history, Tensor seen, Tensor step, Tensor logits, int64_t vocab,
              const Sampling& s) override {
    timed("sample", [&] { ops_.sample(tokens, history, seen, step, logits, vocab, s); });
  }
  SeqKernel& seq(std::string_view name) override;

  template <class Call>
  void timed(std::string name, const Call& call) {
    if (!on_) return call();
    const int64_t from = ops_.mark();
    call();
    spans_.push_back({std::move(name), from, ops_.mark()});
  }

 private:
  struct Span {
    std::string name;
    int64_t from, to;
  };
  Ops& ops_;
  bool on_ = false;
  std::vector<Span> spans_;
  std::map<std::string, std::unique_ptr<SeqKernel>, std::less<>> seq_;
};

}  // namespace hgrn::bench
