// Matrix products through cuBLASLt, in its column-major terms. The algorithm for a shape is what
// cuBLASLt's heuristic ranks first, or what a fixed table of measured shapes names, asked once and
// kept: nothing is timed, so that equal programs on equal machines use equal algorithms and give
// equal bits.
#pragma once
#include <cublasLt.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

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

// The products of a linear layer, w (O,I), N rows: all but pointers and beta.
// y = x w^T (a = w, b = x); dx = dy w (a = w, b = dy); dw = dy^T x (a = x, b = dy), in fp32
GemmCall forward_call(DType act, int64_t N, int64_t I, int64_t O);
GemmCall input_gradient_call(DType act, int64_t N, int64_t I, int64_t O);
GemmCall weight_gradient_call(DType act, int64_t N, int64_t I, int64_t O);

struct GemmCandidate {
  cublasLtMatmulAlgo_t algo{};
  int id = 0, tile = 0, stages = 0, cluster = 0, swizzle = 0, split_k = 0;
  std::string text() const;
};

class Gemm {
 public:
  explicit Gemm(cudaStream_t stream);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  void run(const GemmCall& call);

  // Candidates for a call, the heuristic's best first; which of them is taken, and joins them where
  // the heuristic does not rank it; those that the library accepts, ranked or not, in the order of
  // tiles, clusters and swizzles, with all else as in `of`; a call with one of them.
  std::vector<GemmCandidate> candidates(const GemmCall& call, int count);
  int choose(const GemmCall& call, std::vector<GemmCandidate>& all) const;
  std::vector<GemmCandidate> variants(const GemmCall& call, const GemmCandidate& of) const;
  void run(const GemmCall& call, const GemmCandidate& candidate);

 private:
  struct Plan;
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, DType,
                         DType, bool, bool, bool, uint32_t>;
  Plan& plan_for(const GemmCall& call);
  std::unique_ptr<Plan> describe(const GemmCall& call) const;  // all but the algorithm
  std::vector<GemmCandidate> ask(const Plan& plan, const GemmCall& call, int count) const;
  int choose(const Plan& plan, const GemmCall& call, std::vector<GemmCandidate>& all) const;
  // `of` with another tile, cluster and order of tiles, K in one piece, where the library accepts
  // it.
  std::optional<GemmCandidate> variant(const Plan& plan, const GemmCall& call,
                                       const GemmCandidate& of, int tile, int cluster,
                                       int swizzle) const;
  void run(const GemmCall& call, Plan& plan, const cublasLtMatmulAlgo_t& algo);

  static constexpr size_t kWorkspaceBytes = size_t(64) << 20;
  int major_ = 0;  // compute capability
  cudaStream_t stream_;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace hgrn
