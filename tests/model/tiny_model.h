// A model with weights, gradients and an optimizer in memory, for tests of whole passes.
#pragma once
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "core/log.h"
#include "model/hf_config.h"
#include "model/lm.h"
#include "train/checkpoint.h"
#include "train/optimizer.h"

namespace hgrn::test {

inline ModelConfig small_config(bool wikitext) {
  ModelConfig c;
  c.vocab_size = 29;
  c.hidden_size = 12;
  c.num_hidden_layers = 3;
  c.expand_ratio = 4;
  c.intermediate_size = 10;
  if (wikitext) {
    c.norm = Norm::layer;
    c.norm_eps = 1e-5;
    c.bias = true;
    c.output_activation = Act::sigmoid;
    c.input_activation = Act::silu;
    c.hidden_act = Act::identity;
    c.query_scale = QueryScale::one;
    c.scale_embedding = true;
    c.initializer = InitKind::fairseq;
  }
  return c;
}

struct TinyModel {
  std::unique_ptr<Ops> ops;
  std::unique_ptr<LanguageModel> model;
  WeightStore store;
  std::unique_ptr<Optimizer> optimizer;
  Tensor nll_sum;
  void* memory = nullptr;

  TinyModel(std::unique_ptr<Ops> backend, const ModelConfig& config, const LmShape& shape,
            const OptimConfig& optim = {})
      : ops(std::move(backend)) {
    model = std::make_unique<LanguageModel>(*ops, config, optim.decay == DecayKind::all);
    optimizer = std::make_unique<Optimizer>(*ops, optim);
    Arena arena("test");
    for (int pass = 0; pass < 2; ++pass) {
      store.take(arena, *ops, model->params(), /*with_grad=*/true);
      optimizer->take(arena, model->params());
      nll_sum = optimizer->numbers().nll_sum();
      if (pass == 0) arena.bind(memory = ops->alloc(arena.peak(), "test"));
    }
    ops->zero(store.weights().master);
    ops->zero(store.weights().grad);
    ops->zero(nll_sum);
    optimizer->zero_state();
    model->use(store.weights());
    model->prepare(shape);
  }
  ~TinyModel() {
    model.reset();
    ops->free(memory);
  }
  TinyModel(const TinyModel&) = delete;

  void set(const std::vector<float>& master) { store.set(*ops, master); }
  void set_f64(const std::vector<double>& master) {
    ops->upload(store.weights().master, master.data());
  }

  // Makes every gradient NaN, so that one which a step adds to instead of writing is found.
  void poison_grads() {
    for (ParamId id = 0; id < ParamId(model->params().params().size()); ++id) {
      const Tensor t = model->params().view(store.weights().grad, id);
      if (t.dtype == DType::f64)
        ops->upload(t, std::vector<double>(size_t(t.numel()), NAN).data());
      else
        ops->upload(t, std::vector<float>(size_t(t.numel()), NAN).data());
    }
  }
  // Mean nll of the batch and the gradient of it, in place of what was there.
  double loss_and_grad(const TokenRows& rows, const Dropout& drop = {}) {
    poison_grads();
    model->begin_step();
    ops->zero(nll_sum);
    model->forward_backward(rows, 1.0 / double(rows.B * rows.T), drop, nll_sum);
    return take_loss(rows);
  }
  double take_loss(const TokenRows& rows) {
    double sum = 0;
    ops->download(&sum, nll_sum);
    return sum / double(rows.B * rows.T);
  }
  std::vector<double> grads() {
    const Tensor g = store.weights().grad;
    std::vector<double> out(size_t(g.numel()));
    if (g.dtype == DType::f64) {
      ops->download(out.data(), g);
    } else {
      std::vector<float> f(out.size());
      ops->download(f.data(), g);
      out.assign(f.begin(), f.end());
    }
    return out;
  }
  std::vector<float> nll(const TokenRows& rows) {
    const Tensor t = model->forward(rows);
    std::vector<float> out(size_t(t.numel()));
    if (t.dtype == DType::f64) {
      std::vector<double> wide(out.size());
      ops->download(wide.data(), t);
      out.assign(wide.begin(), wide.end());
    } else {
      ops->download(out.data(), t);
    }
    return out;
  }
};

// Random tokens and their targets, every row its own.
struct RandomRows {
  int64_t B, T;
  std::vector<int32_t> inputs, targets;
  std::vector<uint8_t> reset;
  RandomRows(int64_t b, int64_t t, int64_t vocab, uint64_t seed, bool with_reset = false)
      : B(b), T(t) {
    for (int64_t i = 0; i < B * T; ++i) {
      const Philox r = philox(seed, 7, uint64_t(i));
      inputs.push_back(int32_t(r.v[0] % uint64_t(vocab)));
      targets.push_back(int32_t(r.v[1] % uint64_t(vocab)));
      if (with_reset) reset.push_back(r.v[2] % 5 == 0);
    }
  }
  TokenRows rows() const {
    return {B, T, inputs.data(), targets.data(), reset.empty() ? nullptr : reset.data()};
  }
};

inline std::string shared_dir() {
  const char* set = std::getenv("HGRN_SHARED");
  return set ? set : HGRN_SOURCE_DIR "/../shared";
}

// |a - b| over |b|, as vectors.
template <class A, class B>
double vector_error(const A* a, const B* b, int64_t n) {
  double d = 0, r = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = double(a[i]) - double(b[i]);
    d += x * x;
    r += double(b[i]) * double(b[i]);
  }
  return std::sqrt(d / (r + 1e-300));
}

}  // namespace hgrn::test
