// The lower bounds of the forget gates (paper Eq. 3): beta = cumsum(softmax(Gamma)) over layers,
// less its first row, so that beta[0] = 0 and the bounds rise with depth. One Gamma (L,D) a model,
// shared by its layers. A part for gated mixers; HGRU2 uses it.
#pragma once
#include "core/arena.h"
#include "mixers/mixer.h"

namespace hgrn {

class LowerBound {
 public:
  LowerBound(Ops& ops, const MixerConfig& c) : ops_(ops), config_(c) {}

  void add_params(ParamTable& table);
  void take(Arena& arena);
  void begin_forward(const Weights& w);  // beta from Gamma
  void begin_backward();                 // dbeta = 0
  void end_backward(const Weights& w);   // dGamma += from dbeta

  // Row `layer`, (D); absent without lower bounds.
  Tensor beta(int layer) const { return row(beta_, layer); }
  Tensor dbeta(int layer) const { return row(dbeta_, layer); }

 private:
  Tensor row(Tensor t, int layer) const;
  Ops& ops_;
  const MixerConfig config_;
  ParamId gamma_ = kNoParam;
  Tensor beta_ /*(L,D)*/, dbeta_ /*(L,D)*/;
};

}  // namespace hgrn
