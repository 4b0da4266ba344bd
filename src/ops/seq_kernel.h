// The seam between token mixers and backends: what a sequence kernel computes between a mixer's
// input projection and its output norm. HGRU2 is one; GLA, Mamba or softmax attention would be
// others. A backend hands them out by name (Ops::seq); a mixer calls them and knows no backend.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "ops/act.h"

namespace hgrn {

// B rows of T tokens, N = B*T; D channels in H = D/n heads of n contiguous channels.
struct SeqShape {
  int64_t B = 0, T = 0, D = 0, n = 0;
  int64_t H() const { return D / n; }
  int64_t N() const { return B * T; }
};

struct SeqOptions {
  Act output_act = Act::silu;     // act_o
  Act input_act = Act::identity;  // act_i
  float query_scale = 1;          // s of docs/notation.md
};

struct SeqInputs {
  Tensor x;                       // (N,P) packed projections; P = packed_width(); hgru2: [q|f|i]
  Tensor bound;                   // (D) lower bound of the gates, master_dtype(); absent = 0
  std::span<const Tensor> extra;  // the kernel's own weights, if it has any
  Tensor reset;                   // (N) u8: state is zeroed before this token; absent = never
  Tensor h0;                      // (B, state...) state before the first token; absent = zero
};

// Gradients of SeqInputs. dx and dh0 are written, dbound and dextra are added to.
struct SeqGrads {
  Tensor dx;
  Tensor dbound;
  std::span<const Tensor> dextra;
  Tensor dh0;  // absent = not wanted
};

struct SavedSpec {
  std::string name;
  Shape shape;
  DType dtype;
};

class SeqKernel {
 public:
  virtual ~SeqKernel() = default;

  virtual int64_t packed_width(const SeqShape& s) const = 0;
  virtual Shape state_shape(const SeqShape& s) const = 0;  // (B, ...); kept in Ops::stat_dtype()
  // What forward leaves for backward, beyond its inputs.
  virtual std::vector<SavedSpec> saved(const SeqShape& s) const = 0;

  // y (N,D) = the mixer's output; hT (state_shape) = state after the last token, absent = not
  // wanted, may be h0 itself. `saved` holds what saved() lists, or is empty when no backward
  // follows.
  virtual void forward(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor hT,
                       const SeqInputs& in, std::span<const Tensor> saved) = 0;

  // dy (N,D); dhT = gradient of the final state, absent = zero. dbound is reduced in a fixed order.
  virtual void backward(const SeqShape& s, const SeqOptions& o, const SeqGrads& out, Tensor dy,
                        Tensor dhT, const SeqInputs& in, std::span<const Tensor> saved) = 0;

  // One token of each row (T = 1): h is read and updated in place.
  virtual void step(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor h,
                    const SeqInputs& in) = 0;
};

}  // namespace hgrn
