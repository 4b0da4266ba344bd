// HGRU2 on the GPU: checks the tensors of a call and picks the kernels.
// Twin: kernels/cpu/hgru2.cpp   Test: tools/hgru2_check.cu
#include "cuda/hgru2.h"

#include <cstdlib>

#include "cuda/cuda_check.h"
#include "cuda/hgru2_kernels.h"
#include "cuda/launch.cuh"
#include "cuda/partial_rows.h"

namespace hgrn {
namespace {

using hgru2::Call;
using hgru2::Split;

// On a Hopper the kernels of hgru2_*_sm90.cu take over from the others, unless HGRN_HGRU2_SM90=0 in
// the environment says otherwise, to compare them or where they are in doubt.
bool hopper_kernels(int major) {
  const char* const set = std::getenv("HGRN_HGRU2_SM90");
  return hopper_code(major) && !(set && set[0] == '0');
}

class CudaHgru2 final : public SeqKernel {
 public:
  CudaHgru2(DType dtype, cudaStream_t stream) : dtype_(dtype), stream_(stream) {
    check(dtype == DType::bf16 || dtype == DType::f32,
          "the CUDA HGRU2 kernel computes in bf16 or f32, not {}; set train.precision",
          name_of(dtype));
    int device = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&sms_, cudaDevAttrMultiProcessorCount, device));
    CUDA_CHECK(
        cudaDeviceGetAttribute(&smem_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device));
    sm90_ = hopper_kernels(major_);
    if (!sm90_) return;
    void* flags = nullptr;
    CUDA_CHECK(cudaMalloc(&flags, size_t(sms_) * sizeof(uint32_t)));
    flags_.reset(static_cast<uint32_t*>(flags));
    CUDA_CHECK(cudaMemsetAsync(flags, 0, size_t(sms_) * sizeof(uint32_t), stream_));
  }

  int64_t packed_width(const SeqShape& s) const override { return 3 * s.D; }
  Shape state_shape(const SeqShape& s) const override { return {s.B, s.H(), s.n, s.n}; }

  std::vector<SavedSpec> saved(const SeqShape& s) const override {
    check_shape(s);
    const int64_t chunks = (s.T + 63) / 64;
    if (!tensor_cores(s))
      return {{"hgru2.states", {s.B, s.H(), chunks, s.n, s.n}, DType::f32},
              {"hgru2.dbound_partial", {1, s.B, s.D}, DType::f32},
              {"hgru2.boundaries", {1, 1, 1}, DType::f32}};
    const int64_t heads = s.B * s.H();
    const Split forward = split(s, true), backward = split(s, false);
    const int64_t slots = chain(s).slots;
    const int64_t most =
        std::max({int64_t(1), forward.boundaries(heads), backward.boundaries(heads), slots - 1});
    const int64_t parts = std::max(backward.segments, slots ? 2 : 1);
    return {{"hgru2.states", {s.B, s.H(), chunks, s.n, s.n}, DType::bf16},
            {"hgru2.dbound_partial", {parts, s.B, s.D}, DType::f32},
            {"hgru2.boundaries", {most, s.n + 1, s.n}, DType::f32}};
  }

  void forward(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor hT, const SeqInputs& in,
               std::span<const Tensor> saved) override {
    check_shape(s);
    check_tensor(y, dtype_, {s.N(), s.D}, "y");
    check_tensor(hT, DType::f32, state_shape(s), "hT");
    if (dtype_ == DType::bf16)
      run_forward<__nv_bfloat16>(s, o, y, hT, in, saved, tensor_cores(s));
    else
      run_forward<float>(s, o, y, hT, in, saved, false);
  }

  void backward(const SeqShape& s, const SeqOptions& o, const SeqGrads& out, Tensor dy, Tensor dhT,
                const SeqInputs& in, std::span<const Tensor> saved) override {
    check_shape(s);
    check_tensor(out.dx, dtype_, {s.N(), 3 * s.D}, "dx");
    check_tensor(dy, dtype_, {s.N(), s.D}, "dy");
    check_tensor(out.dbound, DType::f32, {s.D}, "dbound");
    check_tensor(out.dh0, DType::f32, state_shape(s), "dh0");
    check_tensor(dhT, DType::f32, state_shape(s), "dhT");
    check(bool(out.dx) && bool(dy), "hgru2 backward needs dx and dy");
    check(saved.size() == 3, "hgru2 backward needs what saved() lists, as forward left it");
    if (dtype_ == DType::bf16)
      run_backward<__nv_bfloat16>(s, o, out, dy, dhT, in, saved);
    else
      run_backward<float>(s, o, out, dy, dhT, in, saved);
  }

  void step(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor h,
            const SeqInputs& in) override {
    check_shape(s);
    check(s.T == 1, "hgru2 step takes one token a row, not {}", s.T);
    check(bool(h), "hgru2 step needs a state");
    check_tensor(y, dtype_, {s.N(), s.D}, "y");
    check_tensor(h, DType::f32, state_shape(s), "h");
    SeqInputs from = in;
    from.h0 = h;
    if (dtype_ == DType::bf16)
      run_step<__nv_bfloat16>(s, o, y, h, from);
    else
      run_step<float>(s, o, y, h, from);
  }

  std::vector<uint32_t> flags() const {
    std::vector<uint32_t> host(flags_ ? size_t(sms_) : 0);
    if (host.empty()) return host;
    CUDA_CHECK(cudaMemcpyAsync(host.data(), flags_.get(), host.size() * sizeof(uint32_t),
                               cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    return host;
  }

 private:
  // n = 128 needs the shared memory of sm_90; an sm_80 card runs it with the plain kernels.
  bool tensor_cores(const SeqShape& s) const {
    return dtype_ == DType::bf16 && (s.n == 64 || s.n == 128) &&
           hgru2::tensor_smem_bytes(int(s.n)) <= smem_limit_;
  }

  // Without memory for the boundaries (no saved tensors) every head is whole.
  Split split(const SeqShape& s, bool forward) const {
    // Forward: segments join the whole heads as the second CTA of an SM instead of waiting.
    const int ctas = forward ? 1 : hgru2::backward_ctas(int(s.n));
    return hgru2::plan_split(s.B * s.H(), s.T, int64_t(sms_) * ctas);
  }

  hgru2::Chain chain(const SeqShape& s) const {
    const int64_t heads = s.B * s.H();
    if (!sm90_ || s.n != 128 || !tensor_cores(s) || heads <= sms_) return {};
    const int64_t chunks = heads * ((s.T + 63) / 64), longest = (chunks + sms_ - 1) / sms_;
    return {int((chunks + longest - 1) / longest)};
  }

  static void check_shape(const SeqShape& s) {
    check(s.B > 0 && s.T > 0 && s.D > 0 && s.n > 0 && s.D % s.n == 0,
          "hgru2: B={} T={} D={} n={}: all must be positive and D a multiple of n "
          "(model.expand_ratio)",
          s.B, s.T, s.D, s.n);
    check(s.n <= 256, "hgru2: expand ratio n={} is above 256; set model.expand_ratio", s.n);
    check(s.T < (int64_t(1) << 30) && s.D < (int64_t(1) << 22) && s.B * s.H() < (int64_t(1) << 31),
          "hgru2: B={} T={} D={} is too large for one launch", s.B, s.T, s.D);
  }

  // An absent tensor passes.
  static void check_tensor(const Tensor& t, DType dtype, const Shape& shape, const char* name) {
    if (!t) return;
    check(t.dtype == dtype && t.numel() == shape.numel(), "hgru2: {} is {} {}, not {} {}", name,
          name_of(t.dtype), t.shape.str(), name_of(dtype), shape.str());
  }

  template <class E>
  Call<E> inputs(const SeqShape& s, const SeqOptions& o, const SeqInputs& in) const {
    check(bool(in.x), "hgru2 needs x");
    check_tensor(in.x, dtype_, {s.N(), 3 * s.D}, "x");
    check_tensor(in.bound, DType::f32, {s.D}, "bound");
    check_tensor(in.reset, DType::u8, {s.N()}, "reset");
    check_tensor(in.h0, DType::f32, state_shape(s), "h0");
    Call<E> c{};
    c.B = s.B, c.T = s.T, c.D = s.D, c.H = s.H(), c.n = int(s.n);
    c.output_act = o.output_act, c.input_act = o.input_act, c.query_scale = o.query_scale;
    c.x = static_cast<const E*>(in.x.data);
    c.bound = static_cast<const float*>(in.bound.data);
    c.reset = static_cast<const uint8_t*>(in.reset.data);
    c.split = {int(s.B * s.H()), 1, int((s.T + 63) / 64)};
    c.sm90 = sm90_ && hgru2::takes_gates_sm90(o);
    c.h0 = static_cast<const float*>(in.h0.data);
    return c;
  }

  void check_saved(const SeqShape& s, std::span<const Tensor> tensors) const {
    const std::vector<SavedSpec> specs = saved(s);
    check(tensors.size() == specs.size(), "hgru2 got {} saved tensors, not the {} of saved()",
          tensors.size(), specs.size());
    for (size_t i = 0; i < specs.size(); ++i)
      check_tensor(tensors[i], specs[i].dtype, specs[i].shape, specs[i].name.c_str());
  }

  template <class E>
  void lay_out(Call<E>& c, const SeqShape& s, bool forward) const {
    if (c.sm90) c.chain = chain(s), c.flags = flags_.get();
    if (!c.chain.slots) c.split = split(s, forward);
  }

  template <class E>
  void run_forward(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor hT, const SeqInputs& in,
                   std::span<const Tensor> saved, bool tensor) const {
    check(bool(y), "hgru2 forward needs y");
    Call<E> c = inputs<E>(s, o, in);
    c.y = static_cast<E*>(y.data);
    c.hT = static_cast<float*>(hT.data);
    if (!saved.empty()) {
      check_saved(s, saved);
      c.states = saved[0].data;
      c.boundaries = static_cast<float*>(saved[2].data);
      // A segment must not overwrite the state that another one still starts from.
      if (tensor && (!c.hT || c.hT != c.h0)) lay_out(c, s, true);
    }
    if constexpr (sizeof(E) == 2)
      if (tensor) return hgru2::forward_tensor(c, stream_);
    hgru2::forward_plain(c, stream_);
  }

  template <class E>
  void run_step(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor h,
                const SeqInputs& in) const {
    check(bool(y), "hgru2 step needs y");
    Call<E> c = inputs<E>(s, o, in);
    c.y = static_cast<E*>(y.data);
    c.hT = static_cast<float*>(h.data);
    if (hgru2::step_token(c, may_start_early(stream_, major_), stream_)) return;
    // Every thread of the plain kernel reads and writes its own part of the state alone.
    hgru2::forward_plain(c, stream_);
  }

  template <class E>
  void run_backward(const SeqShape& s, const SeqOptions& o, const SeqGrads& out, Tensor dy,
                    Tensor dhT, const SeqInputs& in, std::span<const Tensor> saved) const {
    check_saved(s, saved);
    Call<E> c = inputs<E>(s, o, in);
    c.states = saved[0].data;
    c.boundaries = static_cast<float*>(saved[2].data);
    if (tensor_cores(s) && (!out.dh0 || out.dh0.data != dhT.data)) lay_out(c, s, false);
    c.dy = static_cast<const E*>(dy.data);
    c.dhT = static_cast<const float*>(dhT.data);
    c.dx = static_cast<E*>(out.dx.data);
    c.dh0 = static_cast<float*>(out.dh0.data);
    if (out.dbound) c.dbound_partial = static_cast<float*>(saved[1].data);
    bool done = false;
    if constexpr (sizeof(E) == 2)
      if (tensor_cores(s)) hgru2::backward_tensor(c, stream_), done = true;
    if (!done) hgru2::backward_plain(c, stream_);
    if (out.dbound)
      add_partial_rows(static_cast<float*>(out.dbound.data), c.dbound_partial, c.parts() * s.B, s.D,
                       /*fresh=*/false, hopper_code(major_), stream_);
  }

  DType dtype_;
  int sms_ = 0, smem_limit_ = 0, major_ = 0;
  bool sm90_ = false;
  struct Free {
    void operator()(void* p) const { cudaFree(p); }
  };
  std::unique_ptr<uint32_t, Free> flags_;  // (SMs), of the launches, which follow each other
  cudaStream_t stream_;
};

}  // namespace

std::unique_ptr<SeqKernel> make_cuda_hgru2(DType act_dtype, cudaStream_t stream) {
  return std::make_unique<CudaHgru2>(act_dtype, stream);
}

std::vector<uint32_t> cuda_hgru2_flags(const SeqKernel& kernel) {
  return dynamic_cast<const CudaHgru2&>(kernel).flags();
}

}  // namespace hgrn
