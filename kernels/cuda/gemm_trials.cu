// How fast cuBLASLt's candidates do a product of linear layers: what the heuristic's first choice
// loses against the best, for `hgrn-bench gemm` and gemm_choices.cpp.
// Test: tests/ops/test_linear.cpp
#include <algorithm>
#include <set>
#include <string>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

// Values in [-1, 1) from a hash: products of zeros would draw less power and run faster.
template <class T>
__global__ __launch_bounds__(256) void fill_kernel(T* x, int64_t n, uint64_t seed) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i < n) x[i] = T(float(mix64(seed + uint64_t(i)) >> 40) * 0x1p-23f - 1.0f);
}

class TrialMemory {
 public:
  explicit TrialMemory(CudaOps& ops) : ops_(ops) {}
  ~TrialMemory() {
    for (void* p : blocks_) ops_.free(p);
  }
  TrialMemory(const TrialMemory&) = delete;
  TrialMemory& operator=(const TrialMemory&) = delete;
  Tensor take(Shape shape, DType dtype) {
    Tensor t(nullptr, dtype, shape);
    t.data = ops_.alloc(t.bytes(), "a measurement");
    blocks_.push_back(t.data);
    const unsigned blocks = unsigned((t.numel() + 255) / 256);
    dispatch(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      fill_kernel<T>
          <<<blocks, 256, 0, ops_.stream()>>>(t.ptr<T>(), t.numel(), blocks_.size() << 40);
      CUDA_CHECK(cudaGetLastError());
    });
    return t;
  }

 private:
  CudaOps& ops_;
  std::vector<void*> blocks_;
};

}  // namespace

std::vector<ProductTrial> CudaOps::time_product(const Product& p, const ProductTrials& what) {
  constexpr int64_t kFlushBytes = int64_t(256) << 20;  // more than any cache
  constexpr double kNearFastest = 1.15;
  TrialMemory memory(*this);
  GemmCall c;
  switch (p.kind) {
    case Product::Kind::forward:
      c = forward_call(act_dtype_, p.N, p.I, p.O);
      c.a = memory.take({p.O, p.I}, act_dtype_).data,
      c.b = memory.take({p.N, p.I}, act_dtype_).data;
      if (p.add) c.c = memory.take({p.N, p.O}, act_dtype_).data;
      break;
    case Product::Kind::input_gradient:
      c = input_gradient_call(act_dtype_, p.N, p.I, p.O);
      c.a = memory.take({p.O, p.I}, act_dtype_).data,
      c.b = memory.take({p.N, p.O}, act_dtype_).data;
      break;
    case Product::Kind::weight_gradient:
      c = weight_gradient_call(act_dtype_, p.N, p.I, p.O);
      c.a = memory.take({p.N, p.I}, act_dtype_).data,
      c.b = memory.take({p.N, p.O}, act_dtype_).data;
      break;
  }
  c.d = memory.take({c.n, c.m}, c.out).data;
  c.beta = p.add ? 1 : 0;
  const Tensor flush = memory.take({kFlushBytes / 4}, DType::f32);

  std::vector<GemmCandidate> all = gemm_->candidates(c, what.candidates);
  const int chosen = gemm_->choose(c, all);
  if (what.every) {  // the clock does not matter much here, nor what caches hold
    std::vector<std::pair<double, GemmCandidate>> others;
    std::set<std::string> known;
    for (const GemmCandidate& ranked : all) known.insert(ranked.text());
    for (const GemmCandidate& one : gemm_->variants(c, all[0])) {
      if (!known.insert(one.text()).second) continue;
      double us = 0;
      for (int r = 0; r < 2; ++r) {  // the first loads the kernel
        const int64_t from = mark();
        gemm_->run(c, one);
        const int64_t to = mark();
        synchronize();
        us = 1e3 * elapsed_ms(from, to);
        forget_marks();
      }
      others.emplace_back(us, one);
    }
    std::sort(others.begin(), others.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    for (size_t i = 0; i < others.size() && i < size_t(what.candidates); ++i)
      all.push_back(others[i].second);
  }
  std::vector<ProductTrial> out;
  for (size_t i = 0; i < all.size(); ++i) {
    forget_marks();
    gemm_->run(c, all[i]);  // loads the kernel
    std::vector<std::pair<int64_t, int64_t>> spans;
    for (int r = 0; r < what.runs; ++r) {
      zero(flush);
      const int64_t from = mark();
      gemm_->run(c, all[i]);
      spans.emplace_back(from, mark());
    }
    synchronize();
    std::vector<double> us;
    for (const auto& [from, to] : spans) us.push_back(1e3 * elapsed_ms(from, to));
    std::sort(us.begin(), us.end());
    out.push_back({all[i].text(), us[us.size() / 2], int(i) == chosen});
  }
  forget_marks();
  if (what.sustain_ms <= 0) return out;

  const double fastest =
      std::min_element(out.begin(), out.end(), [](auto& a, auto& b) { return a.us < b.us; })->us;
  std::vector<size_t> kept;
  for (size_t i = 0; i < out.size(); ++i)
    if (out[i].us <= kNearFastest * fastest || out[i].chosen) kept.push_back(i);
  // Without a pause, so that the clock is what the power allows; there and back, since the card
  // warms up meanwhile. The first half of a turn lets the clock settle.
  std::vector<double> sums(kept.size());
  for (int turn = 0; turn < 2; ++turn) {
    for (size_t j = 0; j < kept.size(); ++j) {
      const size_t k = turn ? kept.size() - 1 - j : j;
      const ProductTrial& t = out[kept[k]];
      const int calls = std::max(1, int(1e3 * what.sustain_ms / 4 / t.us));
      for (int r = 0; r < calls; ++r) gemm_->run(c, all[kept[k]]);
      const int64_t from = mark();
      for (int r = 0; r < calls; ++r) gemm_->run(c, all[kept[k]]);
      const int64_t to = mark();
      synchronize();
      sums[k] += 1e3 * elapsed_ms(from, to) / calls;
      forget_marks();
    }
  }
  std::vector<ProductTrial> sustained;
  for (size_t k = 0; k < kept.size(); ++k)
    sustained.push_back({out[kept[k]].algorithm, sums[k] / 2, out[kept[k]].chosen});
  return sustained;
}

}  // namespace hgrn
