// HGRU2, the token mixer of HGRN2 (paper Eq. 1-2, Figure 1):
//   [q|f|i] = u Wqfi + b          one GEMM, (N,3D)
//   y = recurrence(act_o(q), beta + (1-beta) sigmoid(f), act_i(i))    the sequence kernel "hgru2"
//   out = norm_g(y) Wo + bo       norm over the whole D, all heads together; + the residual stream
// Twin of the recurrence: kernels/*/hgru2*   Test: tests/model/test_lm.cpp,
// tests/model/test_golden.cpp
#include <algorithm>
#include <cmath>
#include <cstring>

#include "mixers/lower_bound.h"
#include "mixers/mixer.h"

namespace hgrn {
namespace {

// Element i of a downloaded tensor.
float element(const std::vector<char>& raw, DType dtype, int64_t i) {
  const char* at = raw.data() + size_t(i) * size_of(dtype);
  if (dtype == DType::bf16) {
    uint16_t half;
    std::memcpy(&half, at, sizeof half);
    return bf16_to_float(half);
  }
  if (dtype == DType::f64) {
    double wide;
    std::memcpy(&wide, at, sizeof wide);
    return float(wide);
  }
  float v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

class Hgru2 final : public Mixer {
 public:
  Hgru2(Ops& ops, const MixerConfig& c)
      : ops_(ops), config_(c), seq_(ops.seq("hgru2")), bound_(ops, c) {}

  void add_shared_params(ParamTable& table) override { bound_.add_params(table); }
  void add_layer_params(ParamTable& table, const std::string& prefix, int layer) override;

  void take_shared(Arena& arena) override { bound_.take(arena); }
  void take_acts(Arena& arena, int slot, int64_t B, int64_t T, bool save, bool again) override;
  void take_scratch(Arena& arena, int64_t B, int64_t T, bool backward) override;
  Shape state_shape(int64_t B) const override { return seq_.state_shape(shape(B, 1)); }

  void begin_forward(const Weights& w) override { bound_.begin_forward(w); }
  void begin_backward() override { bound_.begin_backward(); }
  void end_backward(const Weights& w) override { bound_.end_backward(w); }

  bool adds_residual() const override { return true; }
  void forward(Tensor out, Tensor u, const Weights& w, const MixerCall& call) override;
  void backward(Tensor du, Tensor dout, const Weights& w, const MixerCall& call) override;
  void input_weights_backward(Tensor u, const Weights& w, const MixerCall& call) override;

  double mean_forget_gate(const MixerCall& call) override;

  double flops_per_token() const override {
    // per head and token: state update 2nn (outer product) + query 2nn
    return 4.0 * double(config_.D) * double(config_.n);
  }

 private:
  struct LayerParams {
    ParamId qfi = kNoParam, qfi_bias = kNoParam;  // (3D,D), (3D)
    ParamId norm = kNoParam, norm_bias = kNoParam;
    ParamId out = kNoParam, out_bias = kNoParam;
  };
  struct Acts {
    Tensor qfi /*(N,3D)*/, y /*(N,D)*/, stats /*(N,2)*/;
    Tensor normed /*(N,D), or absent: made again, in dnormed_*/;
    std::vector<Tensor> saved;  // of the sequence kernel
  };

  SeqShape shape(int64_t B, int64_t T) const { return {B, T, config_.D, config_.n}; }
  SeqOptions options() const {
    return {config_.output_act, config_.input_act, config_.query_scale};
  }

  Ops& ops_;
  const MixerConfig config_;
  SeqKernel& seq_;
  LowerBound bound_;
  std::vector<LayerParams> params_;
  std::vector<Acts> acts_;
  Tensor dqfi_ /*(N,3D)*/, dy_ /*(N,D)*/, dnormed_ /*(N,D)*/;
};

void Hgru2::add_layer_params(ParamTable& table, const std::string& prefix, int layer) {
  const int64_t D = config_.D;
  auto matrix = [&](const char* name) {
    return table.add({.name = prefix + "attn." + name + ".weight",
                      .shape = {D, D},
                      .init = config_.linear_init,
                      .init_scale = config_.linear_init_scale,
                      .decay = Decay::yes});
  };
  auto vector = [&](const std::string& name, Init init, double scale, ReadAs read_as) {
    return table.add({.name = prefix + "attn." + name,
                      .shape = {D},
                      .init = init,
                      .init_scale = scale,
                      .decay = config_.decay_of(/*matrix=*/false),
                      .read_as = read_as});
  };
  auto bias = [&](const char* name) {
    return vector(std::string(name) + ".bias", config_.bias_init, config_.bias_init_scale,
                  ReadAs::compute);
  };
  params_.resize(size_t(layer) + 1);
  LayerParams& p = params_[size_t(layer)];
  const ParamId q = matrix("q_proj"), f = matrix("f_proj"), i = matrix("i_proj");
  p.qfi = table.pack({q, f, i});
  if (config_.bias) {
    const ParamId bq = bias("q_proj"), bf = bias("f_proj"), bi = bias("i_proj");
    p.qfi_bias = table.pack({bq, bf, bi});
  }
  p.norm = vector("g_norm.weight", Init::ones, 0, ReadAs::master);
  if (config_.norm == Norm::layer)
    p.norm_bias = vector("g_norm.bias", Init::zeros, 0, ReadAs::master);
  p.out = matrix("o_proj");
  if (config_.bias) p.out_bias = bias("o_proj");
}

void Hgru2::take_acts(Arena& arena, int slot, int64_t B, int64_t T, bool save, bool again) {
  const int64_t N = B * T, D = config_.D;
  if (acts_.size() <= size_t(slot)) acts_.resize(size_t(slot) + 1);
  Acts& a = acts_[size_t(slot)];
  a.qfi = arena.take("mixer q,f,i", {N, 3 * D}, ops_.act_dtype());
  a.y = arena.take("mixer recurrence output", {N, D}, ops_.act_dtype());
  a.normed = again ? Tensor() : arena.take("mixer normed output", {N, D}, ops_.act_dtype());
  a.stats = arena.take("norm statistics", {N, 2}, ops_.stat_dtype());
  a.saved.clear();
  if (save)
    for (const SavedSpec& s : seq_.saved(shape(B, T)))
      a.saved.push_back(arena.take("mixer saved " + s.name, s.shape, s.dtype));
}

void Hgru2::take_scratch(Arena& arena, int64_t B, int64_t T, bool backward) {
  if (!backward) return;
  const int64_t N = B * T, D = config_.D;
  dqfi_ = arena.take("mixer gradients", {N, 3 * D}, ops_.act_dtype());
  dy_ = arena.take("mixer gradients", {N, D}, ops_.act_dtype());
  dnormed_ = arena.take("mixer gradients", {N, D}, ops_.act_dtype());
}

void Hgru2::forward(Tensor out, Tensor u, const Weights& w, const MixerCall& call) {
  const LayerParams& p = params_[size_t(call.layer)];
  const Acts& a = acts_[size_t(call.slot)];
  const SeqShape s = shape(call.B, call.T);
  const Tensor qfi = a.qfi.slice(0, s.N()), y = a.y.slice(0, s.N());
  const Tensor normed = (a.normed ? a.normed : dnormed_).slice(0, s.N());
  const Tensor stats = a.stats.slice(0, s.N());

  if (call.norm)
    ops_.norm_linear_forward(qfi, *call.norm, w.w(p.qfi), w.w(p.qfi_bias));
  else
    ops_.linear_forward(qfi, u, w.w(p.qfi), w.w(p.qfi_bias));
  const SeqInputs in{qfi, bound_.beta(call.layer), {}, call.reset, call.state};
  if (call.state && call.T == 1)
    seq_.step(s, options(), y, call.state, in);
  else
    seq_.forward(s, options(), y, call.state, in,
                 call.save ? std::span<const Tensor>(a.saved) : std::span<const Tensor>());
  const NormInput norm{.normed = normed,
                       .stats = stats,
                       .x = y,
                       .w = w.w(p.norm),
                       .b = w.w(p.norm_bias),
                       .kind = config_.norm,
                       .eps = config_.norm_eps};
  if (!call.save) return ops_.norm_linear_forward(out, norm, w.w(p.out), w.w(p.out_bias));
  ops_.norm_forward(normed, stats, y, norm.w, norm.b, norm.kind, norm.eps);
  ops_.linear_forward(out, normed, w.w(p.out), w.w(p.out_bias), call.residual);
}

void Hgru2::backward(Tensor du, Tensor dout, const Weights& w, const MixerCall& call) {
  const LayerParams& p = params_[size_t(call.layer)];
  const Acts& a = acts_[size_t(call.slot)];
  const SeqShape s = shape(call.B, call.T);

  const NormAgain again = a.normed ? NormAgain{} : NormAgain{dnormed_, w.w(p.norm_bias)};
  ops_.linear_backward(dnormed_, {}, {}, dout, {}, w.w(p.out));
  ops_.norm_backward(dy_, w.dw(p.norm), w.dw(p.norm_bias), dnormed_, a.y, w.w(p.norm), a.stats,
                     config_.norm, again);
  ops_.linear_backward({}, w.dw(p.out), w.dw(p.out_bias), dout, a.normed ? a.normed : dnormed_,
                       w.w(p.out));
  const SeqInputs in{a.qfi, bound_.beta(call.layer), {}, call.reset, {}};
  seq_.backward(s, options(), {dqfi_, bound_.dbeta(call.layer), {}, {}}, dy_, {}, in, a.saved);
  ops_.linear_backward(du, {}, {}, dqfi_, {}, w.w(p.qfi));
}

void Hgru2::input_weights_backward(Tensor u, const Weights& w, const MixerCall& call) {
  const LayerParams& p = params_[size_t(call.layer)];
  ops_.linear_backward({}, w.dw(p.qfi), w.dw(p.qfi_bias), dqfi_, u, w.w(p.qfi));
}

// On the host, from a few stretches of tokens: their gates are as good as those of all of them for
// a mean, and nothing has to be kept for it on the device.
double Hgru2::mean_forget_gate(const MixerCall& call) {
  constexpr int64_t kStretches = 4, kTokens = 32;
  const Tensor qfi = acts_[size_t(call.slot)].qfi, beta = bound_.beta(call.layer);
  const int64_t N = call.B * call.T, D = config_.D, tokens = std::min(N, kTokens);
  std::vector<float> bound(size_t(D), 0.0f);
  std::vector<char> raw;
  if (beta) {
    raw.resize(beta.bytes());
    ops_.download(raw.data(), beta);
    for (int64_t d = 0; d < D; ++d) bound[size_t(d)] = element(raw, beta.dtype, d);
  }
  double sum = 0;
  int64_t rows = 0, before = -tokens;
  for (int64_t i = 0; i < kStretches; ++i) {
    const int64_t first = (N - tokens) * i / (kStretches - 1);
    if (first < before + tokens) continue;  // no token twice
    before = first;
    const Tensor part = qfi.slice(first, tokens);
    raw.resize(part.bytes());
    ops_.download(raw.data(), part);
    for (int64_t t = 0; t < tokens; ++t) {
      float row = 0;
      for (int64_t d = 0; d < D; ++d) {
        const float f = element(raw, part.dtype, t * 3 * D + D + d);
        row += bound[size_t(d)] + (1 - bound[size_t(d)]) / (1 + std::exp(-f));
      }
      sum += double(row);
    }
    rows += tokens;
  }
  return sum / double(rows * D);
}

}  // namespace

std::unique_ptr<Mixer> make_hgru2(Ops& ops, const MixerConfig& config) {
  return std::make_unique<Hgru2>(ops, config);
}

}  // namespace hgrn
