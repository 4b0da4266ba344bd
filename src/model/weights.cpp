#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/rng.h"

namespace hgrn {
namespace {

uint64_t hash_of(const std::string& text) {  // FNV-1a
  uint64_t h = 0xcbf29ce484222325ull;
  for (unsigned char c : text) h = (h ^ c) * 0x100000001b3ull;
  return h;
}

// Elements 4q .. 4q+3 of a weight, of which one call of Philox gives all: N(0, 1), two of each
// Box-Muller transform, or U(-1, 1).
struct Quad {
  double v[4];
};
double open01(uint32_t word) {
  return (double(word) + 0.5) / 4294967296.0;
}
Quad normals(uint64_t key, int64_t q) {
  const Philox r = philox(key, 0, uint64_t(q));
  Quad o;
  for (int pair = 0; pair < 4; pair += 2) {
    const double radius = std::sqrt(-2.0 * std::log(open01(r.v[pair])));
    const double angle = 2.0 * M_PI * open01(r.v[pair + 1]);
    o.v[pair] = radius * std::cos(angle);
    o.v[pair + 1] = radius * std::sin(angle);
  }
  return o;
}
Quad uniforms(uint64_t key, int64_t q) {
  const Philox r = philox(key, 0, uint64_t(q));
  Quad o;
  for (int i = 0; i < 4; ++i) o.v[i] = 2.0 * open01(r.v[i]) - 1.0;
  return o;
}

// The weight p of the flat buffer w from its quads. Quads do not end with rows: the first and the
// last of a padded row are drawn twice.
template <class Draw>
void fill(float* w, const Param& p, uint64_t key, const Draw& draw) {
  constexpr int64_t kPiece = 1 << 14;
  const int64_t count = p.shape.numel(), cols = p.cols();
  const bool dense = cols == p.stored_cols();
  const int64_t piece = dense ? kPiece : cols, pieces = (count + piece - 1) / piece;
#pragma omp parallel for
  for (int64_t k = 0; k < pieces; ++k) {
    const int64_t first = k * piece, last = std::min(count, first + piece);
    float* const out = w + p.at(first) - first;
    for (int64_t q = first / 4; 4 * q < last; ++q) {
      const Quad quad = draw(key, q);
      for (int64_t i = std::max(first, 4 * q); i < std::min(last, 4 * q + 4); ++i)
        out[i] = float(p.init_scale * quad.v[i - 4 * q]);
    }
  }
}

}  // namespace

void WeightStore::take(Arena& arena, const Ops& ops, const ParamTable& table, bool with_grad,
                       Arena* shared, std::vector<FlatRange> updated) {
  weights_.table = &table;
  const bool narrow = ops.act_dtype() != ops.master_dtype();
  weights_.master_first = narrow ? table.wide_first() : 0;
  weights_.rest = {};
  if (narrow && with_grad) {
    if (updated.empty()) updated.push_back({0, table.total()});
    for (FlatRange r : updated) {
      r.end = std::min(r.end, weights_.master_first);
      if (r.begin < r.end) weights_.rest.ranges.push_back(r);
    }
    weights_.rest.data = arena.take(kLowerHalves, {total_size(weights_.rest.ranges)}, DType::i16);
  }
  weights_.master = arena.take(narrow ? "weights read in fp32" : "master weights",
                               {table.total() - weights_.master_first}, ops.master_dtype());
  Arena& moved = shared ? *shared : arena;
  weights_.compute =
      narrow ? moved.take("compute weights", {table.total()}, ops.act_dtype()) : weights_.master;
  if (with_grad) weights_.grad = moved.take("gradients", {table.total()}, ops.master_dtype());
}

void WeightStore::set(Ops& ops, const std::vector<float>& master) {
  const Weights& w = weights_;
  const Tensor t = w.master;
  check(int64_t(master.size()) == w.table->total(), "{} weights were given, {} expected",
        master.size(), w.table->total());
  if (!w.split()) {
    if (t.dtype == DType::f64)
      ops.upload(t, std::vector<double>(master.begin(), master.end()).data());
    else
      ops.upload(t, master.data());
  } else if (w.grad) {
    ops.upload(w.grad, master.data());
    const int64_t first = w.master_first, count = w.table->total() - first;
    ops.split(w.compute.slice(0, first), {}, w.grad.slice(0, first));
    for (const FlatRange& r : w.rest.ranges)
      ops.split(w.compute.slice(r.begin, r.size()), w.rest.part(r),
                w.grad.slice(r.begin, r.size()));
    ops.copy(t, w.grad.slice(first, count));
    ops.cast(w.compute.slice(first, count), t);
    ops.zero(w.grad);
  } else {
    set_zero(ops);
    std::vector<float> dense;
    for (ParamId id = 0; id < ParamId(w.table->params().size()); ++id) {
      const Param& p = w.table->params()[size_t(id)];
      dense.resize(size_t(p.shape.numel()));
      gather(dense.data(), master.data(), p, 0, p.shape.numel());
      set(ops, id, dense.data());
    }
  }
}

void WeightStore::set_zero(Ops& ops) {
  check(!weights_.rest.data, "weights in training are set all at once");
  ops.zero(weights_.master);
  if (weights_.split()) ops.zero(weights_.compute);
}

void WeightStore::set(Ops& ops, ParamId id, const float* values) {
  const Param& p = weights_.table->params()[size_t(id)];
  // The rows that there are, as they lie in memory.
  const int64_t n = p.shape.numel() / p.cols() * p.stored_cols();
  std::vector<float> padded;
  if (p.cols() != p.stored_cols()) {
    padded.assign(size_t(n), 0.0f);
    scatter(padded.data(), values, p, 0, p.shape.numel(), p.offset);
    values = padded.data();
  }
  const bool split = p.offset < weights_.master_first;
  const auto put = [&](Tensor t) {
    if (t.dtype == DType::f32) return ops.upload(t, values);
    if (t.dtype == DType::f64) {
      const std::vector<double> wide(values, values + n);
      return ops.upload(t, wide.data());
    }
    check(t.dtype == DType::bf16, "weights are kept in f32, f64 or bf16, not in {}",
          name_of(t.dtype));
    const std::unique_ptr<uint16_t[]> narrow(new uint16_t[size_t(n)]);
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i)  // as in training
      narrow[size_t(i)] = split ? split_weight(values[i]).bf16 : float_to_bf16(values[i]);
    ops.upload(t, narrow.get());
  };
  if (!split) put(weights_.master.slice(p.offset - weights_.master_first, n));
  if (weights_.split() && p.read_as == ReadAs::compute) put(weights_.compute.slice(p.offset, n));
}

std::vector<float> WeightStore::get(Ops& ops, const std::function<void(Tensor)>& gather,
                                    bool wanted) {
  const Weights& w = weights_;
  const bool split = w.split();
  check(!split || w.grad, "weights that are not trained have no master weights");
  if (split) {
    for (const FlatRange& r : w.rest.ranges)
      ops.join(w.grad.slice(r.begin, r.size()), w.compute.slice(r.begin, r.size()), w.rest.part(r));
    ops.copy(w.grad.slice(w.master_first, w.master.numel()), w.master);
    if (gather) gather(w.grad);
  }
  const Tensor t = split ? w.grad : w.master;
  std::vector<float> host(wanted ? size_t(t.numel()) : 0);
  if (wanted && t.dtype == DType::f64) {
    std::vector<double> wide(host.size());
    ops.download(wide.data(), t);
    host.assign(wide.begin(), wide.end());
  } else if (wanted) {
    ops.download(host.data(), t);
  }
  if (split) ops.zero(w.grad);
  return host;
}

std::vector<float> initial_weights(const ParamTable& table, uint64_t seed) {
  std::vector<float> flat(size_t(table.total()), 0.0f);
  for (const Param& p : table.params()) {
    const int64_t count = p.shape.numel();
    const uint64_t key = mix64(seed ^ hash_of(p.name));
    float* const w = flat.data();
    switch (p.init) {
      case Init::zeros: break;
      case Init::ones:
        for (int64_t i = 0; i < count; ++i) w[p.at(i)] = 1.0f;
        break;
      case Init::normal: fill(w, p, key, normals); break;
      case Init::uniform: fill(w, p, key, uniforms); break;
    }
  }
  return flat;
}

}  // namespace hgrn
