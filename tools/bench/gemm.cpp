// The matrix products of a training step, each by many algorithms of the backend's library.
#include <algorithm>

#include "bench.h"

namespace hgrn::bench {

double ProductTime::tflops(const ProductTrial& t) const {
  return 2.0 * double(product.N) * double(product.I) * double(product.O) / t.us / 1e6;
}

const ProductTrial& ProductTime::best() const {
  return *std::min_element(trials.begin(), trials.end(),
                           [](const auto& a, const auto& b) { return a.us < b.us; });
}

const ProductTrial& ProductTime::chosen() const {
  return *std::find_if(trials.begin(), trials.end(), [](const auto& t) { return t.chosen; });
}

void time_products(Ops& ops, const Config& config, const ProductTrials& what,
                   const std::function<void(const ProductTime&)>& timed) {
  const ModelConfig& m = config.model;
  const int64_t N = config.train.micro_batch * config.data.seq_len, D = m.hidden_size;
  const int64_t F = Block::stored_width(ops, m), L = m.num_hidden_layers;
  const int64_t multiple = ops.vocab_multiple();
  const int64_t V = (m.vocab_size + multiple - 1) / multiple * multiple;
  const LanguageModel model(ops, m);
  const int64_t rows = model.logit_rows(N, /*train=*/true, config.train.recompute);
  struct Layer {
    const char* name;
    int64_t N, I, O, calls;
    bool adds, slices;
  };
  const bool stream = m.dropout == 0;  // the product adds the residual stream
  for (const Layer& l :
       {Layer{"q,f,i", N, D, 3 * D, L, false, false}, Layer{"out", N, D, D, L, stream, false},
        Layer{"gate,up", N, D, 2 * F, L, false, false}, Layer{"down", N, F, D, L, stream, false},
        Layer{"logits", rows, D, V, (N + rows - 1) / rows, false, true}})
    for (const auto& [kind, name, add] :
         {std::tuple{Product::Kind::forward, "forward", l.adds},
          std::tuple{Product::Kind::input_gradient, "input gradient", false},
          std::tuple{Product::Kind::weight_gradient, "weight gradient", l.slices}}) {
      ProductTime t;
      t.name = fmt::format("{} {}", l.name, name);
      t.product = {kind, l.N, l.I, l.O, add};
      t.calls = l.calls;
      t.trials = ops.time_product(t.product, what);
      check(!t.trials.empty(), Exit::usage,
            "{}: there is one way to do a product; use --device cuda", ops.describe());
      timed(t);
    }
}

}  // namespace hgrn::bench
