// One layer: x += mixer(norm1(x)); x += GLU(norm2(x)). Forward and its mirror.
//
// Without dropout the product that ends a branch adds the residual stream (C of a GEMM), and the
// stream passes from block to block as one tensor. With dropout, and in inference, it passes as
// (residual, branch): the sum of the two is formed inside the next fused residual_norm. Either way
// no pass over memory only adds.
#pragma once
#include <string>
#include <vector>

#include "mixers/mixer.h"
#include "model/config.h"

namespace hgrn {

class Block {
 public:
  Block(Ops& ops, const ModelConfig& config, Mixer& mixer, int layer);
  void add_params(ParamTable& table, const MixerConfig& shared);

  // F as it lies in memory, rounded up to what the kernels like. Gate, up and down have zeros in
  // what is added; so have their activations and gradients, and no update moves them.
  static int64_t stored_width(const Ops& ops, const ModelConfig& c);

  // F below is stored_width().
  struct Acts {
    Tensor resid1 /*(N,D)*/, norm1 /*(N,D)*/, stats1 /*(N,2)*/;  // before the mixer
    Tensor resid2 /*(N,D)*/, norm2 /*(N,D)*/, stats2 /*(N,2)*/;  // before the GLU
    Tensor gate_up /*(N,2F)*/, hidden /*(N,F)*/;
    // norm1, norm2 and hidden lie in scratch, where they hold gradients later: backward makes them
    // again, each in place of a gradient that has just been used up.
    bool again = false;
  };
  struct Scratch {
    Tensor dresid /*(N,D)*/;   // gradient of the residual stream, carried from block to block
    Tensor dbranch /*(N,D)*/;  // its dropped-out copy; dresid itself without dropout
    Tensor dnorm /*(N,D)*/;    // gradient of a norm's output
    Tensor dhidden /*(N,F)*/, dgate_up /*(N,2F)*/;
  };
  static Acts take_acts(Arena& arena, const Ops& ops, const ModelConfig& c, int64_t N,
                        bool with_resid1, bool again);
  // What acts of take_acts(again) lack.
  static void use_scratch(Acts& acts, const Scratch& s) {
    acts.norm1 = acts.norm2 = s.dnorm;
    acts.hidden = s.dhidden;
  }
  static Scratch take_scratch(Arena& arena, const Ops& ops, const ModelConfig& c, int64_t N);
  // dhidden and dgate_up, which live only within the GLU's backward: other scratch may share them.
  static void take_glu_scratch(Arena& arena, Scratch& s, const Ops& ops, const ModelConfig& c,
                               int64_t N);

  // acts.resid1 = resid + dropout(branch) (or is resid already, when branch is absent).
  // out = the GLU's output, with drop to be added to acts.resid2 by whoever comes next; without
  // drop it has been: out is the residual stream. out holds the mixer's branch in between where the
  // mixer does not add the residual stream itself, or drop is on; else it may be absent together
  // with stop_before_down. branch and resid may not be acts' own tensors except resid ==
  // acts.resid1.
  void forward(Tensor out, Tensor resid, Tensor branch, const Acts& acts, const Weights& w,
               const MixerCall& call, const Dropout& drop, bool stop_before_down = false);
  // The same where no backward follows and nothing is dropped, in Ops' fused forms.
  void infer(Tensor branch_out, Tensor resid, Tensor branch, const Acts& acts, const Weights& w,
             const MixerCall& call);
  // In: s.dresid, s.dbranch = gradients of acts.resid2 and of this block's GLU branch.
  // Out: s.dresid = gradient of acts.resid1, s.dbranch = of the branch that was added to form it.
  // What is left, the gradients of the mixer's first weights, is a call of its own, before the next
  // block's backward.
  void backward(const Acts& acts, const Scratch& s, const Weights& w, const MixerCall& call,
                const Dropout& drop);
  void input_weights_backward(const Acts& acts, const Weights& w, const MixerCall& call) {
    mixer_.input_weights_backward(acts.norm1, w, call);
  }

  // Dropout layers of a model: 0 is the embedding, then two a block.
  static Dropout at_site(Dropout drop, int site) {
    drop.site = uint32_t(site);
    return drop;
  }
  int mixer_site() const { return 1 + 2 * layer_; }
  int glu_site() const { return 2 + 2 * layer_; }

 private:
  Ops& ops_;
  const ModelConfig& config_;
  Mixer& mixer_;
  int layer_;
  ParamId norm1_ = kNoParam, norm1_bias_ = kNoParam, norm2_ = kNoParam, norm2_bias_ = kNoParam;
  ParamId gate_up_ = kNoParam, gate_up_bias_ = kNoParam, down_ = kNoParam, down_bias_ = kNoParam;
};

}  // namespace hgrn
