#include "hgru2_reference.h"

#include <algorithm>
#include <cmath>

#include "core/dtype.h"
#include "core/rng.h"

namespace hgrn::hgru2_cases {
namespace {

float rounded(double v, DType t) {
  return t == DType::bf16 ? bf16_to_float(float_to_bf16(float(v))) : float(v);
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
double act(double x, Act a) {
  return a == Act::identity ? x : a == Act::silu ? x * sigmoid(x) : sigmoid(x);
}
double act_slope(double x, Act a) {
  const double s = sigmoid(x);
  return a == Act::identity ? 1 : a == Act::silu ? s + x * s * (1 - s) : s * (1 - s);
}

}  // namespace

Data draw(const Case& c, uint64_t seed) {
  uint64_t counter = 0;
  const auto uniform = [&] {
    const Philox p = philox(seed, 0, counter++);
    return (p.v[0] + 0.5) / 4294967296.0;
  };
  const auto normal = [&] {
    const double u = uniform(), v = uniform();
    return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
  };
  const SeqShape& s = c.shape;
  Data d;
  d.x.resize(s.N() * 3 * s.D);
  for (int64_t i = 0; i < int64_t(d.x.size()); ++i) {
    const bool gate = i / s.D % 3 == 1;
    d.x[i] = rounded(gate ? c.regime.mean + c.regime.deviation * normal() : normal(), c.dtype);
  }
  d.dy.resize(s.N() * s.D);
  for (float& v : d.dy) v = rounded(normal(), c.dtype);
  d.bound.resize(s.D);
  for (float& v : d.bound) v = float(c.regime.bound * (0.9 + 0.1 * uniform()));
  if (c.states) {
    d.h0.resize(s.B * s.D * s.n);
    d.dhT.resize(d.h0.size());
    for (float& v : d.h0) v = float(normal());
    for (float& v : d.dhT) v = float(normal());
  }
  if (c.reset > 0) {
    d.reset.resize(s.N());
    for (uint8_t& v : d.reset) v = uniform() < c.reset;
  }
  return d;
}

// One head, both directions, fp64; states recomputed from every 64th.
void reference_head(const Case& c, const Data& d, Results& out, int64_t b, int64_t head) {
  const SeqShape& s = c.shape;
  const int64_t n = s.n, T = s.T, D = s.D, at0 = (b * s.H() + head) * n * n;
  constexpr int64_t kEvery = 64;
  std::vector<double> q(T * n), k(T * n), f(T * n), v(T * n);
  const auto x = [&](int64_t t, int part, int64_t j) -> double {
    return d.x[((b * T + t) * 3 + part) * D + head * n + j];
  };
  const auto reset = [&](int64_t t) { return !d.reset.empty() && d.reset[b * T + t]; };
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = 0; j < n; ++j) {
      const double bound = d.bound[head * n + j];
      q[t * n + j] = c.options.query_scale * act(x(t, 0, j), c.options.output_act);
      k[t * n + j] = (1 - bound) * sigmoid(-x(t, 1, j));
      f[t * n + j] = reset(t) ? 0 : bound + (1 - bound) * sigmoid(x(t, 1, j));
      v[t * n + j] = act(x(t, 2, j), c.options.input_act);
    }
  std::vector<double> h(n * n), saved, inside((kEvery + 1) * n * n), dh(n * n), row(n);
  for (int64_t i = 0; i < n * n; ++i) {
    h[i] = c.states ? d.h0[at0 + i] : 0;
    dh[i] = c.states ? d.dhT[at0 + i] : 0;
  }
  const auto advance = [&](std::vector<double>& state, int64_t t) {
    for (int64_t i = 0; i < n; ++i) {
      const double fi = f[t * n + i], ki = k[t * n + i];
      for (int64_t j = 0; j < n; ++j) state[i * n + j] = fi * state[i * n + j] + ki * v[t * n + j];
    }
  };
  for (int64_t t = 0; t < T; ++t) {
    if (t % kEvery == 0) saved.insert(saved.end(), h.begin(), h.end());
    advance(h, t);
    std::fill(row.begin(), row.end(), 0.0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) row[j] += q[t * n + i] * h[i * n + j];
    std::copy(row.begin(), row.end(), out[0].begin() + (b * T + t) * D + head * n);
  }
  if (c.states) std::copy(h.begin(), h.end(), out[5].begin() + at0);
  for (int64_t chunk = (T - 1) / kEvery; chunk >= 0; --chunk) {
    const int64_t t0 = chunk * kEvery, count = std::min(kEvery, T - t0);
    std::copy_n(saved.begin() + chunk * n * n, n * n, h.begin());
    std::copy(h.begin(), h.end(), inside.begin());
    for (int64_t t = 0; t < count; ++t) {
      advance(h, t0 + t);
      std::copy(h.begin(), h.end(), inside.begin() + (t + 1) * n * n);
    }
    for (int64_t t = t0 + count - 1; t >= t0; --t) {
      const double* const before = &inside[(t - t0) * n * n];
      const double* const after = before + n * n;
      const float* const dy = &d.dy[(b * T + t) * D + head * n];
      const int64_t at = (b * T + t) * D + head * n;
      std::fill(row.begin(), row.end(), 0.0);
      for (int64_t i = 0; i < n; ++i) {
        double dq = 0, dk = 0, df = 0;
        for (int64_t j = 0; j < n; ++j) {
          double& g = dh[i * n + j];
          g += q[t * n + i] * dy[j];
          dq += after[i * n + j] * dy[j];
          dk += g * v[t * n + j];
          df += g * before[i * n + j];
          row[j] += g * k[t * n + i];
          if (t == 0 && c.states) out[7][at0 + i * n + j] = g;
          g *= f[t * n + i];
        }
        const double xf = x(t, 1, i), bound = d.bound[head * n + i];
        const double z = (reset(t) ? 0 : df) - dk;
        out[1][at + i] = c.options.query_scale * dq * act_slope(x(t, 0, i), c.options.output_act);
        out[2][at + i] = (1 - bound) * sigmoid(xf) * sigmoid(-xf) * z;
        // A sum over rows of the batch: one slot a row here, added up afterwards.
        out[4][b * D + head * n + i] += sigmoid(-xf) * z;
      }
      for (int64_t j = 0; j < n; ++j)
        out[3][at + j] = row[j] * act_slope(x(t, 2, j), c.options.input_act);
    }
  }
  if (c.states) std::copy(dh.begin(), dh.end(), out[6].begin() + at0);
}

}  // namespace hgrn::hgru2_cases
