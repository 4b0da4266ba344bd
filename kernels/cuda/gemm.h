// Matrix products through cuBLASLt, in its column-major terms. The algorithm for a shape is what
// cuBLASLt's heuristic ranks first, asked once and kept: nothing is timed, so that equal programs
// on equal machines use equal algorithms and give equal bits.
#pragma once
#include <cublasLt.h>

#include <map>
#include <memory>
#include <tuple>

#include "core/dtype.h"

namespace hgrn {

// D (m,n) = op(A) op(B) + beta C + bias over the columns, all column-major; op(A) is (m,k), op(B)
// is (k,n); lda, ldb, ldd elements lie between columns as stored. C is D where it is null, and laid
// out like D. A and B hold `in`, C and D hold `out`,
// bias (m) holds `out` or is null; products are summed in fp32.
struct GemmCall {
  int64_t m = 0, n = 0, k = 0;
  int64_t lda = 0, ldb = 0, ldd = 0;
  bool transpose_a = false, transpose_b = false;
  DType in = DType::f32, out = DType::f32;
  const void* a = nullptr;
  const void* b = nullptr;
  const void* c = nullptr;
  void* d = nullptr;
  const void* bias = nullptr;
  float beta = 0;
};

class Gemm {
 public:
  explicit Gemm(cudaStream_t stream);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  void run(const GemmCall& call);

 private:
  struct Plan;
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, DType,
                         DType, bool, bool, uint32_t>;
  Plan& plan_for(const GemmCall& call);

  static constexpr size_t kWorkspaceBytes = size_t(64) << 20;
  cudaStream_t stream_;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace hgrn
