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

// Calls run(flat position, dense position, count) for each stretch of [begin, end) without padding.
template <class Run>
void each_run(const Param& p, int64_t begin, int64_t end, const Run& run) {
  const int64_t cols = p.cols() == p.stored_cols() ? p.shape.numel() : p.cols();
  for (int64_t i = begin; i < end;) {
    const int64_t count = std::min(end - i, cols - i % cols);
    run(p.at(i), i - begin, count);
    i += count;
  }
}

}  // namespace

int64_t Param::elements_before(int64_t position) const {
  const int64_t at = std::clamp<int64_t>(position - offset, 0, stored.numel());
  const int64_t row = at / stored_cols(), col = std::min(at % stored_cols(), cols());
  return std::min(row * cols() + col, shape.numel());
}

void gather(float* dense, const float* flat, const Param& p, int64_t begin, int64_t end,
            int64_t first) {
  each_run(p, begin, end, [&](int64_t from, int64_t to, int64_t count) {
    std::copy_n(flat + (from - first), count, dense + to);
  });
}

void scatter(float* flat, const float* dense, const Param& p, int64_t begin, int64_t end,
             int64_t first) {
  each_run(p, begin, end, [&](int64_t to, int64_t from, int64_t count) {
    std::copy_n(dense + from, count, flat + (to - first));
  });
}

ParamId ParamTable::add(Param param) {
  check(total_ == 0, "parameter {} comes after finalize()", param.name);
  check(find(param.name) == kNoParam, "parameter {} is registered twice", param.name);
  if (param.stored.rank == 0) param.stored = param.shape;
  check(param.stored.rank == param.shape.rank && param.stored.numel() >= param.shape.numel(),
        "parameter {} {} is stored as {}", param.name, param.shape.str(), param.stored.str());
  params_.push_back(std::move(param));
  return ParamId(params_.size()) - 1;
}

ParamId ParamTable::pack(std::vector<ParamId> members) {
  for (size_t i = 1; i < members.size(); ++i) {
    check(members[i] == members[i - 1] + 1, "packed parameters must be added one after another");
    const Param &p = params_[members[i]], &first = params_[members[0]];
    check(p.decay == first.decay && p.read_as == first.read_as,
          "packed {} and {} differ in decay or in how they are read", first.name, p.name);
  }
  packs_.push_back({std::move(members)});
  return kFirstPack + ParamId(packs_.size()) - 1;
}

void ParamTable::finalize() {
  struct Pass {
    Decay decay;
    ReadAs read_as;
  };
  int64_t at = 0;
  wide_first_ = -1;
  for (const Pass& pass : {Pass{Decay::yes, ReadAs::compute}, Pass{Decay::yes, ReadAs::master},
                           Pass{Decay::no, ReadAs::master}, Pass{Decay::no, ReadAs::compute}}) {
    for (ParamId id = 0; id < ParamId(params_.size()); ++id) {
      Param& p = params_[id];
      if (p.decay != pass.decay || p.read_as != pass.read_as) continue;
      const bool follows_in_pack = std::any_of(packs_.begin(), packs_.end(), [&](const Pack& k) {
        return std::find(k.members.begin() + 1, k.members.end(), id) != k.members.end();
      });
      if (!follows_in_pack) at = aligned(at);
      p.offset = at;
      at += p.stored.numel();
      if (wide_first_ < 0 && p.read_as == ReadAs::master) wide_first_ = p.offset;
    }
    at = aligned(at);
    if (pass.decay == Decay::yes) decayed_ = at;
  }
  total_ = at;
  if (wide_first_ < 0) wide_first_ = total_;
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

std::vector<ParamId> ParamTable::members(ParamId id) const {
  if (id >= kFirstPack) return packs_[id - kFirstPack].members;
  return {id};
}

bool GradLedger::first(const ParamTable& table, ParamId id) {
  if (written_.empty()) return false;
  const std::vector<ParamId> members = table.members(id);
  const bool first = !written_[size_t(members[0])];
  for (ParamId m : members) {
    check(written_[size_t(m)] != first, "some weights of a pack have a gradient, {} differs",
          table.params()[size_t(m)].name);
    written_[size_t(m)] = true;
  }
  return first;
}

Grad Weights::dw(ParamId id) const {
  if (id == kNoParam || !grad) return {};
  return {table->view(grad, id), ledger && ledger->first(*table, id)};
}

Tensor Weights::master_or_rest(FlatRange range) const {
  if (range.begin < master_first) return rest.part(range);
  return master.slice(range.begin - master_first, range.size());
}

Tensor Weights::w(ParamId id) const {
  if (id == kNoParam) return {};
  // A pack's members agree in how they are read; kFirstPack ids are matrices or biases.
  const bool as_master = id < kFirstPack && table->params()[id].read_as == ReadAs::master;
  return as_master ? table->view(master, id, master_first) : table->view(compute, id);
}

}  // namespace hgrn
