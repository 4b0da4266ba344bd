// Linear layers: y (N,O) = x (N,I) w (O,I)^T + b + c, and its gradients.
// A row-major (R,C) matrix is a column-major (C,R) one, so that with column-major eyes
//   y' (O,N) = w'^T x'     dx' (I,N) = w' dy'     dw' (I,O) += x' dy'^T
// Products are summed in fp32. dw leaves the product in fp32 and is added there (beta = 1) but for
// the first micro-batch of a step: no rounding to bf16 between micro-batches. db is a column sum in
// two fixed stages. cuBLASLt's tensor-core kernels want widths that are multiples of 8 in bf16; the
// model pads what is not (Ops::width_multiple()).
// Twin: kernels/cpu/gemm.cpp   Test: tests/ops/test_linear.cpp
#include "cuda/gemm.h"

#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm_choices.h"
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

GemmCall forward_call(DType act, int64_t N, int64_t I, int64_t O) {
  GemmCall g;
  g.m = O, g.n = N, g.k = I;
  g.transpose_a = true;
  g.in = g.out = act;
  g.lda = I, g.ldb = I, g.ldd = O;
  return g;
}

GemmCall input_gradient_call(DType act, int64_t N, int64_t I, int64_t O) {
  GemmCall g;
  g.m = I, g.n = N, g.k = O;
  g.in = g.out = act;
  g.lda = I, g.ldb = O, g.ldd = I;
  return g;
}

GemmCall weight_gradient_call(DType act, int64_t N, int64_t I, int64_t O) {
  GemmCall g;
  g.m = I, g.n = O, g.k = N;
  g.transpose_b = true;
  g.in = act, g.out = DType::f32;
  g.lda = I, g.ldb = O, g.ldd = I;
  return g;
}

namespace {

int algorithm_config(const cublasLtMatmulAlgo_t& algo, cublasLtMatmulAlgoConfigAttributes_t name) {
  // The cluster is 16 bits wide, the others are 32: zeroed first, this is right for both.
  int value = 0;
  size_t written = 0;
  if (cublasLtMatmulAlgoConfigGetAttribute(&algo, name, &value, sizeof(value), &written) ==
      CUBLAS_STATUS_SUCCESS)
    return value;
  uint16_t narrow = 0;
  if (cublasLtMatmulAlgoConfigGetAttribute(&algo, name, &narrow, sizeof(narrow), &written) ==
      CUBLAS_STATUS_SUCCESS)
    return narrow;
  return 0;
}

bool works_out_of_place(const cublasLtMatmulAlgo_t& algo) {
  int32_t value = 1;
  size_t written = 0;
  cublasLtMatmulAlgoCapGetAttribute(&algo, CUBLASLT_ALGO_CAP_OUT_OF_PLACE_RESULT_SUPPORT, &value,
                                    sizeof(value), &written);
  return value != 0;
}

}  // namespace

std::string GemmCandidate::text() const {
  return fmt::format("algo {} tile {} stages {} cluster {} swizzle {} split {}", id, tile, stages,
                     cluster, swizzle, split_k);
}

namespace {

GemmCandidate described(const cublasLtMatmulAlgo_t& algo) {
  GemmCandidate one;
  one.algo = algo;
  one.id = algorithm_config(algo, CUBLASLT_ALGO_CONFIG_ID);
  one.tile = algorithm_config(algo, CUBLASLT_ALGO_CONFIG_TILE_ID);
  one.stages = algorithm_config(algo, CUBLASLT_ALGO_CONFIG_STAGES_ID);
  one.cluster = algorithm_config(algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID);
  one.swizzle = algorithm_config(algo, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING);
  one.split_k = algorithm_config(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
  return one;
}

}  // namespace

Gemm::Gemm(cudaStream_t stream) : stream_(stream) {
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device));
  CUBLAS_CHECK(cublasLtCreate(&handle_));
  CUDA_CHECK(cudaMalloc(&workspace_, kWorkspaceBytes));
}

Gemm::~Gemm() {
  plans_.clear();
  cudaFree(workspace_);
  cublasLtDestroy(handle_);
}

std::unique_ptr<Gemm::Plan> Gemm::describe(const GemmCall& c) const {
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
  return plan;
}

// Algorithms that sum partial results of a split K in a fixed order and in fp32, best-ranked first:
// the in-place scheme depends on which CTA comes first, the output-type one would round to bf16.
// The heuristic does not know whether C is D, so that those which need it to be are left out here.
std::vector<GemmCandidate> Gemm::ask(const Plan& plan, const GemmCall& c, int count) const {
  const uint32_t alignment = common_alignment(c);
  cublasLtMatmulPreference_t preference = nullptr;
  CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
    return cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof(value));
  };
  const uint64_t workspace = kWorkspaceBytes;
  const uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  constexpr int kMost = 64;
  cublasLtMatmulHeuristicResult_t results[kMost];
  count = std::min(count, kMost);
  int found = 0;
  cublasStatus_t status = set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, scheme);
  for (const auto name :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    if (status == CUBLAS_STATUS_SUCCESS) status = set(name, alignment);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasLtMatmulAlgoGetHeuristic(handle_, plan.op, plan.a, plan.b, plan.d, plan.d,
                                            preference, count, results, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  std::vector<GemmCandidate> out;
  for (int i = 0; i < found && status == CUBLAS_STATUS_SUCCESS; ++i) {
    if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
    if (c.c && !works_out_of_place(results[i].algo)) continue;
    out.push_back(described(results[i].algo));
  }
  check(!out.empty(),
        "cuBLASLt has no algorithm for a ({} x {}) x ({} x {}) product of {} into {}, aligned to "
        "{} bytes: {}",
        c.m, c.k, c.k, c.n, name_of(c.in), name_of(c.out), alignment,
        cublasLtGetStatusString(status));
  return out;
}

std::vector<GemmCandidate> Gemm::candidates(const GemmCall& c, int count) {
  return ask(*describe(c), c, count);
}

int Gemm::choose(const GemmCall& c, std::vector<GemmCandidate>& all) const {
  return choose(*describe(c), c, all);
}

int Gemm::choose(const Plan& plan, const GemmCall& c, std::vector<GemmCandidate>& all) const {
  for (const GemmChoice& choice : gemm_choices(major_, c)) {
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i].tile == choice.tile && all[i].cluster == choice.cluster &&
          (choice.swizzle == kAnySwizzle ||
           (all[i].swizzle == choice.swizzle && all[i].split_k <= 1)))
        return int(i);
    if (choice.swizzle == kAnySwizzle) continue;
    if (const auto one = variant(plan, c, all[0], choice.tile, choice.cluster, choice.swizzle)) {
      all.push_back(*one);
      return int(all.size()) - 1;
    }
  }
  return 0;
}

std::optional<GemmCandidate> Gemm::variant(const Plan& plan, const GemmCall& c,
                                           const GemmCandidate& of, int tile, int cluster,
                                           int swizzle) const {
  cublasLtMatmulAlgo_t algo = of.algo;
  const auto set = [&](cublasLtMatmulAlgoConfigAttributes_t name, auto value) {
    return cublasLtMatmulAlgoConfigSetAttribute(&algo, name, &value, sizeof(value)) ==
           CUBLAS_STATUS_SUCCESS;
  };
  if (!set(CUBLASLT_ALGO_CONFIG_TILE_ID, uint32_t(tile)) ||
      !set(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, uint16_t(cluster)) ||
      !set(CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, uint32_t(swizzle)) ||
      !set(CUBLASLT_ALGO_CONFIG_SPLITK_NUM, int32_t(1)) ||
      !set(CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, uint32_t(CUBLASLT_REDUCTION_SCHEME_NONE)))
    return std::nullopt;
  // The heuristic was told the alignment, this check is not.
  for (const auto name :
       {CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_A_BYTES, CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_C_BYTES, CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_D_BYTES}) {
    uint32_t least = 1;
    size_t written = 0;
    if (cublasLtMatmulAlgoCapGetAttribute(&algo, name, &least, sizeof(least), &written) ==
            CUBLAS_STATUS_SUCCESS &&
        least > common_alignment(c))
      return std::nullopt;
  }
  cublasLtMatmulHeuristicResult_t result{};
  if (cublasLtMatmulAlgoCheck(handle_, plan.op, plan.a, plan.b, plan.d, plan.d, &algo, &result) !=
          CUBLAS_STATUS_SUCCESS ||
      result.state != CUBLAS_STATUS_SUCCESS || result.workspaceSize > kWorkspaceBytes ||
      (c.c && !works_out_of_place(algo)))
    return std::nullopt;
  return described(algo);
}

std::vector<GemmCandidate> Gemm::variants(const GemmCall& c, const GemmCandidate& of) const {
  const std::unique_ptr<Plan> plan = describe(c);
  std::vector<GemmCandidate> out;
  for (int tile = 1; tile < CUBLASLT_MATMUL_TILE_END; ++tile)
    for (int cluster :
         {CUBLASLT_CLUSTER_SHAPE_AUTO, CUBLASLT_CLUSTER_SHAPE_1x1x1, CUBLASLT_CLUSTER_SHAPE_2x1x1,
          CUBLASLT_CLUSTER_SHAPE_1x2x1, CUBLASLT_CLUSTER_SHAPE_2x2x1, CUBLASLT_CLUSTER_SHAPE_2x4x1})
      for (int swizzle : {0, 1})
        if (const auto one = variant(*plan, c, of, tile, cluster, swizzle)) out.push_back(*one);
  return out;
}

Gemm::Plan& Gemm::plan_for(const GemmCall& c) {
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
                c.c != nullptr,
                common_alignment(c)};
  const auto known = plans_.find(key);
  if (known != plans_.end()) return *known->second;

  std::unique_ptr<Plan> plan = describe(c);
  std::vector<GemmCandidate> all =
      ask(*plan, c, c.c || !gemm_choices(major_, c).empty() ? kAskedCandidates : 1);
  plan->algo = all[size_t(choose(*plan, c, all))].algo;
  return *plans_.emplace(key, std::move(plan)).first->second;
}

void Gemm::run(const GemmCall& c, Plan& plan, const cublasLtMatmulAlgo_t& algo) {
  if (c.bias) plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, c.bias);
  const float alpha = 1;
  CUBLAS_CHECK(cublasLtMatmul(handle_, plan.op, &alpha, c.a, plan.a, c.b, plan.b, &c.beta,
                              c.c ? c.c : c.d, plan.d, c.d, plan.d, &algo, workspace_,
                              kWorkspaceBytes, stream_));
}

void Gemm::run(const GemmCall& c) {
  if (c.m == 0 || c.n == 0) return;
  Plan& plan = plan_for(c);
  run(c, plan, plan.algo);
}

void Gemm::run(const GemmCall& c, const GemmCandidate& candidate) {
  run(c, plan_for(c), candidate.algo);
}

namespace {

// Enough loads are on their way, all CTAs run at once, and they are few: so are the partial rows.
constexpr int kColumnSumThreads = 512, kColumnSumWarps = kColumnSumThreads / 32;
constexpr int kColumnSumCtas = 2;  // an SM

// partial[blockIdx.y] (O) = column sums of rows blockIdx.y, + gridDim.y, ... of dy (N,O).
template <class T, int kVec>
__global__ __launch_bounds__(kColumnSumThreads,
                             kColumnSumCtas) void column_sum_kernel(float* partial, const T* dy,
                                                                    int64_t N, int64_t O) {
  __shared__ float sums[kColumnSumWarps][32][kVec + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col = (int64_t(blockIdx.x) * 32 + lane) * kVec;
  float total[kVec] = {};
  constexpr int kAhead = sizeof(T) == 2 ? 8 : 4;
  const int64_t step = int64_t(gridDim.y) * kColumnSumWarps;
  if (col < O)
#pragma unroll 1
    for (int64_t row = int64_t(blockIdx.y) * kColumnSumWarps + warp; row < N;
         row += kAhead * step) {
      Pack<T, kVec> packs[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (row + k * step < N) packs[k].load(dy + (row + k * step) * O + col);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (row + k * step >= N) break;
        float v[kVec];
        packs[k].unpack(v);
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
    for (int k = 0; k < kColumnSumWarps; ++k) t += sums[k][lane][i];
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
  GemmCall g = forward_call(act_dtype_, N, I, O);
  g.a = w.data, g.b = x.data, g.c = c.data, g.d = y.data, g.bias = b.data;
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
  if (dx) {
    GemmCall c = input_gradient_call(act_dtype_, N, dx.cols(), O);
    c.a = w.data, c.b = dy.data, c.d = dx.data;
    gemm_->run(c);
  }
  if (dw) {
    GemmCall c = weight_gradient_call(act_dtype_, N, x.cols(), O);
    c.a = x.data, c.b = dy.data, c.d = dw.to.data;
    c.beta = dw.fresh ? 0 : 1;
    gemm_->run(c);
  }
  if (db) {
    const int64_t rows = column_sum_rows(N, O);
    auto* partial = reinterpret_cast<float*>(scratch(size_t(rows * O) * sizeof(float)));
    add_column_sums(db, partial, rows, dy.data, N, O);
  }
}

// As many CTAs as the card holds, of at least 32 rows each: one more would run alone.
int64_t CudaOps::column_sum_rows(int64_t N, int64_t O) const {
  const int64_t a_block = 32 * (O % kWide == 0 ? kWide : 1);
  const int64_t column_blocks = (O + a_block - 1) / a_block;
  const int64_t places = int64_t(prop_.multiProcessorCount) * kColumnSumCtas;
  return std::clamp<int64_t>((N + 31) / 32, 1, std::max<int64_t>(1, places / column_blocks));
}

void CudaOps::add_column_sums(Grad out, float* partial, int64_t partial_rows, const void* dy,
                              int64_t N, int64_t O) {
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(O, {dy}, [&](auto width) {
      constexpr int kVec = width();
      const dim3 blocks(unsigned((O + 32 * kVec - 1) / (32 * kVec)), unsigned(partial_rows));
      column_sum_kernel<T, kVec>
          <<<blocks, kColumnSumThreads, 0, stream_>>>(partial, static_cast<const T*>(dy), N, O);
      CUDA_CHECK(cudaGetLastError());
    });
  });
  add_rows(out, partial, partial_rows, O);
}

}  // namespace hgrn
