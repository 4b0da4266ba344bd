#include "ops/plan_ops.h"

#include "ops/scratch.h"

namespace hgrn {
namespace {

[[noreturn]] void not_run() {
  fail(Exit::failed, "a planning backend was asked to compute");
}

constexpr int64_t kChunk = 64;  // both backends keep the state at the start of each 64 tokens

class PlanSeq final : public SeqKernel {
 public:
  explicit PlanSeq(DType act) : act_(act) {}
  int64_t packed_width(const SeqShape& s) const override { return 3 * s.D; }
  Shape state_shape(const SeqShape& s) const override { return {s.B, s.H(), s.n, s.n}; }
  std::vector<SavedSpec> saved(const SeqShape& s) const override {
    return {{"h", {s.B, (s.T + kChunk - 1) / kChunk, s.H(), s.n, s.n}, act_}};
  }
  void forward(const SeqShape&, const SeqOptions&, Tensor, Tensor, const SeqInputs&,
               std::span<const Tensor>) override {
    not_run();
  }
  void backward(const SeqShape&, const SeqOptions&, const SeqGrads&, Tensor, Tensor,
                const SeqInputs&, std::span<const Tensor>) override {
    not_run();
  }
  void step(const SeqShape&, const SeqOptions&, Tensor, Tensor, const SeqInputs&) override {
    not_run();
  }

 private:
  DType act_;
};

class PlanOps final : public Ops {
 public:
  PlanOps(DType act, bool cpu) : act_(act), cpu_(cpu), seq_(act) {}
  std::string describe() const override { return "plan"; }
  DType act_dtype() const override { return act_; }
  DType stat_dtype() const override { return DType::f32; }
  DType master_dtype() const override { return DType::f32; }
  int64_t vocab_multiple() const override { return cpu_ ? 16 : 128; }
  int64_t width_multiple() const override { return cpu_ ? 16 : 128; }
  int64_t mark() override { not_run(); }
  double elapsed_ms(int64_t, int64_t) override { not_run(); }
  void forget_marks() override {}
  size_t scratch_bytes(int64_t N, int64_t D) const override {
    return cpu_ ? 0 : gpu_scratch_bytes(N, D);
  }
  void use_scratch(Tensor) override { not_run(); }
  double peak_flops() const override { return 0; }
  MemoryInfo memory() const override { return {}; }
  SeqKernel& seq(std::string_view) override { return seq_; }

  void* alloc(size_t, std::string_view) override { not_run(); }
  void free(void*) override {}
  void zero(Tensor) override { not_run(); }
  void copy(Tensor, Tensor) override { not_run(); }
  void cast(Tensor, Tensor) override { not_run(); }
  void upload(Tensor, const void*) override { not_run(); }
  void download(void*, Tensor) override { not_run(); }
  void synchronize() override { not_run(); }
  int64_t embedding_order_size(int64_t N, int64_t V, int64_t D) const override {
    return cpu_ ? 0 : gpu_embedding_order(N, V, D);
  }
  void embedding_forward(Tensor, Tensor, Tensor, float, Dropout, Tensor) override { not_run(); }
  void embedding_backward(Grad, Tensor, Tensor, float, Dropout, Tensor) override { not_run(); }
  void linear_forward(Tensor, Tensor, Tensor, Tensor, Tensor) override { not_run(); }
  void linear_backward(Tensor, Grad, Grad, Tensor, Tensor, Tensor) override { not_run(); }
  void norm_forward(Tensor, Tensor, Tensor, Tensor, Tensor, Norm, float) override { not_run(); }
  void norm_backward(Tensor, Grad, Grad, Tensor, Tensor, Tensor, Tensor, Norm, NormAgain) override {
    not_run();
  }
  void residual_norm_forward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Norm, float,
                             Dropout) override {
    not_run();
  }
  void residual_norm_backward(Tensor, Tensor, Grad, Grad, Tensor, Tensor, Tensor, Tensor, Norm,
                              Dropout, NormAgain) override {
    not_run();
  }
  void glu_forward(Tensor, Tensor, Act) override { not_run(); }
  void glu_backward(Tensor, Tensor, Tensor, Act, Tensor) override { not_run(); }
  void linear_glu_forward(Tensor, Tensor, Tensor, Tensor, Tensor, Act) override { not_run(); }
  void glu_linear_backward(Tensor, Tensor, Grad, Grad, Grad, Tensor, Tensor, Tensor, Tensor, Act,
                           bool) override {
    not_run();
  }
  void cross_entropy(Tensor, Tensor, Tensor, int64_t, bool, double) override { not_run(); }
  void lower_bound_forward(Tensor, Tensor) override { not_run(); }
  void lower_bound_backward(Grad, Tensor, Tensor) override { not_run(); }
  void sum(Tensor, Tensor) override { not_run(); }
  void square_sum(Tensor, Tensor) override { not_run(); }
  void clip_control(Tensor, Tensor, Tensor, double) override { not_run(); }
  void adamw(Tensor, Tensor, Tensor, Tensor, Tensor, const AdamStep&, Tensor) override {
    not_run();
  }
  void split(Tensor, Tensor, Tensor) override { not_run(); }
  void join(Tensor, Tensor, Tensor) override { not_run(); }
  void sample(Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, const Sampling&) override {
    not_run();
  }

 private:
  DType act_;
  bool cpu_;
  PlanSeq seq_;
};

}  // namespace

std::unique_ptr<Ops> make_plan_ops(DType act, bool cpu) {
  return std::make_unique<PlanOps>(act, cpu);
}

}  // namespace hgrn
