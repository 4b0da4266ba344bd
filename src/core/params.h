// The parameter table: every weight's name, shape, start and decay in one list. Memory layout,
// initialisation, optimizer, saving and loading all walk it, so a new weight is one add().
// Names are those of the saved tensors (fla's Hugging Face layout; docs/formats.md).
// It lies in core, below mixers and model, since both register weights in it.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace hgrn {

using ParamId = int;
constexpr ParamId kNoParam = -1;

enum class Init {
  zeros,
  ones,
  normal,   // N(0, init_scale^2)
  uniform,  // U(-init_scale, init_scale)
};
// Whether weight decay applies. The owner decides from optim.decay: `matrices` means the 2-D
// weights except Gamma, `all` means everything.
enum class Decay : bool { no, yes };
// How operations read the weight. `compute`: in the precision of the activations (matrices, biases
// of linear layers). `master`: in fp32 (norm weights, Gamma), since bf16 there costs accuracy and
// saves nothing.
enum class ReadAs : bool { compute, master };

struct Param {
  std::string name;
  Shape shape;  // as saved
  Init init = Init::zeros;
  double init_scale = 0;
  Decay decay = Decay::yes;
  ReadAs read_as = ReadAs::compute;
  Shape stored{};       // in memory: first axis possibly padded (vocabulary), zeros there
  int64_t offset = -1;  // elements from the start of a flat buffer, after finalize()
};

class ParamTable {
 public:
  // Registers a weight. stored_rows > 0 pads the first axis in memory.
  ParamId add(Param param, int64_t stored_rows = 0);
  // The members, already added in this order, lie back to back and view() of the returned id sees
  // them as one weight with their first axes summed: q, f and i become one GEMM.
  ParamId pack(std::vector<ParamId> members);

  // Assigns offsets: [0, decayed()) holds the weights that decay, the rest follows.
  void finalize();

  int64_t total() const { return total_; }  // elements of a flat buffer, padding included
  int64_t decayed() const { return decayed_; }
  int64_t count() const;  // parameters of the model, without padding
  const std::vector<Param>& params() const { return params_; }
  ParamId find(std::string_view name) const;  // kNoParam if there is none

  // The weight inside a flat buffer (total() elements of any dtype); absent for kNoParam.
  // `first`: the element of it that a buffer of its end alone starts with.
  Tensor view(Tensor flat, ParamId id, int64_t first = 0) const;
  // The same as saved: without the padded rows.
  Tensor true_view(Tensor flat, ParamId id, int64_t first = 0) const;

 private:
  struct Pack {
    std::vector<ParamId> members;
  };
  std::vector<Param> params_;
  std::vector<Pack> packs_;
  int64_t total_ = 0, decayed_ = 0;
};

// A model's weights as operations see them. `compute` and `master` are the same buffer where the
// activations are fp32.
struct Weights {
  const ParamTable* table = nullptr;
  // (total) fp32 (double in gradient checks); without training, where the activations are
  // narrower, the elements from master_first on: those that are read from it
  Tensor master;
  int64_t master_first = 0;
  Tensor compute;  // (total) in the precision of the activations
  Tensor grad;     // (total) as master; operations add to it

  Tensor w(ParamId id) const;
  Tensor dw(ParamId id) const { return grad ? table->view(grad, id) : Tensor(); }
};

}  // namespace hgrn
