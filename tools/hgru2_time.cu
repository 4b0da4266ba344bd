// The times of hgru2_check: medians of launches, the inputs rotated past the L2 cache.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/rng.h"
#include "cuda/hgru2.h"
#include "hgru2_buffer.h"
#include "hgru2_time.h"

namespace hgrn::hgru2_times {
namespace {

using hgru2_cases::Buffer;

// ---- timing
__global__ void fill_kernel(__nv_bfloat16* p, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    const uint64_t a = mix64(seed + i);
    float sum = -2.0f;  // four uniforms: near enough to N(0, 1/3), scaled to N(0, 1)
    for (int j = 0; j < 4; ++j) sum += float((a >> (16 * j)) & 0xffff) / 65536.0f;
    p[i] = __float2bfloat16(sum * 1.732f);
  }
}

template <class F>
double median_us(F&& launch, int repeats = 33) {
  std::vector<float> times;
  cudaEvent_t start, stop;
  CUDA_CHECK(cudaEventCreate(&start));
  CUDA_CHECK(cudaEventCreate(&stop));
  for (int i = 0; i < repeats; ++i) {
    CUDA_CHECK(cudaEventRecord(start));
    launch(i);
    CUDA_CHECK(cudaEventRecord(stop));
    CUDA_CHECK(cudaEventSynchronize(stop));
    float ms;
    CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 3 || repeats == 1) times.push_back(ms * 1000);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

constexpr double kRoofline = 3.0e12;  // bytes/s, a device-to-device copy on an H100

constexpr SeqOptions kGatedValues{Act::sigmoid, Act::silu, 1.0f};  // of the 44M model

void time_shape(int64_t B, int64_t T, int64_t H, int64_t n, int repeats = 33,
                const SeqOptions& o = {}) {
  const SeqShape s{B, T, H * n, n};
  const auto kernel = make_cuda_hgru2(DType::bf16, nullptr);
  constexpr int kSets = 2;  // each larger than the L2 cache
  std::vector<std::unique_ptr<Buffer>> all;
  const auto make = [&](DType type, Shape shape, bool fill) {
    all.push_back(std::make_unique<Buffer>(type, shape));
    const Tensor t = all.back()->t;
    if (fill)
      fill_kernel<<<1024, 256>>>(static_cast<__nv_bfloat16*>(t.data), t.numel(), all.size() << 40);
    return t;
  };
  SeqInputs in[kSets];
  SeqGrads out[kSets];
  Tensor y[kSets], dy[kSets];
  std::vector<Tensor> saved[kSets];
  double saved_bytes = 0;
  for (int i = 0; i < kSets; ++i) {
    in[i].x = make(DType::bf16, {s.N(), 3 * s.D}, true);
    in[i].bound = make(DType::f32, {s.D}, false);
    CUDA_CHECK(cudaMemset(in[i].bound.data, 0, in[i].bound.bytes()));
    out[i].dx = make(DType::bf16, {s.N(), 3 * s.D}, false);
    out[i].dbound = make(DType::f32, {s.D}, false);
    y[i] = make(DType::bf16, {s.N(), s.D}, false);
    dy[i] = make(DType::bf16, {s.N(), s.D}, true);
    for (const SavedSpec& spec : kernel->saved(s))
      saved[i].push_back(make(spec.dtype, spec.shape, false));
    saved_bytes = double(saved[i][0].bytes());
  }
  const auto forward = [&](int i) {
    kernel->forward(s, o, y[i % kSets], Tensor(), in[i % kSets], saved[i % kSets]);
  };
  const auto backward = [&](int i) {
    kernel->backward(s, o, out[i % kSets], dy[i % kSets], Tensor(), in[i % kSets],
                     saved[i % kSets]);
  };
  const double tile = double(s.N()) * s.D * 2;
  const double us[3] = {median_us(forward, repeats), median_us(backward, repeats),
                        median_us(
                            [&](int i) {
                              forward(i);
                              backward(i);
                            },
                            repeats)};
  const double bytes[3] = {4 * tile + saved_bytes, 7 * tile + saved_bytes,
                           11 * tile + 2 * saved_bytes};
  const char* names[3] = {"forward", "backward", "both"};
  for (int i = 0; i < 3; ++i)
    std::printf(
        "hgru2 %-8s | B=%d T=%d H=%d n=%d%s | %8.1f us | %6.0f GB/s | %3.0f %% of 3.0 TB/s\n",
        names[i], int(B), int(T), int(H), int(n), o.input_act == Act::silu ? " silu_i" : "", us[i],
        bytes[i] / us[i] / 1e3, 100 * bytes[i] / (us[i] * 1e-6) / kRoofline);
}

void time_step(int64_t B, int64_t H, int64_t n) {
  const SeqShape s{B, 1, H * n, n};
  const auto kernel = make_cuda_hgru2(DType::bf16, nullptr);
  Buffer x(DType::bf16, {s.N(), 3 * s.D}), y(DType::bf16, {s.N(), s.D});
  Buffer h(DType::f32, kernel->state_shape(s));
  CUDA_CHECK(cudaMemset(h.t.data, 0, h.t.bytes()));
  fill_kernel<<<64, 256>>>(static_cast<__nv_bfloat16*>(x.t.data), x.t.numel(), 7);
  SeqInputs in;
  in.x = x.t;
  const double us = median_us([&](int) { kernel->step(s, SeqOptions(), y.t, h.t, in); });
  std::printf("hgru2 step     | B=%d H=%d n=%d | %8.1f us | %6.0f GB/s\n", int(B), int(H), int(n),
              us, 2.0 * h.t.bytes() / us / 1e3);
}

}  // namespace

void compare() {
  const auto choose = [](const char* kernels) {
    std::printf("HGRN_HGRU2_SM90=%s\n", kernels);
    setenv("HGRN_HGRU2_SM90", kernels, 1);
  };
  for (const char* kernels : {"0", "1", "0", "1"}) {
    choose(kernels);
    time_shape(10, 2048, 16, 128);
    time_shape(26, 2048, 6, 128);
    time_shape(15, 2048, 8, 128);
    time_shape(2, 2048, 8, 128);
    time_shape(128, 512, 4, 128, 33, kGatedValues);
    std::fflush(stdout);
  }
}

void profile() {
  time_shape(15, 1024, 8, 128, 1);
}

void time() {
  time_shape(10, 2048, 16, 128);
  time_shape(26, 2048, 6, 128);
  time_shape(15, 2048, 8, 128);
  time_shape(2, 2048, 8, 128);
  // What gates on the values cost.
  time_shape(128, 512, 4, 128);
  time_shape(128, 512, 4, 128, 33, kGatedValues);
  time_shape(128, 512, 8, 64);
  time_shape(10, 2048, 16, 32);
  // Few heads of many tokens are cut into segments; the last shape fills an H100 without that.
  time_shape(1, 65536, 6, 128);
  time_shape(1, 65536, 16, 128);
  time_shape(22, 65536, 6, 128, 13);
  time_step(64, 16, 128);
}

}  // namespace hgrn::hgru2_times
