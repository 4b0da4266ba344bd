// The whole model: embedding -> L x block -> norm -> cross-entropy, and backward through the same.
// Written once against Ops; docs/tour.md follows one batch through it.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "core/arena.h"
#include "mixers/mixer.h"
#include "model/block.h"
#include "model/config.h"
#include "model/weights.h"

namespace hgrn {

// B rows of T tokens in host memory. targets < 0 are not scored; reset may be null.
struct TokenRows {
  int64_t B = 0, T = 0;
  const int32_t* inputs = nullptr;   // (B,T)
  const int32_t* targets = nullptr;  // (B,T)
  const uint8_t* reset = nullptr;    // (B,T) 1: state is zero before this token
};

// What memory the model is laid out for.
struct LmShape {
  int64_t B = 1, T = 1;  // the largest batch; evaluation may use smaller ones
  bool train = false;    // keep activations for backward
  Recompute recompute = Recompute::none;
  bool state = false;      // keep recurrent states between calls
  bool likeliest = false;  // forward() also finds the likeliest tokens
};

class LanguageModel {
 public:
  // decay_all: optim.decay = all. The table is complete after this.
  LanguageModel(Ops& ops, const ModelConfig& config, bool decay_all = false);

  const ParamTable& params() const { return table_; }
  const ModelConfig& config() const { return config_; }
  Ops& ops() { return ops_; }

  // Lays out everything but weights in the arena (unbound: only counted).
  void layout(Arena& arena, const LmShape& shape);
  // Allocates the arena of layout(); frees the one before.
  void prepare(const LmShape& shape);
  ~LanguageModel();

  void use(const Weights& weights) {
    recorded_.clear();
    weights_ = weights;
    weights_.ledger = &ledger_;
  }

  // Stages of the model: -1 embedding and what layers share, 0..L-1 the layers, L final norm and
  // head. before_forward(s): stage s is about to read its weights. after_backward(s): the gradients
  // of stage s of this micro-batch are complete; in the order L, L-1, .., 1, -1, 0. A tied head
  // belongs to stage -1.
  struct Hooks {
    std::function<void(int stage)> before_forward, after_backward;
  };
  void set_hooks(Hooks hooks) { hooks_ = std::move(hooks); }
  int stage_of(ParamId id) const;

  // The next micro-batch is the first of a step: what stands in weights.grad does not count (it may
  // be NaN) and is overwritten, every weight's part; padding between weights stays as it is.
  void begin_step() { ledger_.begin_step(table_); }
  // Forward and backward of one micro-batch (exactly shape.B x shape.T). Gradients of
  // grad_scale * sum of nll are added to weights.grad; nll_sum (1) f64 += sum of nll.
  // may_record: the second call of a kind is recorded (Ops::record), and those after it replay
  // that; no hook may then want anything during the calls, and weights and nll_sum stay in place.
  void forward_backward(const TokenRows& rows, double grad_scale, const Dropout& drop,
                        Tensor nll_sum, bool may_record = false);
  // Forward alone, B*T at most the shape's, without dropout. Returns nll (B*T) stat_dtype(), valid
  // until the next call. With state: it is read and updated.
  Tensor forward(const TokenRows& rows);
  // After forward() of N tokens, with shape.likeliest: the likeliest token at each place, (N) i32.
  Tensor likeliest(int64_t N) const { return likeliest_.slice(0, N); }
  // Forward alone, for the state's sake: no logits.
  void advance(const TokenRows& rows);
  // Forward alone; returns the logits after the last token of each row, (B,Vp) act_dtype().
  Tensor forward_last_logits(const TokenRows& rows);
  // One token more of each of B rows, whose ids the device holds in next_tokens(): returns the
  // logits (B,Vp) of what follows. Needs state, and a forward call before it with these weights.
  // Uploads nothing, so that Ops::record can keep it.
  Tensor step(int64_t B);
  Tensor next_tokens(int64_t B) const { return tokens_.slice(0, B); }  // (B) i32
  // Logits of all rows after forward() or forward_backward(): rows [first, first+count), for tests.
  Tensor logits(int64_t first, int64_t count);

  void zero_state();
  // The recurrent state, (L,B,...) stat_dtype(); absent unless shape.state.
  Tensor state() const { return state_; }

  // In Hooks::after_backward(layer): see Mixer::mean_forget_gate. Waits for the device.
  double mean_forget_gate(int layer);
  // Another model on the same Ops had lent its temporaries (Ops::use_scratch) and is gone.
  void lend_scratch() { ops_.use_scratch(op_scratch_); }

  double flops_per_token() const;  // forward + backward, recurrence included
  // Of N rows, so many have their logits at a time.
  int64_t logit_rows(int64_t N, bool train, Recompute recompute) const;

 private:
  void release();
  void upload(const TokenRows& rows);
  void run_forward(const TokenRows& rows, const Dropout& drop, bool train);
  void run_micro_batch(const TokenRows& rows, double grad_scale, const Dropout& drop,
                       Tensor nll_sum);
  // Embedding and blocks; the residual stream after it is the sum of the two tensors, or the first
  // where the second is absent.
  std::pair<Tensor, Tensor> run_blocks(const TokenRows& rows, const Dropout& drop, bool train);
  void run_backward(const TokenRows& rows, const Dropout& drop);
  void embedding_backward(const Dropout& drop);  // and of what layers share
  void complete(int stage);
  MixerCall call(int layer, const TokenRows& rows, bool train) const;
  int slot(int layer) const { return per_layer_ ? layer : 0; }
  Block::Acts acts(int layer, int64_t N) const;

  Ops& ops_;
  const ModelConfig config_;
  MixerConfig mixer_config_;
  std::unique_ptr<Mixer> mixer_;
  std::vector<Block> blocks_;
  ParamTable table_;
  ParamId embedding_ = kNoParam, head_ = kNoParam, norm_ = kNoParam, norm_bias_ = kNoParam;
  Weights weights_;
  GradLedger ledger_;
  std::vector<std::vector<ParamId>> stages_;  // weights of stage s in [s + 1]
  Hooks hooks_;

  LmShape shape_;
  bool per_layer_ = false;  // one activation set a layer
  void* memory_ = nullptr;
  Tensor op_scratch_ /*bytes, u8*/;  // lent to ops_
  Tensor tokens_ /*(N) i32*/, targets_ /*(N) i32*/, reset_ /*(N) u8*/;
  Tensor order_;  // Ops::embedding_order_size; of the tokens, in training
  Tensor clock_ /*(16) u8: Dropout::clock*/;
  std::vector<Block::Acts> acts_;
  std::vector<Tensor> resid1_ /*L x (N,D)*/;  // the layers' inputs, which recomputation starts from
  Block::Scratch scratch_;

  // What differs between micro-batches that run the same operations on other data: fresh
  // gradients, resets, dropout, scale, where the loss goes.
  using Kind = std::tuple<bool, bool, float, uint64_t, double, void*>;
  struct Kept {
    bool seen = false;
    std::unique_ptr<Recording> recording;
  };
  std::map<Kind, Kept> recorded_;

  Tensor branch_ /*(N,D)*/;  // in training scratch_.dresid where that is free
  Tensor resid_ /*(N,D)*/, normed_ /*(N,D)*/, stats_ /*(N,2)*/;  // around the final norm
  Tensor nll_ /*(N)*/, logits_ /*(logit_rows,Vp)*/, last_ /*(B,D)*/;
  Tensor state_ /*(L,B,...)*/;
  Tensor likeliest_ /*(N) i32*/, draws_ /*(N) i32*/;
};

}  // namespace hgrn
