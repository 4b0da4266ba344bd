// The CUDA backend: Ops on one GPU and one stream. Twin of kernels/cpu/cpu_ops.h, which specifies
// every operation. act_dtype() is bf16 (training) or f32 (tests, full precision); statistics,
// states, gradients and master weights are f32.
//
// Memory of its own, beside what alloc() hands out: 64 MiB for cuBLASLt and 8 MiB of pinned host
// memory. Temporaries within one call lie in what use_scratch() was given; a caller that gave none,
// or an unusual shape that needs more, costs a cudaMalloc at its first call.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/gemm.h"
#include "ops/ops.h"
#include "ops/scratch.h"

namespace hgrn {

class CudaOps final : public Ops {
 public:
  // The GPU of index local_rank becomes the calling thread's current device.
  CudaOps(DType act_dtype, int local_rank);
  ~CudaOps() override;
  CudaOps(const CudaOps&) = delete;
  CudaOps& operator=(const CudaOps&) = delete;

  cudaStream_t stream() const { return stream_; }  // all work is on it

  std::string describe() const override;
  DType act_dtype() const override { return act_dtype_; }
  DType stat_dtype() const override { return DType::f32; }
  DType master_dtype() const override { return DType::f32; }
  int64_t vocab_multiple() const override { return 128; }
  int64_t width_multiple() const override { return 128; }
  double peak_flops() const override;
  MemoryInfo memory() const override;
  std::string pci_bus_id() const override;

  void* alloc(size_t bytes, std::string_view what) override;
  void free(void* p) override;
  void zero(Tensor t) override;
  void copy(Tensor dst, Tensor src) override;
  void cast(Tensor dst, Tensor src) override;
  void upload(Tensor dst, const void* host) override;
  void download(void* host, Tensor src) override;
  void synchronize() override;
  bool asynchronous() const override { return true; }
  int64_t download_later(Tensor src) override;
  void fetch(void* host, int64_t ticket) override;
  int64_t mark() override;
  double elapsed_ms(int64_t from, int64_t to) override;
  void forget_marks() override { marks_ = 0; }
  size_t scratch_bytes(int64_t N, int64_t D) const override { return gpu_scratch_bytes(N, D); }
  void use_scratch(Tensor bytes) override { planned_scratch_ = bytes; }

  int64_t embedding_order_size(int64_t N, int64_t V, int64_t D) const override;
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
  void split(Tensor compute, Tensor rest, Tensor master) override;
  void join(Tensor master, Tensor compute, Tensor rest) override;

  void norm_linear_forward(Tensor y, const NormInput& in, Tensor w, Tensor b) override;
  void glu_linear_forward(Tensor y, Tensor h, Tensor gu, Act act, Tensor w, Tensor b) override;
  void sample(Tensor tokens, Tensor history, Tensor seen, Tensor step, Tensor logits, int64_t vocab,
              const Sampling& s) override;
  // A CUDA graph.
  std::unique_ptr<Recording> record(std::function<void()> work) override;

  SeqKernel& seq(std::string_view name) override;
  std::vector<ProductTrial> time_product(const Product& product,
                                         const ProductTrials& what) override;

 private:
  // At least `bytes`, 256-byte aligned, until the next call. Calls follow each other on one
  // stream, so that they may share it.
  char* scratch(size_t bytes);
  // Whether a linear layer of N rows and I inputs goes to the kernels of gemv.cu.
  bool few_rows(int64_t N, int64_t I) const;
  void gemv(Tensor y, Tensor x, const NormInput* norm, const Act* act, Tensor w, Tensor b);
  // Whether a GLU of this size goes to the kernels of glu_gemm_sm90.cu.
  bool fused_glu(int64_t N, int64_t F, int64_t D, std::initializer_list<const void*> data) const;
  void norm_backward_any(Tensor dx, Tensor dbranch, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w,
                         Tensor stats, Norm kind, const Dropout& drop, const NormAgain& again,
                         bool residual);
  void norm_forward_any(Tensor sum, Tensor y, Tensor stats, Tensor x, Tensor branch, Tensor w,
                        Tensor b, Norm kind, float eps, const Dropout& drop);
  // add_partial_rows() of partial_rows.h on stream_.
  void add_rows(Grad out, const float* partial, int64_t rows, int64_t cols);
  // out (O) += column sums of dy (N,O) in act_dtype(); partial has partial_rows rows.
  int64_t column_sum_rows(int64_t N, int64_t O) const;
  void add_column_sums(Grad out, float* partial, int64_t partial_rows, const void* dy, int64_t N,
                       int64_t O);
  void reduce_to(Tensor out, Tensor x, bool squares);
  template <bool kJoin>
  void halves(Tensor master, Tensor compute, Tensor rest);  // adamw.cu: split() and join()

  DType act_dtype_;
  int device_ = 0;
  cudaDeviceProp prop_{};
  cudaStream_t stream_ = nullptr;
  Tensor planned_scratch_;
  char* own_scratch_ = nullptr;
  size_t own_scratch_bytes_ = 0;
  bool recorded_ = false;               // a recording may hold addresses of the scratch
  std::vector<char*> retired_scratch_;  // which is then kept when it has to grow
  std::unique_ptr<Gemm> gemm_;
  std::map<std::string, std::unique_ptr<SeqKernel>, std::less<>> seq_;

  std::vector<cudaEvent_t> events_;  // of mark(), kept for the next round
  int64_t marks_ = 0;

  // Small uploads (the tokens of a micro-batch) pass through pinned memory and need no wait. Enough
  // places for a micro-batch ahead of the one that runs.
  static constexpr size_t kStagingBytes = size_t(1) << 20;
  static constexpr size_t kStagingSlots = 8;
  struct Staging {
    void* host = nullptr;
    cudaEvent_t free = nullptr;
  } staging_[kStagingSlots];
  size_t next_staging_ = 0;

  struct LaterSlot {
    void* host = nullptr;  // kLaterBytes, pinned
    cudaEvent_t done = nullptr;
    size_t size = 0;
  } later_[kLaterSlots];
  int64_t laters_ = 0;
};

}  // namespace hgrn
