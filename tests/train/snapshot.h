// A small parameter table and states of it, for the tests of checkpoints.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "core/rng.h"
#include "temp_folder.h"
#include "train/checkpoint.h"

namespace hgrn::test {

inline Param param(const std::string& name, const Shape& shape, Decay decay = Decay::yes,
                   const Shape& stored = {}) {
  Param p;
  p.name = name, p.shape = shape, p.decay = decay, p.stored = stored;
  return p;
}

// Padded rows and columns, a pack, both decay groups, and gaps between the weights.
inline ParamTable make_table(bool tied = true, int64_t rows = 37) {
  ParamTable t;
  const Shape padded = {(rows + 15) / 16 * 16, 8};
  t.add(param("model.embeddings.weight", {rows, 8}, Decay::yes, padded));
  if (!tied) t.add(param("lm_head.weight", {rows, 8}, Decay::yes, padded));
  t.add(param("model.lower_bounds", {2, 8}, Decay::no));
  const ParamId q = t.add(param("model.layers.0.attn.q_proj.weight", {8, 8}));
  const ParamId f = t.add(param("model.layers.0.attn.f_proj.weight", {8, 8}));
  t.pack({q, f});
  t.add(param("model.layers.0.mlp.down_proj.weight", {8, 11}, Decay::yes, {8, 16}));
  t.add(param("model.norm.weight", {8}, Decay::no));
  t.finalize();
  return t;
}

// The flat buffers as training has them: any numbers in the weights, zeros in the padding.
inline std::vector<float> filled(const ParamTable& t, uint64_t seed) {
  std::vector<float> flat(size_t(t.total()), 0.0f);
  for (const Param& p : t.params())
    for (int64_t i = 0; i < p.shape.numel(); ++i)
      flat[size_t(p.at(i))] = float(int32_t(philox(seed, 0, uint64_t(p.at(i))).v[0])) / 7e8f;
  return flat;
}

inline Snapshot make_snapshot(const ParamTable& t, int64_t step, uint64_t seed) {
  Snapshot s;
  s.table = &t;
  s.master = filled(t, seed), s.m = filled(t, seed + 1), s.v = filled(t, seed + 2);
  s.state.step = step, s.state.updates = step - 1, s.state.tokens = step * 4096;
  s.state.next_sample = step * 8, s.state.seed = 0xfedcba9876543210ull;
  s.state.config_json = R"({"optim": {"lr": 0.0003}, "model": {"hidden_size": 8}})";
  s.state.series["loss"] = {0.1, 1.0 / 3.0, 1e-310, -0.0, 3.0};
  s.hf_config_json = R"({"model_type": "hgrn2"})";
  return s;
}

inline bool equal_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Whether the folder holds exactly this snapshot.
inline bool holds(const std::string& dir, const Snapshot& s) {
  const size_t n = size_t(s.table->total());
  std::vector<float> master(n, 9), m(n, 9), v(n, 9);
  TrainerState state;
  verify_checkpoint(dir);
  load_checkpoint(dir, *s.table, master.data(), m.data(), v.data(), &state);
  return equal_bits(master, s.master) && equal_bits(m, s.m) && equal_bits(v, s.v) &&
         trainer_state_to_json(state) == trainer_state_to_json(s.state);
}

inline std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& e : std::filesystem::directory_iterator(folder))
    names.push_back(e.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace hgrn::test
