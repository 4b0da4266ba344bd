// Opens a checkpoint, scores a text, follows its state token by token, goes on from it two ways.
// usage: hgrn_example CHECKPOINT TEXT
#include <hgrn/hgrn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string_view>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: hgrn_example CHECKPOINT TEXT\n");
    return 2;
  }
  try {
    hgrn::api::Model model(argv[1]);
    std::printf("hgrn %s, %s\n", hgrn::api::version().c_str(), model.device().c_str());
    std::printf("%lld parameters, step %lld\n", static_cast<long long>(model.parameters()),
                static_cast<long long>(model.step()));

    const std::vector<int32_t> tokens = model.encode(argv[2]);
    double nll = 0;
    for (float logp : model.score(tokens)) nll -= logp;
    std::printf("nll %.6f over %zu tokens\n", nll, tokens.size());

    // The same number a token at a time: the state is all that is kept of the past.
    hgrn::api::State state(model);
    std::vector<float> logits = state.step(model.end_of_text());
    double stepped = 0;
    for (const int32_t token : tokens) {
      double most = -INFINITY, sum = 0;
      for (float x : logits) most = std::max(most, double(x));
      for (float x : logits) sum += std::exp(double(x) - most);
      stepped -= double(logits[size_t(token)]) - most - std::log(sum);
      logits = state.step(token);
    }
    std::printf("nll %.6f by steps, state of %zu bytes\n", stepped, state.bytes());
    if (std::fabs(stepped - nll) > 1e-3 * (1 + nll)) return 1;

    std::printf("%s", argv[2]);
    model.generate(argv[2], {.tokens = 40, .temperature = 0.8f, .seed = 1},
                   [](std::string_view piece) {
                     std::fwrite(piece.data(), 1, piece.size(), stdout);
                     return true;
                   });
    std::printf("\n");
    return 0;
  } catch (const hgrn::api::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return e.code();
  }
}
