#include "model/weights.h"

#include <cmath>

#include "core/rng.h"

namespace hgrn {
namespace {

uint64_t hash_of(const std::string& text) {  // FNV-1a
  uint64_t h = 0xcbf29ce484222325ull;
  for (unsigned char c : text) h = (h ^ c) * 0x100000001b3ull;
  return h;
}

// Box-Muller on two of Philox's words: element i of a normal weight.
double normal_at(uint64_t key, int64_t i) {
  const Philox r = philox(key, 0, uint64_t(i));
  const double u = (double(r.v[0]) + 0.5) / 4294967296.0, t = double(r.v[1]) / 4294967296.0;
  return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * M_PI * t);
}

double uniform_at(uint64_t key, int64_t i) {  // (-1, 1)
  return 2.0 * ((double(philox(key, 0, uint64_t(i)).v[0]) + 0.5) / 4294967296.0) - 1.0;
}

}  // namespace

void WeightStore::take(Arena& arena, const Ops& ops, const ParamTable& table, bool with_grad) {
  weights_.table = &table;
  weights_.master = arena.take("master weights", {table.total()}, ops.master_dtype());
  weights_.compute = ops.act_dtype() == ops.master_dtype()
                         ? weights_.master
                         : arena.take("compute weights", {table.total()}, ops.act_dtype());
  if (with_grad) weights_.grad = arena.take("gradients", {table.total()}, ops.master_dtype());
}

void WeightStore::set(Ops& ops, const std::vector<float>& master) {
  const Tensor t = weights_.master;
  check(int64_t(master.size()) == t.numel(), "{} weights were given, {} expected", master.size(),
        t.numel());
  if (t.dtype == DType::f64) {
    const std::vector<double> wide(master.begin(), master.end());
    ops.upload(t, wide.data());
  } else {
    ops.upload(t, master.data());
  }
  if (weights_.compute.data != t.data) ops.cast(weights_.compute, t);
}

std::vector<float> WeightStore::get(Ops& ops) const {
  const Tensor t = weights_.master;
  std::vector<float> host(size_t(t.numel()));
  if (t.dtype == DType::f64) {
    std::vector<double> wide(host.size());
    ops.download(wide.data(), t);
    host.assign(wide.begin(), wide.end());
  } else {
    ops.download(host.data(), t);
  }
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
      case Init::normal:
#pragma omp parallel for
        for (int64_t i = 0; i < count; ++i) w[p.at(i)] = float(p.init_scale * normal_at(key, i));
        break;
      case Init::uniform:
#pragma omp parallel for
        for (int64_t i = 0; i < count; ++i) w[p.at(i)] = float(p.init_scale * uniform_at(key, i));
        break;
    }
  }
  return flat;
}

}  // namespace hgrn
