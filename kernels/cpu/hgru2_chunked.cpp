// HGRU2 in chunks, fp32: checks a call, shares its heads out to the threads and picks the build of
// hgru2_chunks.cpp (which has the maths) for the processor. Heads narrower than 16 channels and
// single tokens go to the plain kernel.
// Test: tests/ops/test_hgru2.cpp
#include "cpu/hgru2_chunks.h"

#include <algorithm>

#include "cpu/flush_denormals.h"
#include "cpu/hgru2.h"

namespace hgrn::cpu {
namespace {

// The part of a tensor from its float `offset` on; null where the tensor is absent.
float* part(Tensor t, int64_t offset) {
  return t ? t.ptr<float>() + offset : nullptr;
}

class ChunkedHgru2 final : public SeqKernel {
 public:
  ChunkedHgru2() : plain_(make_hgru2_plain(DType::f32)), chunks_(HGRN_BEST_ISA(hgru2_chunks)) {}

  int64_t packed_width(const SeqShape& s) const override { return plain_->packed_width(s); }
  Shape state_shape(const SeqShape& s) const override { return plain_->state_shape(s); }
  std::vector<SavedSpec> saved(const SeqShape& s) const override {
    if (is_small(s)) return plain_->saved(s);
    return {{"states", {s.B, blocks(s), s.H(), s.n, s.n}, DType::f32}};
  }

  void forward(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor hT, const SeqInputs& in,
               std::span<const Tensor> saved) override {
    if (is_small(s)) return plain_->forward(s, o, y, hT, in, saved);
    check_hgru2("hgru2 forward", DType::f32, s, y, hT, in);
    const float* bounds = bounds_or_zeros<float>(in.bound, zeros_, s.D);
    for_heads(s, chunks_.forward_floats(s.n), [&](int64_t task, float* work) {
      Hgru2Head h = head(s, o, in, bounds, saved.empty() ? Tensor() : saved[0], task);
      h.y = part(y, offset(s, task));
      h.hT = part(hT, task * s.n * s.n);
      h.h0 = part(in.h0, task * s.n * s.n);
      chunks_.forward(h, work);
    });
  }

  void backward(const SeqShape& s, const SeqOptions& o, const SeqGrads& out, Tensor dy, Tensor dhT,
                const SeqInputs& in, std::span<const Tensor> saved) override {
    if (is_small(s)) return plain_->backward(s, o, out, dy, dhT, in, saved);
    check_hgru2("hgru2 backward", DType::f32, s, dy, dhT, in);
    check(saved.size() == 1 && out.dx.numel() == in.x.numel(),
          "hgru2 backward: needs the saved states of its forward and a dx like x");
    const float* bounds = bounds_or_zeros<float>(in.bound, zeros_, s.D);
    double* dbound = dbound_.get<double>(size_t(s.B * s.D));
    std::fill_n(dbound, s.B * s.D, 0.0);
    for_heads(s, chunks_.backward_floats(s.n), [&](int64_t task, float* work) {
      Hgru2Head h = head(s, o, in, bounds, saved[0], task);
      h.dy = part(dy, offset(s, task));
      h.dhT = part(dhT, task * s.n * s.n);
      h.dx = part(out.dx, offset(s, task, 3));
      h.dh0 = part(out.dh0, task * s.n * s.n);
      h.dbound = dbound + task * s.n;  // (B,D) is (B,H,n)
      chunks_.backward(h, work);
    });
    if (out.dbound) add_bound_gradient(out.dbound.ptr<float>(), dbound, s.B, s.D);
  }

  void step(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor h,
            const SeqInputs& in) override {
    plain_->step(s, o, y, h, in);
  }

 private:
  static bool is_small(const SeqShape& s) { return s.T == 1 || s.n < 16; }
  static int64_t blocks(const SeqShape& s) { return (s.T + kHgru2Block - 1) / kHgru2Block; }

  // Where the head of a task begins in a tensor (N, parts * D).
  static int64_t offset(const SeqShape& s, int64_t task, int64_t parts = 1) {
    return task / s.H() * s.T * parts * s.D + task % s.H() * s.n;
  }

  static Hgru2Head head(const SeqShape& s, const SeqOptions& o, const SeqInputs& in,
                        const float* bounds, Tensor saved, int64_t task) {
    const int64_t b = task / s.H(), i = task % s.H(), nn = s.n * s.n;
    Hgru2Head h{};
    h.T = s.T, h.D = s.D, h.n = s.n;
    h.output_act = o.output_act, h.input_act = o.input_act;
    h.query_scale = o.query_scale;
    h.x = part(in.x, offset(s, task, 3));
    h.bound = bounds + i * s.n;
    h.reset = in.reset ? in.reset.ptr<uint8_t>() + b * s.T : nullptr;
    h.saved = part(saved, (b * blocks(s) * s.H() + i) * nn);
    h.saved_step = s.H() * nn;
    return h;
  }

  // f(task, work) for the heads of all rows, each thread with a workspace of its own.
  template <class F>
  void for_heads(const SeqShape& s, int64_t floats, const F& f) {
    const int64_t each = (floats + 15) / 16 * 16;
    float* work = scratch_.get<float>(size_t(each * max_threads()));
    parallel_for(s.B * s.H(), s.N() * s.D * s.n, [&](int64_t task) {
      const FlushDenormals flush;
      f(task, work + each * thread_index());
    });
  }

  std::unique_ptr<SeqKernel> plain_;
  const Hgru2Chunks chunks_;
  Scratch scratch_, dbound_, zeros_;
};

}  // namespace

std::unique_ptr<SeqKernel> make_hgru2_chunked() {
  return std::make_unique<ChunkedHgru2>();
}

}  // namespace hgrn::cpu
