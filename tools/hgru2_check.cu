// Developer tool: holds the CUDA HGRU2 kernels to an fp64 recurrence and times them.
//
//   cmake --build --preset release --target hgru2_check
//   build/hgru2_check [accuracy] [time] [small] [hopper] [gates] [compare]     default: accuracy
//   and time
//
// accuracy: every gate regime, T, head size, with and without h0, dhT and resets; a table of rms
// errors over the rms of the reference, the same call twice bit for bit, the flags between CTAs
// lowered after each call, and step() over the same tokens. time: medians of 30 launches. small: a
// few tiny shapes, for compute-sanitizer. hopper: of the accuracy cases those at n = 128. gates
// (and accuracy): the queries' and values' gates alone, over all bf16. compare: the times of the
// kernels that HGRN_HGRU2_SM90 chooses between, in turn. Exits 1 if a bar is missed.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "core/rng.h"
#include "cuda/cuda_check.h"
#include "cuda/hgru2.h"
#include "cuda/hgru2_kernels.h"
#include "hgru2_buffer.h"
#include "hgru2_gate_errors.h"
#include "hgru2_reference.h"
#include "hgru2_time.h"

using namespace hgrn;
using namespace hgrn::hgru2_cases;

namespace {

constexpr float kBoundStart = 0.25f;  // dbound is added to

// Of a Hopper's kernels, a flag a multiprocessor. One that is still raised when a call has ended
// would let a CTA of the next call take a state that is not there yet.
struct Flags {
  int64_t count = 0, raised = 0;
};

// With `flags`, forward is over before backward begins, which could lower what forward left raised.
void run_gpu(const Case& c, const Data& d, Results& out, Flags* flags) {
  const SeqShape& s = c.shape;
  const auto kernel = make_cuda_hgru2(c.dtype, nullptr);
  Buffer x(c.dtype, {s.N(), 3 * s.D}), dy(c.dtype, {s.N(), s.D}), y(c.dtype, {s.N(), s.D});
  Buffer dx(c.dtype, {s.N(), 3 * s.D}), bound(DType::f32, {s.D}), dbound(DType::f32, {s.D});
  Buffer h0(DType::f32, kernel->state_shape(s)), hT(DType::f32, kernel->state_shape(s));
  Buffer dh0(DType::f32, kernel->state_shape(s)), dhT(DType::f32, kernel->state_shape(s));
  Buffer reset(DType::u8, {s.N()});
  x.put(d.x);
  dy.put(d.dy);
  bound.put(d.bound);
  dbound.put(std::vector<float>(s.D, kBoundStart));
  if (c.states) h0.put(d.h0), dhT.put(d.dhT);
  if (c.reset > 0)
    CUDA_CHECK(cudaMemcpy(reset.t.data, d.reset.data(), s.N(), cudaMemcpyHostToDevice));
  std::vector<std::unique_ptr<Buffer>> saved;
  std::vector<Tensor> saved_tensors;
  for (const SavedSpec& spec : kernel->saved(s)) {
    saved.push_back(std::make_unique<Buffer>(spec.dtype, spec.shape));
    saved_tensors.push_back(saved.back()->t);
  }
  SeqInputs in;
  in.x = x.t;
  if (c.regime.bound > 0) in.bound = bound.t;
  if (c.reset > 0) in.reset = reset.t;
  if (c.states) in.h0 = h0.t;
  SeqGrads grads;
  grads.dx = dx.t;
  grads.dbound = dbound.t;
  if (c.states) grads.dh0 = dh0.t;
  const auto count_flags = [&] {
    if (!flags) return;
    const std::vector<uint32_t> now = cuda_hgru2_flags(*kernel);
    flags->count = int64_t(now.size());
    flags->raised += flags->count - std::count(now.begin(), now.end(), 0u);
  };
  kernel->forward(s, c.options, y.t, c.states ? hT.t : Tensor(), in, saved_tensors);
  count_flags();
  kernel->backward(s, c.options, grads, dy.t, c.states ? dhT.t : Tensor(), in, saved_tensors);
  count_flags();
  CUDA_CHECK(cudaDeviceSynchronize());
  out[0] = y.get();
  const std::vector<double> all = dx.get();
  for (int part = 0; part < 3; ++part) {
    out[1 + part].resize(s.N() * s.D);
    for (int64_t i = 0; i < s.N() * s.D; ++i)
      out[1 + part][i] = all[(i / s.D * 3 + part) * s.D + i % s.D];
  }
  out[4] = dbound.get();
  for (double& v : out[4]) v -= kBoundStart;
  if (c.states) out[5] = hT.get(), out[6] = dh0.get();
}

// The same tokens one by one through step(): y and the final state.
void run_steps(const Case& c, const Data& d, Results& out) {
  const SeqShape& s = c.shape;
  const SeqShape one{s.B, 1, s.D, s.n};
  const auto kernel = make_cuda_hgru2(c.dtype, nullptr);
  Buffer x(c.dtype, {s.B, 3 * s.D}), y(c.dtype, {s.B, s.D}), bound(DType::f32, {s.D});
  Buffer h(DType::f32, kernel->state_shape(one)), reset(DType::u8, {s.B});
  bound.put(d.bound);
  h.put(d.h0);
  out[0].resize(s.N() * s.D);
  std::vector<float> row(s.B * 3 * s.D);
  std::vector<uint8_t> cut(s.B);
  SeqInputs in;
  in.x = x.t;
  if (c.regime.bound > 0) in.bound = bound.t;
  if (c.reset > 0) in.reset = reset.t;
  for (int64_t t = 0; t < s.T; ++t) {
    for (int64_t b = 0; b < s.B; ++b) {
      std::copy_n(d.x.begin() + (b * s.T + t) * 3 * s.D, 3 * s.D, row.begin() + b * 3 * s.D);
      if (c.reset > 0) cut[b] = d.reset[b * s.T + t];
    }
    x.put(row);
    CUDA_CHECK(cudaMemcpy(reset.t.data, cut.data(), cut.size(), cudaMemcpyHostToDevice));
    kernel->step(one, c.options, y.t, h.t, in);
    const std::vector<double> got = y.get();
    for (int64_t b = 0; b < s.B; ++b)
      std::copy_n(got.begin() + b * s.D, s.D, out[0].begin() + (b * s.T + t) * s.D);
  }
  out[5] = h.get();
}

// The tensor-core kernels keep gates above e^-8. Where all of dh0 has passed through smaller ones,
// that shows as an absolute error of e^-8 of the gradient before the gate: `ungated`, allowed for.
double relative_error(const std::vector<double>& a, const std::vector<double>& ref,
                      const std::vector<double>& ungated, double allowed) {
  double error = 0, norm = 0;
  for (const double g : ungated) norm += std::pow(std::exp(-8.0) * g / allowed, 2);
  for (size_t i = 0; i < ref.size(); ++i) {
    error += (a[i] - ref[i]) * (a[i] - ref[i]);
    norm += ref[i] * ref[i];
  }
  return std::sqrt(error / (norm + 1e-300));  // NaN stays NaN
}

// Whether CTAs hand states on: more heads than multiprocessors.
bool has_chain(const Case& c, const Flags& flags) {
  return flags.count > 0 && c.shape.B * c.shape.H() > flags.count && c.dtype == DType::bf16 &&
         c.shape.n == 128 && hgru2::takes_gates_sm90(c.options);
}

double bar(const Case& c, int output) {
  if (c.dtype == DType::f32) return output == 4 ? 1e-4 : 2e-5;
  if (c.shape.T < 2048 || output > 4) return 5e-3;
  return output == 4 ? 4e-3 : 3e-3;
}

int accuracy(const std::vector<Case>& cases) {
  const size_t count = cases.size();
  std::vector<Data> data(count);
  std::vector<Results> reference(count);
  std::vector<std::pair<size_t, int64_t>> jobs;
  std::atomic<size_t> next{0};
  const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  const auto parallel = [&](size_t n, auto&& job) {
    next = 0;
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < threads; ++i)
      pool.emplace_back([&] {
        for (size_t j; (j = next++) < n;) job(j);
      });
    for (std::thread& t : pool) t.join();
  };
  parallel(count, [&](size_t i) {
    const SeqShape& s = cases[i].shape;
    data[i] = draw(cases[i], 1000 + i);
    for (int o = 0; o < 4; ++o) reference[i][o].resize(s.N() * s.D);
    reference[i][4].assign(s.B * s.D, 0.0);
    if (cases[i].states)
      for (int o = 5; o < kSlots; ++o) reference[i][o].resize(s.B * s.D * s.n);
  });
  for (size_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < cases[i].shape.B * cases[i].shape.H(); ++j) jobs.push_back({i, j});
  std::stable_sort(jobs.begin(), jobs.end(), [&](const auto& l, const auto& r) {
    const auto work = [&](size_t i) {
      return cases[i].shape.T * cases[i].shape.n * cases[i].shape.n;
    };
    return work(l.first) > work(r.first);
  });
  parallel(jobs.size(), [&](size_t j) {
    const auto [i, bh] = jobs[j];
    reference_head(cases[i], data[i], reference[i], bh / cases[i].shape.H(),
                   bh % cases[i].shape.H());
  });

  int failures = 0;
  size_t chains = 0, with_flags = 0;
  double worst[2][2][kOutputs] = {};  // [bf16, f32][short, long]
  std::printf("%-15s %-4s %4s %4s %3s %3s %-16s", "regime", "type", "T", "n", "B", "H", "options");
  for (const char* name : kNames) std::printf(" %8s", name);
  std::printf("\n");
  for (size_t i = 0; i < count; ++i) {
    const Case& c = cases[i];
    const SeqShape& s = c.shape;
    std::vector<double> bound_sum(s.D, 0.0);
    for (int64_t j = 0; j < s.B * s.D; ++j) bound_sum[j % s.D] += reference[i][4][j];
    reference[i][4] = bound_sum;
    Results out, again;
    Flags flags;
    run_gpu(c, data[i], out, &flags);
    run_gpu(c, data[i], again, nullptr);
    chains += has_chain(c, flags), with_flags += flags.count > 0;
    std::string options;
    if (c.states) options += "h0 ";
    if (c.reset > 0) options += "reset ";
    const char* const gates[] = {"none", "silu", "sigm"};  // in the order of Act
    if (c.options.input_act != Act::identity)
      options += std::string(gates[int(c.options.input_act)]) + "_i ";
    if (c.options.output_act != Act::silu)
      options += std::string(gates[int(c.options.output_act)]) + "_o";
    std::printf("%-15s %-4s %4d %4d %3d %3d %-16s", c.regime.name, name_of(c.dtype), int(s.T),
                int(s.n), int(s.B), int(s.H()), options.c_str());
    bool pass = true;
    for (int o = 0; o < kOutputs; ++o) {
      if (reference[i][o].empty()) {
        std::printf(" %8s", "-");
        continue;
      }
      const double e = relative_error(out[o], reference[i][o],
                                      o == 6 ? reference[i][7] : std::vector<double>(), bar(c, o));
      std::printf(" %8.1e", e);
      pass = pass && e <= bar(c, o);
      double& w = worst[c.dtype == DType::f32][s.T >= 2048][o];
      if (!(e <= w)) w = e;
      if (out[o].size() != again[o].size() ||
          std::memcmp(out[o].data(), again[o].data(), out[o].size() * sizeof(double)) != 0) {
        std::printf(" %s DIFFERS BETWEEN RUNS", kNames[o]);
        pass = false;
      }
    }
    if (c.states && s.T <= 200 && s.B * s.H() <= 16) {
      Results steps;
      run_steps(c, data[i], steps);
      for (int o : {0, 5}) {
        const double e = relative_error(steps[o], reference[i][o], {}, 1);
        std::printf(" step %s %.1e", kNames[o], e);
        pass = pass && e <= bar(c, o);
      }
    }
    if (flags.raised > 0) {
      std::printf(" %lld FLAGS LEFT RAISED", (long long)flags.raised);
      pass = false;
    }
    std::printf(" %s\n", pass ? "ok" : "FAIL");
    failures += !pass;
  }
  for (int type = 0; type < 2; ++type)
    for (int length = 0; length < 2; ++length) {
      std::printf("worst %s %s", type ? "f32" : "bf16", length ? "T=2048" : "T<2048");
      for (int o = 0; o < kOutputs; ++o)
        std::printf("  %s %.2e", kNames[o], worst[type][length][o]);
      std::printf("\n");
    }
  if (with_flags > 0) {
    std::printf("flags between CTAs: %zu cases with a chain, %zu without\n", chains,
                count - chains);
    if (chains == 0 || chains == count) {
      std::printf("one of both is missing FAIL\n");
      ++failures;
    }
  }
  std::printf("%zu cases, %d failed\n", count, failures);
  return failures;
}

std::vector<Case> accuracy_cases() {
  std::vector<Case> cases;
  const auto add = [&](Regime r, int64_t B, int64_t T, int64_t H, int64_t n) -> Case& {
    Case c;
    c.regime = r;
    c.shape = {B, T, H * n, n};
    c.options.query_scale = float(1 / std::sqrt(double(n)));
    cases.push_back(c);
    return cases.back();
  };
  for (const Regime& r : kRegimes) {
    for (int64_t n : {128, 64}) {
      for (int64_t T : {1, 63, 64, 65, 200}) add(r, 2, T, 4, n);
      add(r, 2, 2048, 2, n);
      Case& c = add(r, 2, 200, 4, n);
      c.states = true;
      c.reset = 0.02;
      c.options = {Act::sigmoid, Act::silu, 1.0f};
    }
    Case& plain = add(r, 2, 200, 2, 128);
    plain.dtype = DType::f32;
    plain.states = true;
    plain.reset = 0.02;
  }
  for (int64_t n : {128, 64}) {
    Case& a = add(kRegimes[0], 2, 2048, 2, n);
    a.states = true;
    a.reset = 0.002;
    Case& b = add(kRegimes[5], 2, 200, 2, n);
    b.reset = 0.3;
    Case& c = add(kRegimes[5], 1, 130, 4, n);
    c.states = true;
    c.options.input_act = Act::silu;
    add(kRegimes[0], 3, 17, 3, n).states = true;
  }
  // More heads than the card holds CTAs, so that whole and split heads meet in one launch, on a
  // Hopper in one run.
  for (const auto& [B, H, n] : {std::array<int64_t, 3>{20, 7, 128}, {50, 8, 64}, {15, 9, 64}}) {
    Case& c = add(kRegimes[0], B, 200, H, n);
    c.states = true;
    c.reset = 0.01;
  }
  add(kRegimes[5], 17, 512, 8, 128);
  // Gates on the values where a CTA has several chunks, on a Hopper of several heads.
  // Without resets it is another kernel.
  for (const Act output : {Act::sigmoid, Act::silu})
    for (const double reset : {0.01, 0.0}) {
      Case& c = add(kRegimes[0], 67, 200, 4, 128);
      c.options = {output, Act::silu, 1.0f};
      c.reset = reset;
    }
  add(kRegimes[0], 3, 150, 4, 128).options.output_act = Act::sigmoid;
  // A gate that no config names, for which the Hopper kernels are not made.
  for (const int64_t B : {3, 67})
    add(kRegimes[0], B, 150, 4, 128).options = {Act::identity, Act::silu, 1.0f};
  for (int64_t n : {1, 2, 4, 8, 16, 32, 33, 96, 256})
    for (DType type : {DType::f32, DType::bf16}) {
      Case& c = add(kRegimes[n % 9], 2, n == 256 ? 90 : 150, 4, n);
      c.dtype = type;
      c.states = n % 3 != 0;
      c.reset = 0.03;
      if (n % 2 == 0) c.options = {Act::sigmoid, Act::silu, 1.0f};
    }
  add(kRegimes[1], 2, 2048, 2, 128).dtype = DType::f32;
  return cases;
}

// Those of the width that the Hopper kernels take.
std::vector<Case> hopper_cases() {
  std::vector<Case> cases = accuracy_cases();
  std::erase_if(cases, [](const Case& c) { return c.shape.n != 128 || c.dtype != DType::bf16; });
  return cases;
}

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  for (int64_t n : {128, 64, 9})
    for (int64_t T : {1, 67, 130}) {
      Case c;
      c.regime = kRegimes[0];
      c.shape = {1, T, 2 * n, n};
      c.states = T != 67;
      c.reset = T == 67 ? 0.1 : 0;
      c.options.input_act = T == 67 ? Act::silu : Act::identity;
      c.dtype = n == 9 ? DType::f32 : DType::bf16;
      cases.push_back(c);
    }
  // Gates on the values, and segments of several chunks. Shorter than where the narrower bar
  // begins, which is for heads by the thousand tokens: here is one, of values rounded once more.
  Case gated;
  gated.regime = kRegimes[0];
  gated.shape = {1, 1950, 128, 128};
  gated.states = true;
  gated.reset = 0.02;
  gated.options = {Act::sigmoid, Act::silu, 1.0f};
  cases.push_back(gated);
  gated.shape = {1, 150, 128, 128};
  gated.reset = 0;
  cases.push_back(gated);
  // More heads than multiprocessors of a Hopper: a run of parts of two heads a CTA, and of several
  // whole ones with gates on the values.
  Case chain;
  chain.regime = kRegimes[0];
  chain.shape = {67, 130, 2 * 128, 128};
  chain.states = true;
  cases.push_back(chain);
  chain.shape = {67, 70, 4 * 128, 128};
  chain.options = {Act::sigmoid, Act::silu, 1.0f};
  cases.push_back(chain);
  chain.reset = 0.02;
  cases.push_back(chain);
  // Two whole heads a CTA, and fewer CTAs than multiprocessors.
  Case whole;
  whole.regime = kRegimes[0];
  whole.shape = {34, 50, 4 * 128, 128};
  whole.states = true;
  whole.options = {Act::sigmoid, Act::silu, 1.0f};
  cases.push_back(whole);
  // The second pair of a chunk's sub-chunks in part.
  chain.shape = {67, 107, 4 * 128, 128};
  cases.push_back(chain);
  chain.shape = {1, 127, 128, 128};
  cases.push_back(chain);
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    bool run_accuracy = argc < 2, run_time = argc < 2;
    bool run_small = false, run_hopper = false, run_compare = false, profile = false;
    bool run_gates = false;
    for (int i = 1; i < argc; ++i) {
      run_accuracy |= !std::strcmp(argv[i], "accuracy");
      run_time |= !std::strcmp(argv[i], "time");
      profile |= !std::strcmp(argv[i], "profile");
      run_small |= !std::strcmp(argv[i], "small");
      run_hopper |= !std::strcmp(argv[i], "hopper");
      run_gates |= !std::strcmp(argv[i], "gates");
      run_compare |= !std::strcmp(argv[i], "compare");
    }
    int failures = 0;
    if (run_compare) hgru2_times::compare();
    if (run_gates || run_accuracy) failures += gate_errors();
    if (run_hopper) failures += accuracy(hopper_cases());
    if (run_small) failures += accuracy(small_cases());
    if (run_accuracy) failures += accuracy(accuracy_cases());
    if (profile) hgru2_times::profile();
    if (run_time) hgru2_times::time();
    return failures ? 1 : 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
