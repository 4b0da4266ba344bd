// The CPU backend, and the specification that every other backend is tested against: plain loops
// templated on float and double, OpenMP over rows, a BLAS for the matrix products. Weights that
// are computed with and master weights are one buffer here.
// Twin: kernels/cuda/cuda_ops.h   Tests: tests/ops/
#pragma once
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "ops/ops.h"

namespace hgrn {

class CpuOps : public Ops {  // open to tests that want another act_dtype()
 public:
  explicit CpuOps(DType dtype);  // f32 or f64

  // cpu_ops.cpp
  std::string describe() const override;
  DType act_dtype() const override { return dtype_; }
  DType stat_dtype() const override { return dtype_; }
  DType master_dtype() const override { return dtype_; }
  int64_t vocab_multiple() const override { return 16; }  // rows of logits start on a cache line
  int64_t width_multiple() const override { return 16; }
  double peak_flops() const override { return 0; }
  MemoryInfo memory() const override;
  void* alloc(size_t bytes, std::string_view what) override;
  void free(void* p) override;
  void synchronize() override {}
  int64_t mark() override;
  double elapsed_ms(int64_t from, int64_t to) override;
  void forget_marks() override { marks_.clear(); }
  size_t scratch_bytes(int64_t, int64_t) const override { return 0; }
  void use_scratch(Tensor) override {}
  SeqKernel& seq(std::string_view name) override;

  // elementwise.cpp
  void zero(Tensor t) override;
  void copy(Tensor dst, Tensor src) override;
  void cast(Tensor dst, Tensor src) override;
  void upload(Tensor dst, const void* host) override;
  void download(void* host, Tensor src) override;
  void lower_bound_forward(Tensor beta, Tensor gamma) override;
  void lower_bound_backward(Grad dgamma, Tensor dbeta, Tensor gamma) override;
  void sum(Tensor out, Tensor x) override;
  void square_sum(Tensor out, Tensor x) override;

  // embedding.cpp
  void embedding_forward(Tensor x, Tensor tokens, Tensor w, float scale, Dropout drop,
                         Tensor order) override;
  void embedding_backward(Grad dw, Tensor dx, Tensor tokens, float scale, Dropout drop,
                          Tensor order) override;

  // gemm.cpp
  void linear_forward(Tensor y, Tensor x, Tensor w, Tensor b, Tensor c) override;
  void linear_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w) override;

  // norm.cpp
  void norm_forward(Tensor y, Tensor stats, Tensor x, Tensor w, Tensor b, Norm kind,
                    float eps) override;
  void norm_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w, Tensor stats,
                     Norm kind, NormAgain again) override;
  void residual_norm_forward(Tensor sum, Tensor y, Tensor stats, Tensor x, Tensor branch, Tensor w,
                             Tensor b, Norm kind, float eps, Dropout drop) override;
  void residual_norm_backward(Tensor dsum, Tensor dbranch, Grad dw, Grad db, Tensor dy, Tensor sum,
                              Tensor w, Tensor stats, Norm kind, Dropout drop,
                              NormAgain again) override;

  // gemm.cpp: with the GLU of rows that are in cache, where layers are narrow
  void linear_glu_forward(Tensor h, Tensor gu, Tensor x, Tensor w, Tensor b, Act act) override;
  void glu_linear_backward(Tensor dgu, Tensor dh, Grad dw, Grad db, Grad db_gu, Tensor dy, Tensor h,
                           Tensor gu, Tensor w, Act act, bool again) override;

  // glu.cpp
  void glu_forward(Tensor h, Tensor gu, Act act) override;
  void glu_backward(Tensor dgu, Tensor dh, Tensor gu, Act act, Tensor h) override;

  // cross_entropy.cpp
  void cross_entropy(Tensor nll, Tensor logits, Tensor targets, int64_t vocab, bool backward,
                     double grad_scale) override;

  // sample.cpp
  void sample(Tensor tokens, Tensor history, Tensor seen, Tensor step, Tensor logits, int64_t vocab,
              const Sampling& s) override;

  // adamw.cpp
  void clip_control(Tensor control, Tensor square_sum, Tensor nll_sum, double max_norm) override;
  void adamw(Tensor master, Tensor compute, Tensor m, Tensor v, Tensor grad, const AdamStep& step,
             Tensor control) override;
  void split(Tensor compute, Tensor rest, Tensor master) override;
  void join(Tensor master, Tensor compute, Tensor rest) override;

 private:
  DType dtype_;
  cpu::Scratch scratch_;
  std::vector<std::chrono::steady_clock::time_point> marks_;
  std::map<std::string, std::unique_ptr<SeqKernel>, std::less<>> seq_;
};

}  // namespace hgrn
