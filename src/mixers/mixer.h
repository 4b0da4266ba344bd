// A token mixer: one sub-layer's weights, memory and both directions, from the normed residual
// stream to the branch that is added to it. docs/add_a_mixer.md shows how to write another one.
// A Mixer object serves all layers of a model, since layers may share weights (Gamma).
#pragma once
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/arena.h"
#include "core/params.h"
#include "ops/ops.h"

namespace hgrn {

// What a mixer may know of the model.
struct MixerConfig {
  int64_t D = 0, L = 0;
  int64_t n = 128;  // expand ratio = head dimension
  bool use_lower_bound = true;
  bool bias = false;
  Norm norm = Norm::rms;
  float norm_eps = 1e-5f;  // of the output norm g
  Act output_act = Act::silu;
  Act input_act = Act::identity;
  float query_scale = 1;
  Init linear_init = Init::normal;
  double linear_init_scale = 0.02;
  Init bias_init = Init::zeros;
  double bias_init_scale = 0;
  Init gamma_init = Init::zeros;
  bool decay_all = false;  // optim.decay = all
  Decay decay_of(bool matrix) const { return matrix || decay_all ? Decay::yes : Decay::no; }
};

// One call's rows. `slot` names the activation set: the layer in training, 0 where layers share
// one set (evaluation, recomputation).
struct MixerCall {
  int layer = 0, slot = 0;
  int64_t B = 0, T = 0;
  bool save = false;  // a backward follows
  Tensor reset;       // (N) u8 or absent
  Tensor state;       // this layer's recurrent state, read and updated; or absent
  // (N,D) to be added to out in the same pass, or absent: given to mixers that add_residual().
  Tensor residual;
  // Not null (never with save): u is not there yet, it is norm->normed, and the mixer's first
  // linear layer norms on its way.
  const NormInput* norm = nullptr;
};

class Mixer {
 public:
  virtual ~Mixer() = default;

  virtual void add_shared_params(ParamTable&) {}  // once a model
  virtual void add_layer_params(ParamTable&, const std::string& prefix, int layer) = 0;

  virtual void take_shared(Arena&) {}  // lives as long as the model
  // again (only with save): what backward can cheaply make again from the rest may be left out of
  // the slot and lie in scratch, where the next layer overwrites it.
  virtual void take_acts(Arena&, int slot, int64_t B, int64_t T, bool save, bool again) = 0;
  virtual void take_scratch(Arena&, int64_t B, int64_t T, bool backward) = 0;
  virtual Shape state_shape(int64_t B) const = 0;

  // Before the first layer's forward / after the first layer's backward() of a micro-batch, whose
  // input_weights_backward() is still to come.
  virtual void begin_forward(const Weights&) {}
  virtual void begin_backward() {}
  virtual void end_backward(const Weights&) {}

  // Whether forward() with save adds MixerCall::residual; one that does not is never given it.
  virtual bool adds_residual() const { return false; }
  // out (N,D) = mixer(u) [+ residual]; u (N,D). Recomputation calls it again with the same slot.
  virtual void forward(Tensor out, Tensor u, const Weights&, const MixerCall&) = 0;
  // Backward is two calls, since u need not be kept: the first makes what the norm that made u
  // needs to go back, and that norm's backward may make u again. du = ; weights' gradients +=
  virtual void backward(Tensor du, Tensor dout, const Weights&, const MixerCall&) = 0;
  // The gradients of the weights that u was multiplied with +=, those alone: what layers share may
  // be on its way to other ranks already. The scratch is as backward() left it.
  virtual void input_weights_backward(Tensor u, const Weights&, const MixerCall&) = 0;

  // For monitoring, after forward() with save and before the slot is used again: the mean forget
  // gate over all channels and some of the call's tokens. NaN where there is no such gate.
  virtual double mean_forget_gate(const MixerCall&) {
    return std::numeric_limits<double>::quiet_NaN();
  }

  virtual double flops_per_token() const = 0;  // forward, one layer, recurrence only
};

// The registry (registry.cpp): name -> factory. Exit::usage with the known names otherwise.
std::unique_ptr<Mixer> make_mixer(std::string_view name, Ops& ops, const MixerConfig& config);
std::vector<std::string> mixer_names();

}  // namespace hgrn
