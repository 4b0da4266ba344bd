// The whole model: gradients against central differences in double, recomputation, dropout,
// states, micro-batches, initial weights, parameter counts.
#include <algorithm>

#include "model/lm.h"

#include "catch.h"
#include "environment.h"
#include "model/tiny_model.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::vector<double> random_weights(const ParamTable& table) {
  // Nothing at its neutral value: norms near 1, everything else spread.
  std::vector<double> w(size_t(table.total()), 0.0);
  for (const Param& p : table.params())
    for (int64_t i = 0; i < p.shape.numel(); ++i) {
      const double u =
          double(philox(uint64_t(p.offset) + 1, 3, uint64_t(i)).v[0]) / 4294967296.0 * 2 - 1;
      w[size_t(p.at(i))] = p.init == Init::ones ? 1 + 0.3 * u : 0.5 * u;
    }
  return w;
}

// Largest |analytic - numeric| over the gradient's largest entry, over a sample of every tensor.
double grad_error(const ModelConfig& config, const Dropout& drop, bool reset,
                  Recompute recompute = Recompute::none) {
  const RandomRows data(2, 7, config.vocab_size, 5, reset);
  TinyModel t(make_cpu_ops(DType::f64), config,
              {.B = 2, .T = 7, .train = true, .recompute = recompute});
  std::vector<double> w = random_weights(t.model->params());
  t.set_f64(w);
  t.loss_and_grad(data.rows(), drop);
  const std::vector<double> grads = t.grads();
  double worst = 0;
  for (const Param& p : t.model->params().params()) {
    double largest = 1e-3, error = 0;
    const int64_t count = p.shape.numel(), step = std::max<int64_t>(1, count / 7);
    for (int64_t i = 0; i < count; i += step) {
      const size_t at = size_t(p.at(i));
      const double h = 1e-5, kept = w[at];
      auto loss_at = [&](double value) {
        w[at] = value;
        t.set_f64(w);
        return t.loss_and_grad(data.rows(), drop);
      };
      // Fourth-order central difference: truncation h^4, rounding 1e-16/h.
      const double numeric = (8 * (loss_at(kept + h) - loss_at(kept - h)) -
                              (loss_at(kept + 2 * h) - loss_at(kept - 2 * h))) /
                             (12 * h);
      w[at] = kept;
      largest = std::max(largest, std::fabs(numeric));
      error = std::max(error, std::fabs(numeric - grads[at]));
    }
    worst = std::max(worst, error / largest);
  }
  return worst;
}

}  // namespace

TEST_CASE("lm: gradients against central differences", "[model]") {
  const Dropout off{};
  for (bool wikitext : {false, true}) {
    INFO("wikitext " << wikitext);
    ModelConfig c = small_config(wikitext);
    CHECK(grad_error(c, off, false) < 1e-7);
    CHECK(grad_error(c, off, true) < 1e-7);
    c.tie_word_embeddings = false;
    c.use_lower_bound = false;
    CHECK(grad_error(c, off, false) < 1e-7);
  }
}

TEST_CASE("lm: gradients under dropout, also with recomputation", "[model]") {
  ModelConfig c = small_config(true);
  c.dropout = 0.3;
  Dropout drop;
  drop.p = 0.3f;
  drop.seed = 11;
  drop.step = 4;
  CHECK(grad_error(c, drop, false) < 1e-7);
  CHECK(grad_error(c, drop, true, Recompute::block) < 1e-7);
  CHECK(grad_error(c, drop, true, Recompute::elementwise) < 1e-7);
}

namespace {

// Losses and gradients of three updates, on other tokens each; the second step looks at other rows
// in between, whose activations overwrite what lies in scratch.
std::vector<double> three_steps(std::unique_ptr<Ops> ops, const ModelConfig& c, int64_t T,
                                Recompute recompute) {
  const int64_t B = 3;
  TinyModel t(std::move(ops), c, {.B = B, .T = T, .train = true, .recompute = recompute});
  t.set(initial_weights(t.model->params(), 1));
  std::vector<double> seen;
  for (int step = 1; step <= 3; ++step) {
    const RandomRows data(B, T, c.vocab_size, uint64_t(step), /*with_reset=*/step == 3);
    if (step == 2) t.nll(RandomRows(B, T, c.vocab_size, 99).rows());
    Dropout drop;
    drop.p = float(c.dropout);
    drop.step = uint64_t(step);
    seen.push_back(t.loss_and_grad(data.rows(), drop));
    const std::vector<double> grads = t.grads();
    seen.insert(seen.end(), grads.begin(), grads.end());
    CHECK(t.optimizer->step(t.store.weights(), 1e-2, step).ok);
  }
  return seen;
}

}  // namespace

TEST_CASE("lm: recomputation changes no bit", "[model][gpu]") {
  std::vector<std::unique_ptr<Ops> (*)()> backends = {[] { return make_cpu_ops(DType::f64); },
                                                      [] { return make_cpu_ops(DType::f32); }};
  if (cuda_available()) {
    backends.push_back([] { return make_cuda_ops(DType::f32, 0); });
    backends.push_back([] { return make_cuda_ops(DType::bf16, 0); });
  }
  for (const auto open : backends) {
    std::vector<const char*> ways = {"0"};  // HGRN_FUSED_GLU
    if (open()->act_dtype() == DType::bf16) ways.push_back("1");
    for (const bool wikitext : {false, true})
      for (const double dropout : {0.0, 0.2})
        for (const bool wide : {false, true})  // widths that the fast kernels take
          for (const char* const fused : ways) {
            if (wide && open()->act_dtype() == DType::f64) continue;  // it has none
            ModelConfig c = small_config(wikitext);
            c.dropout = dropout;
            if (wide) c.hidden_size = 256, c.expand_ratio = 64, c.intermediate_size = 330;
            const int64_t T = wide ? 100 : 17;
            const EnvSetting setting("HGRN_FUSED_GLU", fused);
            const std::vector<double> kept = three_steps(open(), c, T, Recompute::none);
            CHECK(std::isfinite(kept.back()));
            for (const Recompute recompute : {Recompute::elementwise, Recompute::block}) {
              INFO(open()->describe()
                   << ", wikitext " << wikitext << ", dropout " << dropout << ", wide " << wide
                   << ", fused " << fused << ", recompute " << int(recompute));
              const bool same = three_steps(open(), c, T, recompute) == kept;
              CHECK(same);
            }
          }
  }
}

// 300 rows in slices of 128, 128 and 44: every slice adds to the head's gradient, of which only the
// first one of a step may be fresh.
TEST_CASE("lm: slices of logits change nothing but rounding", "[model]") {
  const int64_t B = 3, T = 100;
  for (const bool tied : {false, true}) {
    INFO("tied " << tied);
    ModelConfig c = small_config(true);
    c.vocab_size = 4099;
    c.tie_word_embeddings = tied;
    const RandomRows data(B, T, c.vocab_size, 31), more(B, T, c.vocab_size, 32);
    std::vector<double> fresh[2], added[2];
    double loss[2], loss_of_both[2];
    for (int i = 0; i < 2; ++i) {
      const EnvSetting setting("HGRN_LOGIT_MIB", i ? "1" : nullptr);
      TinyModel t(make_cpu_ops(DType::f64), c, {.B = B, .T = T, .train = true});
      CHECK(t.model->logit_rows(B * T, /*train=*/true, Recompute::none) == (i ? 128 : B * T));
      t.set(initial_weights(t.model->params(), 1));
      loss[i] = t.loss_and_grad(data.rows());
      fresh[i] = t.grads();
      t.model->forward_backward(more.rows(), 1.0 / double(B * T), {}, t.nll_sum);
      loss_of_both[i] = t.take_loss(more.rows());
      added[i] = t.grads();
    }
    CHECK(std::fabs(loss[0] - loss[1]) < 1e-12);
    CHECK(std::fabs(loss_of_both[0] - loss_of_both[1]) < 1e-12);
    CHECK(vector_error(fresh[1].data(), fresh[0].data(), int64_t(fresh[0].size())) < 1e-12);
    CHECK(vector_error(added[1].data(), added[0].data(), int64_t(added[0].size())) < 1e-12);
    CHECK(vector_error(added[0].data(), fresh[0].data(), int64_t(added[0].size())) > 0.1);
  }
}

TEST_CASE("lm: micro-batches change nothing but rounding, dropout masks included", "[model]") {
  ModelConfig c = small_config(true);
  c.dropout = 0.2;
  const int64_t B = 4, T = 9;
  const RandomRows data(B, T, c.vocab_size, 21);
  std::vector<double> grads[2];
  double loss[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t micro = i ? 1 : B;
    TinyModel t(make_cpu_ops(DType::f64), c, {.B = micro, .T = T, .train = true});
    t.set(initial_weights(t.model->params(), 1));
    for (int64_t b = 0; b < B; b += micro) {
      Dropout drop;
      drop.p = 0.2f;
      drop.row0 = b * T;
      t.model->forward_backward(
          {micro, T, &data.inputs[size_t(b * T)], &data.targets[size_t(b * T)], nullptr},
          1.0 / double(B * T), drop, t.nll_sum);
    }
    grads[i] = t.grads();
    loss[i] = t.take_loss(data.rows());
  }
  CHECK(std::fabs(loss[0] - loss[1]) < 1e-12);
  CHECK(vector_error(grads[0].data(), grads[1].data(), int64_t(grads[0].size())) < 1e-12);
}

TEST_CASE("lm: the first micro-batch of a step overwrites gradients, the others add",
          "[model][gpu]") {
  const int64_t B = 4, T = 9;
  std::vector<std::unique_ptr<Ops> (*)()> backends = {[] { return make_cpu_ops(DType::f64); },
                                                      [] { return make_cpu_ops(DType::f32); }};
  if (cuda_available()) backends.push_back([] { return make_cuda_ops(DType::bf16, 0); });
  for (const auto open : backends)
    for (bool wikitext : {false, true})
      for (bool tied : {false, true})
        for (int64_t micro : {int64_t(1), B})
          for (Recompute recompute : {Recompute::none, Recompute::elementwise, Recompute::block}) {
            INFO("wikitext " << wikitext << ", tied " << tied << ", micro-batch " << micro
                             << ", recompute " << int(recompute));
            ModelConfig c = small_config(wikitext);
            c.tie_word_embeddings = tied;
            const RandomRows data(B, T, c.vocab_size, 21);
            TinyModel t(open(), c, {.B = micro, .T = T, .train = true, .recompute = recompute});
            t.set(initial_weights(t.model->params(), 1));
            std::vector<double> grads[3];
            for (int i = 0; i < 3; ++i) {  // added to zeros; over NaN; over the step before
              if (i == 1) t.poison_grads();
              if (i > 0) t.model->begin_step();
              for (int64_t b = 0; b < B; b += micro)
                t.model->forward_backward(
                    {micro, T, &data.inputs[size_t(b * T)], &data.targets[size_t(b * T)], nullptr},
                    1.0 / double(B * T), {}, t.nll_sum);
              grads[i] = t.grads();
            }
            CHECK(grads[0] == grads[1]);
            CHECK(grads[0] == grads[2]);
            CHECK(std::count(grads[0].begin(), grads[0].end(), 0.0) <
                  std::ptrdiff_t(grads[0].size()));
          }
}

TEST_CASE("lm: recorded micro-batches give the bits of those that are not", "[model][gpu]") {
  const int64_t B = 2, T = 9;
  std::vector<std::unique_ptr<Ops> (*)()> backends = {[] { return make_cpu_ops(DType::f32); }};
  if (cuda_available()) {
    backends.push_back([] { return make_cuda_ops(DType::f32, 0); });
    backends.push_back([] { return make_cuda_ops(DType::bf16, 0); });
  }
  for (const auto open : backends)
    for (float p : {0.0f, 0.25f})
      for (Recompute recompute : {Recompute::none, Recompute::elementwise, Recompute::block}) {
        INFO("dropout " << p << ", recompute " << int(recompute));
        ModelConfig c = small_config(true);
        c.dropout = double(p);
        const LmShape shape = {.B = B, .T = T, .train = true, .recompute = recompute};
        TinyModel plain(open(), c, shape), recorded(open(), c, shape);
        plain.set(initial_weights(plain.model->params(), 1));
        recorded.set(initial_weights(recorded.model->params(), 1));
        std::vector<double> before;
        for (int step = 1; step <= 5; ++step) {  // of three micro-batches
          for (TinyModel* t : {&plain, &recorded}) {
            t->poison_grads();
            t->model->begin_step();
            t->ops->zero(t->nll_sum);
            for (int64_t i = 0; i < 3; ++i) {
              const RandomRows data(B, T, c.vocab_size, uint64_t(10 * step + i), i == 2);
              Dropout drop;
              drop.p = p;
              drop.step = uint64_t(step);
              drop.row0 = i * B * T;
              t->model->forward_backward(data.rows(), 1.0 / double(3 * B * T), drop, t->nll_sum,
                                         t == &recorded);
            }
          }
          const RandomRows any(B, T, c.vocab_size, 1);
          CHECK(plain.take_loss(any.rows()) == recorded.take_loss(any.rows()));
          const std::vector<double> grads = plain.grads();
          CHECK(grads == recorded.grads());
          CHECK(grads != before);  // other tokens, other masks
          before = grads;
          for (TinyModel* t : {&plain, &recorded})
            CHECK(t->optimizer->step(t->store.weights(), 1e-3, step).ok);
          // Another pass in between: its shapes may make temporaries grow.
          CHECK(plain.nll(any.rows()) == recorded.nll(any.rows()));
        }
      }
}

TEST_CASE("lm: a weight that no operation reads has a gradient of zero", "[model]") {
  const ModelConfig c = small_config(false);
  ParamTable table;
  const ParamId a = table.add({.name = "a", .shape = {3}});
  const ParamId b = table.add({.name = "b", .shape = {3}});
  const ParamId both = table.pack({a, b});
  table.finalize();
  GradLedger ledger;
  CHECK_FALSE(ledger.first(table, both));  // no step was begun: everything adds
  ledger.begin_step(table);
  CHECK(ledger.first(table, both));
  CHECK_FALSE(ledger.first(table, both));
  CHECK_FALSE(ledger.first(table, a));
  ledger.begin_step(table);
  CHECK(ledger.first(table, a));
  CHECK_THROWS_AS(ledger.first(table, both), Error);  // half a pack

  // With one layer beta is zero whatever Gamma is; without lower bounds nothing reads it.
  TinyModel t(make_cpu_ops(DType::f32), c, {.B = 1, .T = 4, .train = true});
  t.set(initial_weights(t.model->params(), 1));
  const RandomRows data(1, 4, c.vocab_size, 2);
  t.loss_and_grad(data.rows());
  for (double g : t.grads()) CHECK(std::isfinite(g));
}

TEST_CASE("lm: gradients are complete when their stage is told", "[model]") {
  for (Recompute recompute : {Recompute::none, Recompute::block, Recompute::elementwise})
    for (bool tied : {false, true}) {
      ModelConfig c = small_config(true);
      c.tie_word_embeddings = tied;
      const RandomRows data(2, 7, c.vocab_size, 5);
      TinyModel t(make_cpu_ops(DType::f32), c,
                  {.B = 2, .T = 7, .train = true, .recompute = recompute});
      t.set(initial_weights(t.model->params(), 1));
      std::vector<int> stages;
      std::vector<std::vector<double>> then;
      t.model->set_hooks({{}, [&](int stage) {
                            stages.push_back(stage);
                            then.push_back(t.grads());
                          }});
      t.loss_and_grad(data.rows());
      // The embedding's goes while the first layer's are still made.
      CHECK(stages == std::vector<int>{3, 2, 1, -1, 0});
      const std::vector<double> end = t.grads();
      const std::vector<Param>& params = t.model->params().params();
      for (size_t id = 0; id < params.size(); ++id)
        for (size_t s = 0; s < stages.size(); ++s) {
          if (t.model->stage_of(ParamId(id)) != stages[s]) continue;
          INFO(params[id].name << " at stage " << stages[s]);
          const auto from = params[id].offset, to = from + params[id].stored.numel();
          CHECK(std::equal(end.begin() + from, end.begin() + to, then[s].begin() + from));
        }
    }
}

TEST_CASE("lm: a row in pieces with its state carried equals one pass", "[model]") {
  for (bool wikitext : {false, true}) {
    const ModelConfig c = small_config(wikitext);
    const int64_t B = 2, T = 23;
    const RandomRows data(B, T, c.vocab_size, 3);
    TinyModel whole(make_cpu_ops(DType::f32), c, {.B = B, .T = T});
    whole.set(initial_weights(whole.model->params(), 2));
    const std::vector<float> want = whole.nll(data.rows());

    TinyModel pieces(make_cpu_ops(DType::f32), c, {.B = B, .T = 10, .state = true});
    pieces.set(initial_weights(pieces.model->params(), 2));
    std::vector<float> got(want.size());
    int64_t at = 0;
    for (int64_t n : {10, 1, 1, 8, 3}) {  // single tokens go through the decoding step
      std::vector<int32_t> in, out;
      for (int64_t b = 0; b < B; ++b)
        for (int64_t i = at; i < at + n; ++i) {
          in.push_back(data.inputs[size_t(b * T + i)]);
          out.push_back(data.targets[size_t(b * T + i)]);
        }
      const std::vector<float> part = pieces.nll({B, n, in.data(), out.data(), nullptr});
      for (int64_t b = 0; b < B; ++b)
        for (int64_t i = 0; i < n; ++i) got[size_t(b * T + at + i)] = part[size_t(b * n + i)];
      at += n;
    }
    REQUIRE(at == T);
    CHECK(vector_error(got.data(), want.data(), B * T) < 1e-5);
  }
}

TEST_CASE("lm: the last row's logits are those of the whole pass", "[model]") {
  const ModelConfig c = small_config(false);
  const RandomRows data(2, 6, c.vocab_size, 13);
  TinyModel t(make_cpu_ops(DType::f32), c, {.B = 2, .T = 6});
  t.set(initial_weights(t.model->params(), 2));
  const Tensor logits = t.model->forward_last_logits(data.rows());
  const int64_t Vp = logits.cols();  // the vocabulary may be padded in memory
  std::vector<float> last(size_t(2 * Vp)), whole(size_t(12 * Vp));
  t.ops->download(last.data(), logits);
  t.ops->download(whole.data(), t.model->logits(0, 12));
  for (int64_t b = 0; b < 2; ++b)
    CHECK(vector_error(&last[size_t(b * Vp)], &whole[size_t((b * 6 + 5) * Vp)], c.vocab_size) <
          1e-6);
}

TEST_CASE("lm: initial weights have the stated spread and depend on name and seed alone",
          "[model]") {
  ModelConfig c = small_config(false);
  c.hidden_size = 64;
  c.vocab_size = 500;
  const auto ops = make_cpu_ops(DType::f32);
  const LanguageModel model(*ops, c);
  const std::vector<float> a = initial_weights(model.params(), 1);
  const std::vector<float> b = initial_weights(model.params(), 1);
  const std::vector<float> other = initial_weights(model.params(), 2);
  CHECK(a == b);
  CHECK(a != other);
  auto spread = [](const std::vector<float>& w, const Param& p) {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < p.shape.numel(); ++i) {
      mean += w[size_t(p.at(i))];
      square += double(w[size_t(p.at(i))]) * double(w[size_t(p.at(i))]);
    }
    const double n = double(p.shape.numel());
    return std::pair(mean / n, std::sqrt(square / n));
  };
  const Param& embedding = model.params().params()[0];
  CHECK(embedding.name == "model.embeddings.weight");
  CHECK(std::fabs(spread(a, embedding).first) < 5e-4);
  CHECK(spread(a, embedding).second == Approx(0.02).epsilon(0.02));

  ModelConfig fairseq = small_config(true);
  fairseq.hidden_size = 64;
  fairseq.vocab_size = 500;
  const LanguageModel wiki(*ops, fairseq);
  const std::vector<float> w = initial_weights(wiki.params(), 1);
  CHECK(spread(w, wiki.params().params()[0]).second == Approx(1.0 / 8).epsilon(0.02));
  const ParamId down = wiki.params().find("model.layers.0.mlp.down_proj.weight");
  const Param& p = wiki.params().params()[size_t(down)];
  const double bound = 1 / std::sqrt(double(fairseq.intermediate_size));
  CHECK(spread(w, p).second == Approx(bound / std::sqrt(3.0)).epsilon(0.05));
  const ParamId gamma = wiki.params().find("model.lower_bounds");
  CHECK(w[size_t(wiki.params().params()[size_t(gamma)].offset)] == 1.0f);
}

// Numbers are drawn four at a time: neither rows that are padded in memory nor the four may show.
TEST_CASE("lm: initial weights do not depend on padding, and neighbours are independent",
          "[model]") {
  const auto weight = [](Init init, Shape stored) {
    ParamTable table;
    table.add({.name = "w", .shape = {301, 77}, .init = init, .init_scale = 1, .stored = stored});
    table.finalize();
    const std::vector<float> flat = initial_weights(table, 1);
    std::vector<float> dense(301 * 77);
    gather(dense.data(), flat.data(), table.params()[0], 0, int64_t(dense.size()));
    return std::pair(flat, dense);
  };
  for (const Init init : {Init::normal, Init::uniform}) {
    const std::vector<float> w = weight(init, {}).second;
    const auto [flat, dense] = weight(init, {304, 80});
    CHECK(dense == w);
    float padding = 0;
    for (size_t i = 0; i < flat.size(); ++i)
      if (i % 80 >= 77 || i / 80 >= 301) padding += std::fabs(flat[i]);
    CHECK(padding == 0);
    for (size_t lag = 1; lag <= 5; ++lag) {
      double product = 0, squares = 0;
      for (size_t i = 0; i + lag < w.size(); ++i) {
        product += double(w[i]) * double(w[i + lag]);
        squares += double(w[i]) * double(w[i]) * double(w[i + lag]) * double(w[i + lag]);
      }
      CHECK(std::fabs(product) < 4 * std::sqrt(double(w.size())));
      // E[a^2 b^2] = 1 for independent normals, 1/9 for uniforms.
      CHECK(squares / double(w.size()) == Approx(init == Init::normal ? 1 : 1.0 / 9).epsilon(0.06));
    }
  }
}

TEST_CASE("lm: a NaN weight is seen before anything is updated", "[model]") {
  const ModelConfig c = small_config(false);
  const RandomRows data(2, 5, c.vocab_size, 1);
  TinyModel t(make_cpu_ops(DType::f32), c, {.B = 2, .T = 5, .train = true});
  std::vector<float> w = initial_weights(t.model->params(), 1);
  const ParamId id = t.model->params().find("model.layers.1.mlp.down_proj.weight");
  w[size_t(t.model->params().params()[size_t(id)].offset)] = NAN;
  t.set(w);
  const std::vector<float> before = t.store.get(*t.ops);
  t.loss_and_grad(data.rows());
  const StepVerdict v = t.optimizer->step(t.store.weights(), 1e-3, 1);
  CHECK_FALSE(v.ok);
  const std::vector<float> after = t.store.get(*t.ops);
  CHECK(std::memcmp(before.data(), after.data(), before.size() * sizeof(float)) == 0);
}
