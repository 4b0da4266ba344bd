#include "core/params.h"

#include <algorithm>

namespace hgrn {
namespace {
// Ids of packs lie above those of single weights, so that one ParamId names either.
constexpr ParamId kFirstPack = 1 << 24;
constexpr int64_t kAlignElements = 128;  // 256 bytes in bf16, 512 in fp32
int64_t aligned(int64_t n) {
  return (n + kAlignElements - 1) / kAlignElements * kAlignElements;
}
}  // namespace

ParamId ParamTable::add(Param param, int64_t stored_rows) {
  check(total_ == 0, "parameter {} comes after finalize()", param.name);
  check(find(param.name) == kNoParam, "parameter {} is registered twice", param.name);
  param.stored = param.shape;
  if (stored_rows > 0) param.stored.dim[0] = stored_rows;
  params_.push_back(std::move(param));
  return ParamId(params_.size()) - 1;
}

ParamId ParamTable::pack(std::vector<ParamId> members) {
  for (size_t i = 1; i < members.size(); ++i) {
    check(members[i] == members[i - 1] + 1, "packed parameters must be added one after another");
    check(params_[members[i]].decay == params_[members[0]].decay, "packed {} differ in decay",
          params_[members[i]].name);
  }
  packs_.push_back({std::move(members)});
  return kFirstPack + ParamId(packs_.size()) - 1;
}

void ParamTable::finalize() {
  int64_t at = 0;
  for (Decay pass : {Decay::yes, Decay::no}) {
    for (ParamId id = 0; id < ParamId(params_.size()); ++id) {
      Param& p = params_[id];
      if (p.decay != pass) continue;
      const bool follows_in_pack = std::any_of(packs_.begin(), packs_.end(), [&](const Pack& k) {
        return std::find(k.members.begin() + 1, k.members.end(), id) != k.members.end();
      });
      if (!follows_in_pack) at = aligned(at);
      p.offset = at;
      at += p.stored.numel();
    }
    at = aligned(at);
    if (pass == Decay::yes) decayed_ = at;
  }
  total_ = at;
}

int64_t ParamTable::count() const {
  int64_t n = 0;
  for (const Param& p : params_) n += p.shape.numel();
  return n;
}

ParamId ParamTable::find(std::string_view name) const {
  for (size_t i = 0; i < params_.size(); ++i)
    if (params_[i].name == name) return ParamId(i);
  return kNoParam;
}

Tensor ParamTable::view(Tensor flat, ParamId id, int64_t from) const {
  if (id == kNoParam) return {};
  const bool packed = id >= kFirstPack;
  const Param& first = params_[packed ? packs_[id - kFirstPack].members[0] : id];
  Shape shape = first.stored;
  if (packed) {
    shape.dim[0] = 0;
    for (ParamId m : packs_[id - kFirstPack].members) shape.dim[0] += params_[m].stored[0];
  }
  Tensor t = flat.slice(first.offset - from, shape.numel());
  t.shape = shape;
  return t;
}

Tensor ParamTable::true_view(Tensor flat, ParamId id, int64_t from) const {
  Tensor t = flat.slice(params_[id].offset - from, params_[id].shape.numel());
  t.shape = params_[id].shape;
  return t;
}

Tensor Weights::w(ParamId id) const {
  if (id == kNoParam) return {};
  // A pack's members agree in how they are read; kFirstPack ids are matrices or biases.
  const bool as_master = id < kFirstPack && table->params()[id].read_as == ReadAs::master;
  return as_master ? table->view(master, id, master_first) : table->view(compute, id);
}

}  // namespace hgrn
