// The mixers room: the registry, the lower bounds, and what a mixer promises about its weights and
// its state. Gradients through the whole mixer: tests/model/test_lm.cpp.
#include "catch.h"
#include "mixers/lower_bound.h"
#include "mixers/mixer.h"

using namespace hgrn;

namespace {

MixerConfig small() {
  MixerConfig c;
  c.D = 12;
  c.L = 4;
  c.n = 4;
  return c;
}

// Weights of one flat buffer on the CPU in double.
struct Store {
  std::unique_ptr<Ops> ops = make_cpu_ops(DType::f64);
  ParamTable table;
  std::vector<void*> blocks;
  Weights weights;

  ~Store() {
    for (void* p : blocks) ops->free(p);
  }
  Tensor buffer(Shape shape) {
    Tensor t(nullptr, DType::f64, shape);
    t.data = ops->alloc(t.bytes(), "a test");
    blocks.push_back(t.data);
    ops->zero(t);
    return t;
  }
  void finish() {
    table.finalize();
    weights.table = &table;
    weights.master = weights.compute = buffer({table.total()});
    weights.grad = buffer({table.total()});
  }
  void bind(Arena& arena) { arena.bind(blocks.emplace_back(ops->alloc(arena.peak(), "a test"))); }
};

}  // namespace

TEST_CASE("mixers: the registry knows its names and refuses others with the list", "[mixers]") {
  const auto ops = make_cpu_ops(DType::f32);
  for (const std::string& name : mixer_names()) CHECK(make_mixer(name, *ops, small()) != nullptr);
  try {
    make_mixer("no-such", *ops, small());
    FAIL("no error");
  } catch (const Error& e) {
    CHECK(int(e.code()) == int(Exit::usage));
    for (const std::string& name : mixer_names())
      CHECK(std::string(e.what()).find(name) != std::string::npos);
  }
}

TEST_CASE("mixers: lower bounds start at zero, rise with depth and stay below one", "[mixers]") {
  Store s;
  LowerBound bound(*s.ops, small());
  bound.add_params(s.table);
  s.finish();
  Arena arena("test");
  bound.take(arena);
  s.bind(arena);
  bound.take(arena);
  double* gamma = s.weights.w(s.table.find("model.lower_bounds")).ptr<double>();
  for (int i = 0; i < 4 * 12; ++i) gamma[i] = double(philox(1, 0, uint64_t(i)).v[0] % 1000) / 500;
  bound.begin_forward(s.weights);
  for (int d = 0; d < 12; ++d) {
    double before = 0;
    CHECK(bound.beta(0).ptr<double>()[d] == 0);
    for (int l = 1; l < 4; ++l) {
      const double b = bound.beta(l).ptr<double>()[d];
      CHECK(b > before);
      CHECK(b < 1);
      before = b;
    }
  }
}

TEST_CASE("mixers: without lower bounds there is neither a weight nor a bound", "[mixers]") {
  Store s;
  MixerConfig c = small();
  c.use_lower_bound = false;
  LowerBound bound(*s.ops, c);
  bound.add_params(s.table);
  CHECK(s.table.params().empty());
  CHECK_FALSE(bound.beta(0));
}

TEST_CASE("mixers: hgru2 names its weights as fla does, with biases where asked", "[mixers]") {
  for (bool wikitext : {false, true}) {
    const auto ops = make_cpu_ops(DType::f32);
    MixerConfig c = small();
    c.bias = wikitext;
    c.norm = wikitext ? Norm::layer : Norm::rms;
    const auto mixer = make_mixer("hgru2", *ops, c);
    ParamTable table;
    mixer->add_layer_params(table, "model.layers.0.", 0);
    const std::string prefix = "model.layers.0.attn.";
    for (const char* name : {"q_proj", "f_proj", "i_proj", "o_proj", "g_norm"}) {
      CHECK(table.find(prefix + name + ".weight") != kNoParam);
      CHECK((table.find(prefix + name + ".bias") != kNoParam) == wikitext);
    }
    CHECK(table.params().size() == (wikitext ? 10u : 5u));
    CHECK(mixer->state_shape(3) == Shape{3, 3, 4, 4});
  }
}
