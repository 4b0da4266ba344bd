// The mean forget gate that monitoring shows, against its formula.
#include <cmath>

#include "catch.h"
#include "tiny_model.h"

using namespace hgrn;
using namespace hgrn::test;

// With matrices of zero the projections are the biases, the same for every token: q, f and i get
// different ones, so that only the gate's can give the answer.
TEST_CASE("forget gate: the mean is that of beta + (1 - beta) sigmoid(f)", "[model]") {
  ModelConfig c = small_config(/*wikitext=*/true);
  for (const Recompute recompute : {Recompute::none, Recompute::elementwise, Recompute::block})
    for (const DType dtype : {DType::f32, DType::f64}) {
      const LmShape shape{.B = 3, .T = 50, .train = true, .recompute = recompute};
      TinyModel m(make_cpu_ops(dtype), c, shape);
      const ParamTable& table = m.model->params();
      std::vector<float> master(size_t(table.total()), 0.0f);
      const auto put = [&](const std::string& name, int64_t i, double v) {
        const ParamId id = table.find(name);
        REQUIRE(id != kNoParam);
        master[size_t(table.params()[size_t(id)].at(i))] = float(v);
      };
      const int64_t D = c.hidden_size;
      const auto f = [](int64_t layer, int64_t d) { return 0.5 * double(layer) - 0.2 * double(d); };
      for (int64_t l = 0; l < 3; ++l)
        for (int64_t d = 0; d < D; ++d) {
          const std::string attn = "model.layers." + std::to_string(l) + ".attn.";
          put(attn + "q_proj.bias", d, 4);
          put(attn + "f_proj.bias", d, f(l, d));
          put(attn + "i_proj.bias", d, -4);
        }
      m.set(master);

      std::vector<double> seen(3, -1);
      m.model->set_hooks({nullptr, [&](int stage) {
                            if (stage >= 0 && stage < 3)
                              seen[size_t(stage)] = m.model->mean_forget_gate(stage);
                          }});
      const RandomRows rows(3, 50, c.vocab_size, 1);
      m.loss_and_grad(rows.rows());
      for (int64_t l = 0; l < 3; ++l) {
        const double beta = double(l) / 3;  // Gamma is zero: a third a layer, less the first
        double mean = 0;
        for (int64_t d = 0; d < D; ++d)
          mean += (beta + (1 - beta) / (1 + std::exp(-f(l, d)))) / double(D);
        CHECK(seen[size_t(l)] == Approx(mean).epsilon(1e-6));
      }
    }
}
