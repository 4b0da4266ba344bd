// The parameter table: every weight's name, shape, start and decay in one list. Memory layout,
// initialisation, optimizer, saving and loading all walk it, so a new weight is one add().
// Names are those of the saved tensors (fla's Hugging Face layout; docs/formats.md).
// It lies in core, below mixers and model, since both register weights in it.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/flat_range.h"
#include "core/grad.h"
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
  // In memory, where kernels want widths that are multiples of some number: rows (vocabulary, GLU
  // width) or columns (GLU width) may be padded, with zeros that stay zeros. Empty: as saved.
  Shape stored{};
  int64_t offset = -1;  // elements from the start of a flat buffer, after finalize()

  int64_t cols() const { return shape.rank ? shape[shape.rank - 1] : 1; }
  int64_t stored_cols() const { return stored.rank ? stored[stored.rank - 1] : 1; }
  // Where element i (row-major, as saved) lies in a flat buffer.
  int64_t at(int64_t i) const { return offset + i / cols() * stored_cols() + i % cols(); }
  // How many elements, as saved, lie before this position of a flat buffer.
  int64_t elements_before(int64_t position) const;
};

// Elements [begin, end) of a weight, as saved, out of or into its place in a flat buffer that
// starts at position `first` of the whole. dense has end - begin elements.
void gather(float* dense, const float* flat, const Param& p, int64_t begin, int64_t end,
            int64_t first = 0);
void scatter(float* flat, const float* dense, const Param& p, int64_t begin, int64_t end,
             int64_t first = 0);

class ParamTable {
 public:
  ParamId add(Param param);
  // The members, already added in this order, lie back to back and view() of the returned id sees
  // them as one weight with their first axes summed: q, f and i become one GEMM.
  ParamId pack(std::vector<ParamId> members);

  // Assigns offsets: [0, decayed()) holds the weights that decay, the rest follows. Those that are
  // read in fp32 lie together, none before wide_first().
  void finalize();

  int64_t total() const { return total_; }  // elements of a flat buffer, padding included
  int64_t decayed() const { return decayed_; }
  int64_t wide_first() const { return wide_first_; }  // total() where there are none
  int64_t count() const;                              // parameters of the model, without padding
  const std::vector<Param>& params() const { return params_; }
  ParamId find(std::string_view name) const;  // kNoParam if there is none

  // The weight inside a flat buffer (total() elements of any dtype); absent for kNoParam.
  // `first`: the element of it that a buffer of its end alone starts with.
  Tensor view(Tensor flat, ParamId id, int64_t first = 0) const;
  // The single weights behind an id: a pack's members, else the weight itself.
  std::vector<ParamId> members(ParamId id) const;

 private:
  struct Pack {
    std::vector<ParamId> members;
  };
  std::vector<Param> params_;
  std::vector<Pack> packs_;
  int64_t total_ = 0, decayed_ = 0, wide_first_ = 0;
};

// Which gradients a step has written so far. The first contribution to each overwrites what the
// step before left, the others add to it: so nothing has to be zeroed, and none is read in vain.
class GradLedger {
 public:
  void begin_step(const ParamTable& table) { written_.assign(table.params().size(), false); }
  // True where the weight (of a pack: every member) has nothing of this step yet; it has then.
  bool first(const ParamTable& table, ParamId id);
  // Before any contribution of a step; and after all of them.
  bool fresh() const { return !written_.empty() && !written_[0]; }
  void all_written() { written_.assign(written_.size(), true); }

 private:
  std::vector<bool> written_;  // empty: before the first step, all gradients add to what is there
};

// A model's weights as operations and the optimizer see them. Where the activations are fp32,
// `compute` and `master` are the same buffer. Where they are bf16, masters are split
// (core/dtype.h): before master_first an fp32 master weight is its upper half, `compute`, and its
// lower, `rest`; from there on, where norm weights and Gamma lie, which operations read in fp32, it
// is whole, in `master`. A bias that does not decay lies there, too, and has both.
struct Weights {
  const ParamTable* table = nullptr;
  Tensor compute;  // (total) in the precision of the activations
  // fp32 (double in gradient checks), elements [master_first, total): 0, or table->wide_first()
  Tensor master;
  int64_t master_first = 0;
  RangedTensor rest;             // i16; in training, of [0, master_first) what this rank updates
  Tensor grad;                   // (total) as master
  GradLedger* ledger = nullptr;  // absent: every gradient is added to

  Tensor w(ParamId id) const;
  bool split() const { return compute.dtype != master.dtype; }
  // Of a range that this rank updates, on one side of master_first: master or rest.
  Tensor master_or_rest(FlatRange range) const;
  // For one operation, which writes it or adds to it: asking again means another contribution.
  Grad dw(ParamId id) const;
};

}  // namespace hgrn
