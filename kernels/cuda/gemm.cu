// Linear layers: y (N,O) = x (N,I) w (O,I)^T + b + c, and its gradients.
// A row-major (R,C) matrix is a column-major (C,R) one, so that with column-major eyes
//   y' (O,N) = w'^T x'     dx' (I,N) = w' dy'     dw' (I,O) += x' dy'^T
// Products are summed in fp32. dw leaves the product in fp32 and is added there (beta = 1) but for
// the first micro-batch of a step: no rounding to bf16 between micro-batches. db is a column sum in
// two fixed stages. cuBLASLt's tensor-core kernels want widths that are multiples of 8 in bf16; the
// model pads what is not (Ops::width_multiple()). Twin: kernels/cpu/gemm.cpp   Test:
// tests/ops/test_linear.cpp
#include "cuda/gemm.h"

#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

cudaDataType cuda_type(DType t) {
  return t == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
}

// The largest power of two up to 256 that divides every address: what the heuristic may rely on.
uint32_t common_alignment(const GemmCall& c) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(c.a) | reinterpret_cast<uintptr_t>(c.b) |
                         reinterpret_cast<uintptr_t>(c.c) | reinterpret_cast<uintptr_t>(c.d) |
                         reinterpret_cast<uintptr_t>(c.bias) | 256;
  return uint32_t(bits & (~bits + 1));
}

}  // namespace

struct Gemm::Plan {
  cublasLtMatmulDesc_t op = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  cublasLtMatmulAlgo_t algo{};

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (d) cublasLtMatrixLayoutDestroy(d);
    if (b) cublasLtMatrixLayoutDestroy(b);
    if (a) cublasLtMatrixLayoutDestroy(a);
    if (op) cublasLtMatmulDescDestroy(op);
  }
  template <class V>
  void set(cublasLtMatmulDescAttributes_t name, const V& value) {
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(op, name, &value, sizeof(value)));
  }
};

namespace {

// The best-ranked algorithm that sums partial results of a split K in a fixed order and in fp32:
// the in-place scheme depends on which CTA comes first, the output-type one would round to bf16.
cublasLtMatmulAlgo_t choose_algorithm(cublasLtHandle_t handle, const GemmCall& c,
                                      cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a,
                                      cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t d,
                                      size_t workspace_bytes, uint32_t alignment) {
  cublasLtMatmulPreference_t preference = nullptr;
  CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
    return cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof(value));
  };
  const uint64_t workspace = workspace_bytes;
  const uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  cublasStatus_t status = set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, scheme);
  for (const auto name :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    if (status == CUBLAS_STATUS_SUCCESS) status = set(name, alignment);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasLtMatmulAlgoGetHeuristic(handle, op, a, b, d, d, preference, 1, &result, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  check(status == CUBLAS_STATUS_SUCCESS && found > 0 && result.state == CUBLAS_STATUS_SUCCESS,
        "cuBLASLt has no algorithm for a ({} x {}) x ({} x {}) product of {} into {}, aligned to "
        "{} bytes: {}",
        c.m, c.k, c.k, c.n, name_of(c.in), name_of(c.out), alignment,
        cublasLtGetStatusString(status == CUBLAS_STATUS_SUCCESS ? result.state : status));
  return result.algo;
}

}  // namespace

Gemm::Gemm(cudaStream_t stream) : stream_(stream) {
  CUBLAS_CHECK(cublasLtCreate(&handle_));
  CUDA_CHECK(cudaMalloc(&workspace_, kWorkspaceBytes));
}

Gemm::~Gemm() {
  plans_.clear();
  cudaFree(workspace_);
  cublasLtDestroy(handle_);
}

Gemm::Plan& Gemm::plan_for(const GemmCall& c) {
  const uint32_t alignment = common_alignment(c);
  const Key key{c.m,
                c.n,
                c.k,
                c.lda,
                c.ldb,
                c.ldd,
                c.transpose_a,
                c.transpose_b,
                c.in,
                c.out,
                c.bias != nullptr,
                c.beta != 0,
                alignment};
  const auto known = plans_.find(key);
  if (known != plans_.end()) return *known->second;

  auto plan = std::make_unique<Plan>();
  CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  plan->set(CUBLASLT_MATMUL_DESC_TRANSA, c.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  plan->set(CUBLASLT_MATMUL_DESC_TRANSB, c.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (c.bias) {
    plan->set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    plan->set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, cuda_type(c.out));
    plan->set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, c.bias);
  }
  const auto layout = [](cublasLtMatrixLayout_t* l, DType t, int64_t rows, int64_t cols,
                         int64_t ld) {
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(l, cuda_type(t), uint64_t(rows), uint64_t(cols), ld));
  };
  c.transpose_a ? layout(&plan->a, c.in, c.k, c.m, c.lda) : layout(&plan->a, c.in, c.m, c.k, c.lda);
  c.transpose_b ? layout(&plan->b, c.in, c.n, c.k, c.ldb) : layout(&plan->b, c.in, c.k, c.n, c.ldb);
  layout(&plan->d, c.out, c.m, c.n, c.ldd);
  plan->algo =
      choose_algorithm(handle_, c, plan->op, plan->a, plan->b, plan->d, kWorkspaceBytes, alignment);
  return *plans_.emplace(key, std::move(plan)).first->second;
}

void Gemm::run(const GemmCall& c) {
  if (c.m == 0 || c.n == 0) return;
  Plan& plan = plan_for(c);
  if (c.bias) plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, c.bias);
  const float alpha = 1;
  CUBLAS_CHECK(cublasLtMatmul(handle_, plan.op, &alpha, c.a, plan.a, c.b, plan.b, &c.beta,
                              c.c ? c.c : c.d, plan.d, c.d, plan.d, &plan.algo, workspace_,
                              kWorkspaceBytes, stream_));
}

namespace {

// partial[blockIdx.y] (O) = column sums of rows blockIdx.y, + gridDim.y, ... of dy (N,O).
template <class T, int kVec>
__global__ __launch_bounds__(256) void column_sum_kernel(float* partial, const T* dy, int64_t N,
                                                         int64_t O) {
  __shared__ float sums[8][32][kVec + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col = (int64_t(blockIdx.x) * 32 + lane) * kVec;
  float total[kVec] = {};
  if (col < O) {
#pragma unroll 4
    for (int64_t row = int64_t(blockIdx.y) * 8 + warp; row < N; row += int64_t(gridDim.y) * 8) {
      float v[kVec];
      load<kVec>(v, dy + row * O + col);
#pragma unroll
      for (int i = 0; i < kVec; ++i) total[i] += v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) sums[warp][lane][i] = total[i];
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (col + i >= O) continue;
    float t = 0;
    for (int k = 0; k < 8; ++k) t += sums[k][lane][i];
    partial[int64_t(blockIdx.y) * O + col + i] = t;
  }
}

}  // namespace

void CudaOps::linear_forward(Tensor y, Tensor x, Tensor w, Tensor b, Tensor c) {
  const int64_t N = x.rows(), I = x.cols(), O = w.rows();
  check(w.cols() == I && y.rows() == N && y.cols() == O && (!b || b.numel() == O) &&
            (!c || (c.numel() == y.numel() && c.data != y.data)),
        "linear_forward: y {}, x {}, w {}, b {}, c {}", y.shape.str(), x.shape.str(), w.shape.str(),
        b.shape.str(), c.shape.str());
  check(x.dtype == act_dtype_ && w.dtype == act_dtype_ && y.dtype == act_dtype_ &&
            (!b || b.dtype == act_dtype_) && (!c || c.dtype == act_dtype_),
        "linear_forward: tensors must be {}", name_of(act_dtype_));
  if (!c && few_rows(N, I)) return gemv(y, x, nullptr, nullptr, w, b);
  GemmCall g;
  g.m = O, g.n = N, g.k = I;
  g.transpose_a = true;
  g.in = g.out = act_dtype_;
  g.a = w.data, g.b = x.data, g.c = c.data, g.d = y.data, g.bias = b.data;
  g.lda = I, g.ldb = I, g.ldd = O;
  g.beta = c ? 1 : 0;
  gemm_->run(g);
}

void CudaOps::linear_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w) {
  const int64_t N = dy.rows(), O = dy.cols();
  check(!dx || (w && w.rows() == O && w.cols() == dx.cols() && dx.rows() == N),
        "linear_backward: dx {}, dy {}, w {}", dx.shape.str(), dy.shape.str(), w.shape.str());
  check(!dw || (x && x.rows() == N && dw.to.rows() == O && dw.to.cols() == x.cols()),
        "linear_backward: dw {}, dy {}, x {}", dw.to.shape.str(), dy.shape.str(), x.shape.str());
  check(!db || db.to.numel() == O, "linear_backward: db {}, dy {}", db.to.shape.str(),
        dy.shape.str());
  check(dy.dtype == act_dtype_ && (!dx || (dx.dtype == act_dtype_ && w.dtype == act_dtype_)) &&
            (!dw || (x.dtype == act_dtype_ && dw.to.dtype == DType::f32)),
        "linear_backward: dx, dy, x and w must be {}, dw f32", name_of(act_dtype_));
  if (N == 0 || O == 0) {
    if (dw.fresh) zero(dw.to);
    if (db.fresh) zero(db.to);
    return;
  }
  GemmCall c;
  c.in = act_dtype_;
  c.b = dy.data, c.ldb = O;
  if (dx) {
    c.m = dx.cols(), c.n = N, c.k = O;
    c.out = act_dtype_;
    c.a = w.data, c.d = dx.data;
    c.lda = c.ldd = dx.cols();
    gemm_->run(c);
  }
  if (dw) {
    c.m = dw.to.cols(), c.n = O, c.k = N;
    c.transpose_b = true;
    c.out = DType::f32;
    c.a = x.data, c.d = dw.to.data;
    c.lda = c.ldd = dw.to.cols();
    c.beta = dw.fresh ? 0 : 1;
    gemm_->run(c);
  }
  if (db) {
    const int64_t rows = column_sum_rows(N, O);
    auto* partial = reinterpret_cast<float*>(scratch(size_t(rows * O) * sizeof(float)));
    add_column_sums(db, partial, rows, dy.data, N, O);
  }
}

// Enough CTAs to fill the card, of at least 32 rows each.
int64_t CudaOps::column_sum_rows(int64_t N, int64_t O) const {
  const int64_t a_block = 32 * (O % kWide == 0 ? kWide : 1);
  const int64_t column_blocks = (O + a_block - 1) / a_block;
  const int64_t wanted = int64_t(prop_.multiProcessorCount) * 8 / column_blocks + 1;
  return std::clamp<int64_t>((N + 31) / 32, 1, wanted);
}

void CudaOps::add_column_sums(Grad out, float* partial, int64_t partial_rows, const void* dy,
                              int64_t N, int64_t O) {
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(O, {dy}, [&](auto width) {
      constexpr int kVec = width();
      const dim3 blocks(unsigned((O + 32 * kVec - 1) / (32 * kVec)), unsigned(partial_rows));
      column_sum_kernel<T, kVec>
          <<<blocks, 256, 0, stream_>>>(partial, static_cast<const T*>(dy), N, O);
      CUDA_CHECK(cudaGetLastError());
    });
  });
  add_partial_rows(out, partial, partial_rows, O);
}

}  // namespace hgrn
