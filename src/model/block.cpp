#include "model/block.h"

#include <cmath>

namespace hgrn {

Block::Block(Ops& ops, const ModelConfig& config, Mixer& mixer, int layer)
    : ops_(ops), config_(config), mixer_(mixer), layer_(layer) {}

void Block::add_params(ParamTable& table, const MixerConfig& shared) {
  const int64_t D = config_.hidden_size, F = config_.intermediate_size;
  const std::string prefix = fmt::format("model.layers.{}.", layer_);
  const bool fairseq = config_.initializer == InitKind::fairseq;

  const int64_t Fp = stored_width(ops_, config_);
  auto vector = [&](const std::string& name, int64_t size, int64_t stored, Init init, double scale,
                    ReadAs read_as) {
    return table.add({.name = prefix + name,
                      .shape = {size},
                      .init = init,
                      .init_scale = scale,
                      .decay = shared.decay_of(/*matrix=*/false),
                      .read_as = read_as,
                      .stored = {stored}});
  };
  auto norm = [&](const std::string& name, ParamId& weight, ParamId& bias) {
    weight = vector(name + ".weight", D, D, Init::ones, 0, ReadAs::master);
    if (config_.norm == Norm::layer)
      bias = vector(name + ".bias", D, D, Init::zeros, 0, ReadAs::master);
  };
  // fairseq's linear layers start as torch's default: uniform within 1/sqrt(fan_in).
  auto linear = [&](const std::string& name, int64_t out, int64_t in, Shape stored) {
    return table.add({.name = prefix + "mlp." + name + ".weight",
                      .shape = {out, in},
                      .init = shared.linear_init,
                      .init_scale = fairseq ? 1 / std::sqrt(double(in)) : shared.linear_init_scale,
                      .decay = Decay::yes,
                      .stored = stored});
  };
  auto bias = [&](const std::string& name, int64_t out, int64_t in, int64_t stored) {
    return vector("mlp." + name + ".bias", out, stored, shared.bias_init, 1 / std::sqrt(double(in)),
                  ReadAs::compute);
  };

  norm("attn_norm", norm1_, norm1_bias_);
  mixer_.add_layer_params(table, prefix, layer_);
  norm("mlp_norm", norm2_, norm2_bias_);
  const ParamId gate = linear("gate_proj", F, D, {Fp, D}), up = linear("up_proj", F, D, {Fp, D});
  gate_up_ = table.pack({gate, up});
  if (config_.bias) {
    const ParamId gate_bias = bias("gate_proj", F, D, Fp), up_bias = bias("up_proj", F, D, Fp);
    gate_up_bias_ = table.pack({gate_bias, up_bias});
  }
  down_ = linear("down_proj", D, F, {D, Fp});
  if (config_.bias) down_bias_ = bias("down_proj", D, F, D);
}

int64_t Block::stored_width(const Ops& ops, const ModelConfig& c) {
  const int64_t m = ops.width_multiple();
  return (c.intermediate_size + m - 1) / m * m;
}

Block::Acts Block::take_acts(Arena& arena, const Ops& ops, const ModelConfig& c, int64_t N,
                             bool with_resid1, bool again) {
  const int64_t D = c.hidden_size, F = stored_width(ops, c);
  const DType act = ops.act_dtype(), stat = ops.stat_dtype();
  Acts a;
  a.again = again;
  if (with_resid1) a.resid1 = arena.take("residual stream", {N, D}, act);
  if (!again) a.norm1 = arena.take("normed inputs", {N, D}, act);
  a.stats1 = arena.take("norm statistics", {N, 2}, stat);
  a.resid2 = arena.take("residual stream", {N, D}, act);
  if (!again) a.norm2 = arena.take("normed inputs", {N, D}, act);
  a.stats2 = arena.take("norm statistics", {N, 2}, stat);
  a.gate_up = arena.take("GLU gate,up", {N, 2 * F}, act);
  if (!again) a.hidden = arena.take("GLU hidden", {N, F}, act);
  return a;
}

Block::Scratch Block::take_scratch(Arena& arena, const Ops& ops, const ModelConfig& c, int64_t N) {
  const int64_t D = c.hidden_size;
  const DType act = ops.act_dtype();
  Scratch s;
  s.dresid = arena.take("residual gradient", {N, D}, act);
  s.dbranch = c.dropout > 0 ? arena.take("branch gradient", {N, D}, act) : s.dresid;
  s.dnorm = arena.take("norm gradient", {N, D}, act);
  return s;
}

void Block::take_glu_scratch(Arena& arena, Scratch& s, const Ops& ops, const ModelConfig& c,
                             int64_t N) {
  const int64_t F = stored_width(ops, c);
  s.dhidden = arena.take("GLU gradients", {N, F}, ops.act_dtype());
  s.dgate_up = arena.take("GLU gradients", {N, 2 * F}, ops.act_dtype());
}

void Block::forward(Tensor out, Tensor resid, Tensor branch, const Acts& a, const Weights& w,
                    const MixerCall& call, const Dropout& drop, bool stop_before_down) {
  const float eps = float(config_.norm_eps);
  if (branch)
    ops_.residual_norm_forward(a.resid1, a.norm1, a.stats1, resid, branch, w.w(norm1_),
                               w.w(norm1_bias_), config_.norm, eps,
                               at_site(drop, 2 * layer_));  // the GLU branch of the block before
  else
    ops_.norm_forward(a.norm1, a.stats1, a.resid1, w.w(norm1_), w.w(norm1_bias_), config_.norm,
                      eps);
  const bool add = drop.p == 0;
  if (add && mixer_.adds_residual()) {
    MixerCall adding = call;
    adding.residual = a.resid1;
    mixer_.forward(a.resid2, a.norm1, w, adding);
    ops_.norm_forward(a.norm2, a.stats2, a.resid2, w.w(norm2_), w.w(norm2_bias_), config_.norm,
                      eps);
  } else {
    mixer_.forward(out, a.norm1, w, call);
    ops_.residual_norm_forward(a.resid2, a.norm2, a.stats2, a.resid1, out, w.w(norm2_),
                               w.w(norm2_bias_), config_.norm, eps, at_site(drop, mixer_site()));
  }
  ops_.linear_glu_forward(a.hidden, a.gate_up, a.norm2, w.w(gate_up_), w.w(gate_up_bias_),
                          config_.hidden_act);
  if (!stop_before_down)
    ops_.linear_forward(out, a.hidden, w.w(down_), w.w(down_bias_), add ? a.resid2 : Tensor());
}

void Block::infer(Tensor branch_out, Tensor resid, Tensor branch, const Acts& a, const Weights& w,
                  const MixerCall& call) {
  NormInput norm{.normed = a.norm1,
                 .stats = a.stats1,
                 .sum = a.resid1,
                 .x = branch ? resid : a.resid1,
                 .branch = branch,
                 .w = w.w(norm1_),
                 .b = w.w(norm1_bias_),
                 .kind = config_.norm,
                 .eps = float(config_.norm_eps)};
  MixerCall fused = call;
  fused.norm = &norm;
  mixer_.forward(branch_out, a.norm1, w, fused);

  norm = {.normed = a.norm2,
          .stats = a.stats2,
          .sum = a.resid2,
          .x = a.resid1,
          .branch = branch_out,
          .w = w.w(norm2_),
          .b = w.w(norm2_bias_),
          .kind = config_.norm,
          .eps = float(config_.norm_eps)};
  ops_.norm_linear_forward(a.gate_up, norm, w.w(gate_up_), w.w(gate_up_bias_));
  ops_.glu_linear_forward(branch_out, a.hidden, a.gate_up, config_.hidden_act, w.w(down_),
                          w.w(down_bias_));
}

void Block::backward(const Acts& a, const Scratch& s, const Weights& w, const MixerCall& call,
                     const Dropout& drop) {
  const Tensor dropped = drop.p > 0 ? s.dbranch : Tensor();  // absent: equals dresid

  const auto made_again = [&](Tensor normed, ParamId bias) {
    return a.again ? NormAgain{normed, w.w(bias)} : NormAgain{};
  };

  ops_.glu_linear_backward(s.dgate_up, s.dhidden, w.dw(down_), w.dw(down_bias_),
                           w.dw(gate_up_bias_), s.dbranch, a.hidden, a.gate_up, w.w(down_),
                           config_.hidden_act, a.again);
  // The gradients of a norm's input come before those of the weights that it feeds, which want its
  // output: here and in the mixer.
  ops_.linear_backward(s.dnorm, {}, {}, s.dgate_up, {}, w.w(gate_up_));
  ops_.residual_norm_backward(s.dresid, dropped, w.dw(norm2_), w.dw(norm2_bias_), s.dnorm, a.resid2,
                              w.w(norm2_), a.stats2, config_.norm, at_site(drop, mixer_site()),
                              made_again(a.norm2, norm2_bias_));
  ops_.linear_backward({}, w.dw(gate_up_), {}, s.dgate_up, a.norm2, w.w(gate_up_));

  mixer_.backward(s.dnorm, s.dbranch, w, call);
  // What was added to form resid1: the GLU branch of the block before, or for the first block the
  // embedding, whose own dropout embedding_backward applies to dresid.
  const Tensor dprevious = layer_ > 0 ? dropped : Tensor();
  Dropout before = at_site(drop, 2 * layer_);
  if (layer_ == 0) before.p = 0;
  ops_.residual_norm_backward(s.dresid, dprevious, w.dw(norm1_), w.dw(norm1_bias_), s.dnorm,
                              a.resid1, w.w(norm1_), a.stats1, config_.norm, before,
                              made_again(a.norm1, norm1_bias_));
}

}  // namespace hgrn
