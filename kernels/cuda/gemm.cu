// Linear layers: y (N,O) = x (N,I) w (O,I)^T + b, and its gradients.
// A row-major (R,C) matrix is a column-major (C,R) one, so that with column-major eyes
//   y' (O,N) = w'^T x'     dx' (I,N) = w' dy'     dw' (I,O) += x' dy'^T
// Products are summed in fp32. dw leaves the product in fp32 with beta = 1: no rounding to bf16
// between micro-batches. db is a column sum in two fixed stages.
// Twin: kernels/cpu/gemm.cpp   Test: tests/ops/test_linear.cpp
#include "cuda/gemm.h"

#include <algorithm>
#include <initializer_list>

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
                         reinterpret_cast<uintptr_t>(c.d) | reinterpret_cast<uintptr_t>(c.bias) |
                         256;
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
  CUBLAS_CHECK(cublasLtMatmul(handle_, plan.op, &alpha, c.a, plan.a, c.b, plan.b, &c.beta, c.d,
                              plan.d, c.d, plan.d, &plan.algo, workspace_, kWorkspaceBytes,
                              stream_));
}

namespace {

// partial[blockIdx.y] (O) = column sums of rows blockIdx.y, + gridDim.y, ... of dy (N,O), whose
// rows lie ld apart.
template <class T, int kVec>
__global__ __launch_bounds__(256) void column_sum_kernel(float* partial, const T* dy, int64_t N,
                                                         int64_t O, int64_t ld) {
  __shared__ float sums[8][32][kVec + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col = (int64_t(blockIdx.x) * 32 + lane) * kVec;
  float total[kVec] = {};
  if (col < O) {
#pragma unroll 4
    for (int64_t row = int64_t(blockIdx.y) * 8 + warp; row < N; row += int64_t(gridDim.y) * 8) {
      float v[kVec];
      load<kVec>(v, dy + row * ld + col);
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

// dst (all_rows, ld) = src (rows, cols), zeros in the added columns and rows. ld % kWide == 0.
template <class T>
__global__ __launch_bounds__(256) void widen_rows_kernel(T* dst, const T* src, int64_t rows,
                                                         int64_t cols, int64_t all_rows,
                                                         int64_t ld) {
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWide;
  if (col >= ld) return;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < all_rows;
       row += int64_t(gridDim.y) * blockDim.y) {
    float v[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      float one[1] = {0};
      if (row < rows && col + i < cols) load<1>(one, src + row * cols + col + i);
      v[i] = one[0];
    }
    store<kWide>(dst + row * ld + col, v);
  }
}

// dst (rows, cols) = (or, kAdd, +=) the first cols columns of src (rows, ld). A thread takes kWide
// elements of dst, which is dense and so may be written 16 bytes at a time across its rows' ends.
template <class T, bool kAdd>
__global__ __launch_bounds__(256) void narrow_rows_kernel(T* dst, const T* src, int64_t rows,
                                                          int64_t cols, int64_t ld) {
  const int64_t at = (int64_t(blockIdx.x) * 256 + threadIdx.x) * kWide, n = rows * cols;
  if (at >= n) return;
  int64_t row = at / cols, col = at - row * cols;
  float v[kWide];
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    float one[1] = {0};
    if (at + i < n) load<1>(one, src + row * ld + col);
    v[i] = one[0];
    if (++col == cols) ++row, col = 0;
  }
  if (at + kWide <= n) {
    float before[kWide];
    if constexpr (kAdd) {
      load<kWide>(before, dst + at);
#pragma unroll
      for (int i = 0; i < kWide; ++i) v[i] += before[i];
    }
    store<kWide>(dst + at, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    float one[1] = {v[i]}, before[1];
    if (at + i >= n) continue;
    if constexpr (kAdd) load<1>(before, dst + at + i), one[0] += before[0];
    store<1>(dst + at + i, one);
  }
}

// cuBLASLt's tensor-core kernels need every extent along a row to be a multiple of 16 bytes; for
// others (a GLU of 1365) it falls back on kernels of a sixth of the speed. Large products therefore
// work on copies with such extents rounded up and zeros in what is added.
class WideRows {
 public:
  // A plain view while `on` is false or the width is already even. all_extents: the number of rows
  // is another operand's width, and is rounded up too.
  WideRows(Tensor t, bool on, bool all_extents = false) : t(t), ld(t.cols()), rows(t.rows()) {
    if (!t || !on) return;
    ld = round_up(ld);
    if (all_extents) rows = round_up(rows);
  }
  static int64_t round_up(int64_t n) { return (n + kWide - 1) / kWide * kWide; }
  bool copied() const { return t && (ld != t.cols() || rows != t.rows()); }
  size_t bytes() const {
    return copied() ? (size_t(rows * ld) * size_of(t.dtype) + 255) / 256 * 256 : 0;
  }
  void* data() const { return copied() ? copy : t.data; }
  void place(char*& at) { copy = at, at += bytes(); }

  void fill(cudaStream_t stream) const {
    if (!copied()) return;
    dispatch(t.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const int64_t vectors = ld / kWide, x = std::min<int64_t>(256, (vectors + 31) / 32 * 32);
      const dim3 threads(unsigned(x), unsigned(256 / x));
      const dim3 blocks(unsigned((vectors + x - 1) / x),
                        unsigned(std::min<int64_t>((rows + threads.y - 1) / threads.y, 65535)));
      widen_rows_kernel<T><<<blocks, threads, 0, stream>>>(reinterpret_cast<T*>(copy), t.ptr<T>(),
                                                           t.rows(), t.cols(), rows, ld);
      CUDA_CHECK(cudaGetLastError());
    });
  }
  template <bool kAdd>
  void give_back(cudaStream_t stream) const {
    if (!copied()) return;
    dispatch(t.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const int64_t vectors = (t.numel() + kWide - 1) / kWide;
      narrow_rows_kernel<T, kAdd><<<unsigned((vectors + 255) / 256), 256, 0, stream>>>(
          t.ptr<T>(), reinterpret_cast<const T*>(copy), t.rows(), t.cols(), ld);
      CUDA_CHECK(cudaGetLastError());
    });
  }

  Tensor t;
  int64_t ld, rows;
  char* copy = nullptr;
};

// Copies pay where the product is much longer than they are, and need 16-byte aligned tensors.
bool copies_pay(int64_t N, int64_t I, int64_t O, std::initializer_list<Tensor> tensors) {
  bool aligned = true;
  for (const Tensor& t : tensors)
    aligned = aligned && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  return aligned && double(N) * double(I) * double(O) > 1e8;
}

}  // namespace

void CudaOps::linear_forward(Tensor y, Tensor x, Tensor w, Tensor b) {
  const int64_t N = x.rows(), I = x.cols(), O = w.rows();
  check(w.cols() == I && y.rows() == N && y.cols() == O && (!b || b.numel() == O),
        "linear_forward: y {}, x {}, w {}, b {}", y.shape.str(), x.shape.str(), w.shape.str(),
        b.shape.str());
  check(x.dtype == act_dtype_ && w.dtype == act_dtype_ && y.dtype == act_dtype_ &&
            (!b || b.dtype == act_dtype_),
        "linear_forward: tensors must be {}", name_of(act_dtype_));
  if (few_rows(N, I)) return gemv(y, x, nullptr, nullptr, w, b);
  const bool wide = copies_pay(N, I, O, {x, w, y});
  WideRows wx(x, wide), ww(w, wide, true), wy(y, wide);
  WideRows wb(b ? b.view({1, O}) : b, wide);
  char* at = scratch(wx.bytes() + ww.bytes() + wy.bytes() + wb.bytes());
  wx.place(at), ww.place(at), wy.place(at), wb.place(at);
  wx.fill(stream_), ww.fill(stream_), wb.fill(stream_);
  GemmCall c;
  c.m = wy.ld, c.n = N, c.k = wx.ld;
  c.transpose_a = true;
  c.in = c.out = act_dtype_;
  c.a = ww.data(), c.b = wx.data(), c.d = wy.data(), c.bias = wb.data();
  c.lda = ww.ld, c.ldb = wx.ld, c.ldd = wy.ld;
  gemm_->run(c);
  wy.give_back<false>(stream_);
}

void CudaOps::linear_backward(Tensor dx, Tensor dw, Tensor db, Tensor dy, Tensor x, Tensor w) {
  const int64_t N = dy.rows(), O = dy.cols();
  check(!dx || (w && w.rows() == O && w.cols() == dx.cols() && dx.rows() == N),
        "linear_backward: dx {}, dy {}, w {}", dx.shape.str(), dy.shape.str(), w.shape.str());
  check(!dw || (x && x.rows() == N && dw.rows() == O && dw.cols() == x.cols()),
        "linear_backward: dw {}, dy {}, x {}", dw.shape.str(), dy.shape.str(), x.shape.str());
  check(!db || db.numel() == O, "linear_backward: db {}, dy {}", db.shape.str(), dy.shape.str());
  check(dy.dtype == act_dtype_ && (!dx || (dx.dtype == act_dtype_ && w.dtype == act_dtype_)) &&
            (!dw || (x.dtype == act_dtype_ && dw.dtype == DType::f32)),
        "linear_backward: dx, dy, x and w must be {}, dw f32", name_of(act_dtype_));
  if (N == 0 || O == 0) return;
  if (!dx) w = Tensor();
  if (!dw) x = Tensor();
  const int64_t I = dx ? dx.cols() : dw ? dw.cols() : 0;
  const bool wide = copies_pay(N, I, O, {dx, dw, dy, x, w});
  WideRows wdx(dx, wide), wdw(dw, wide, true), wdy(dy, wide), wx(x, wide), ww(w, wide, true);
  const int64_t partial_rows = db ? column_sum_rows(N, O, wdy.ld) : 0;
  const size_t partial_bytes = size_t(partial_rows * O) * sizeof(float);
  char* at =
      scratch(wdx.bytes() + wdw.bytes() + wdy.bytes() + wx.bytes() + ww.bytes() + partial_bytes);
  wdx.place(at), wdw.place(at), wdy.place(at), wx.place(at), ww.place(at);
  wdy.fill(stream_), wx.fill(stream_), ww.fill(stream_);
  GemmCall c;
  c.in = act_dtype_;
  if (dx) {
    c.m = wdx.ld, c.n = N, c.k = wdy.ld;
    c.out = act_dtype_;
    c.a = ww.data(), c.b = wdy.data(), c.d = wdx.data();
    c.lda = ww.ld, c.ldb = wdy.ld, c.ldd = wdx.ld;
    gemm_->run(c);
    wdx.give_back<false>(stream_);
  }
  if (dw) {
    c.m = wdw.ld, c.n = wdw.rows, c.k = N;
    c.transpose_b = true;
    c.out = DType::f32;
    c.a = wx.data(), c.b = wdy.data(), c.d = wdw.data();
    c.lda = wx.ld, c.ldb = wdy.ld, c.ldd = wdw.ld;
    c.beta = wdw.copied() ? 0.0f : 1.0f;
    gemm_->run(c);
    wdw.give_back<true>(stream_);
  }
  if (db)
    add_column_sums(db.ptr<float>(), reinterpret_cast<float*>(at), partial_rows, wdy.data(), N, O,
                    wdy.ld);
}

// Enough CTAs to fill the card, of at least 32 rows each.
int64_t CudaOps::column_sum_rows(int64_t N, int64_t O, int64_t ld) const {
  const int64_t a_block = 32 * (ld % kWide == 0 ? kWide : 1);
  const int64_t column_blocks = (O + a_block - 1) / a_block;
  const int64_t wanted = int64_t(prop_.multiProcessorCount) * 8 / column_blocks + 1;
  return std::clamp<int64_t>((N + 31) / 32, 1, wanted);
}

void CudaOps::add_column_sums(float* out, float* partial, int64_t partial_rows, const void* dy,
                              int64_t N, int64_t O, int64_t ld) {
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(ld, {dy}, [&](auto width) {
      constexpr int kVec = width();
      const dim3 blocks(unsigned((O + 32 * kVec - 1) / (32 * kVec)), unsigned(partial_rows));
      column_sum_kernel<T, kVec>
          <<<blocks, 256, 0, stream_>>>(partial, static_cast<const T*>(dy), N, O, ld);
      CUDA_CHECK(cudaGetLastError());
    });
  });
  add_partial_rows(out, partial, partial_rows, O);
}

}  // namespace hgrn
