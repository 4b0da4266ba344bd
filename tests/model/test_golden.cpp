// The whole model against float64 results of an independent PyTorch reference
// (tests/golden/README.md): loss, logits, every gradient, ten AdamW steps, states and resets.
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "catch.h"
#include "core/file.h"
#include "model/safetensors.h"
#include "model/tiny_model.h"
#include "text/shard.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

struct Golden {
  std::string dir;
  nlohmann::json j;
  int64_t B, T;
  std::vector<int32_t> stream, inputs, targets;
  ModelConfig config;
  SafetensorsReader tensors;

  explicit Golden(const std::string& d)
      : dir(d),
        j(nlohmann::json::parse(read_file(d + "/golden.json", 1 << 20))),
        B(j["B"]),
        T(j["T"]),
        config(read_hf_config(d)),
        tensors(d + "/golden.safetensors") {
    const Shard shard(d + "/stream.bin");
    REQUIRE(shard.count() == B * T + 1);
    stream.resize(size_t(shard.count()));
    shard.read(0, shard.count(), stream.data(), config.vocab_size);
    inputs.assign(stream.begin(), stream.end() - 1);
    targets.assign(stream.begin() + 1, stream.end());
  }
  TokenRows rows() const { return {B, T, inputs.data(), targets.data(), nullptr}; }
  std::vector<double> tensor(const std::string& name) const {
    const TensorInfo* info = tensors.find(name);
    REQUIRE(info != nullptr);
    std::vector<double> out(size_t(info->shape.numel()));
    tensors.read_f64(*info, out.data());
    return out;
  }
  OptimConfig optim() const {
    const auto& a = j["adamw"];
    OptimConfig o;
    o.lr = a["lr"];
    o.betas[0] = a["betas"][0];
    o.betas[1] = a["betas"][1];
    o.eps = a["eps"];
    o.weight_decay = a["weight_decay"];
    o.clip_norm = a["clip"];
    return o;
  }
  std::vector<float> weights(const ParamTable& table) const {
    std::vector<float> master(size_t(table.total()), 0.0f);
    load_weights(dir, table, master.data());
    return master;
  }
};

std::vector<double> logits_of(TinyModel& t, int64_t N) {
  const int64_t V = t.model->config().vocab_size;
  std::vector<double> out;
  for (int64_t at = 0; at < N; ++at) {
    const Tensor l = t.model->logits(at, 1);
    if (l.dtype == DType::f64) {
      std::vector<double> row(size_t(l.numel()));
      t.ops->download(row.data(), l);
      out.insert(out.end(), row.begin(), row.begin() + V);
    } else if (l.dtype == DType::bf16) {
      std::vector<uint16_t> row(size_t(l.numel()));
      t.ops->download(row.data(), l);
      for (int64_t v = 0; v < V; ++v) out.push_back(double(bf16_to_float(row[size_t(v)])));
    } else {
      std::vector<float> row(size_t(l.numel()));
      t.ops->download(row.data(), l);
      out.insert(out.end(), row.begin(), row.begin() + V);
    }
  }
  return out;
}

// Tolerances: f64 differs from the reference by the F32 rounding of the stored results and of the
// scalars that Ops takes as float (6e-8 each); f32 by its own rounding through the model's depth.
using Open = std::function<std::unique_ptr<Ops>()>;
Open cpu(DType dtype) {
  return [dtype] { return make_cpu_ops(dtype); };
}
Open cuda(DType dtype) {
  return [dtype] { return make_cuda_ops(dtype, 0); };
}

void check_golden(const std::string& dir, const Open& open, double tol_loss, double tol_grad,
                  Recompute recompute = Recompute::none) {
  const Golden g(dir);
  TinyModel t(open(), g.config, {.B = g.B, .T = g.T, .train = true, .recompute = recompute},
              g.optim());
  t.set(g.weights(t.model->params()));

  const std::vector<float> nll = t.nll(g.rows());
  const std::vector<double> want_nll = g.tensor("nll"), want_logits = g.tensor("logits");
  CHECK(vector_error(nll.data(), want_nll.data(), g.B * g.T) < tol_grad);
  CHECK(vector_error(logits_of(t, g.B * g.T).data(), want_logits.data(),
                     int64_t(want_logits.size())) < tol_grad);

  const double loss = t.loss_and_grad(g.rows());
  CHECK(std::fabs(loss - g.j["loss"].get<double>()) < tol_loss);
  const std::vector<double> grads = t.grads();
  int64_t compared = 0;
  for (const Param& p : t.model->params().params()) {
    const std::vector<double> want = g.tensor("grad." + p.name);
    REQUIRE(int64_t(want.size()) == p.shape.numel());
    INFO(p.name);
    std::vector<double> got;
    for (int64_t i = 0; i < p.shape.numel(); ++i) got.push_back(grads[size_t(p.at(i))]);
    CHECK(vector_error(got.data(), want.data(), p.shape.numel()) < tol_grad);
    compared += p.shape.numel();
  }
  CHECK(compared == t.model->params().count());
}

void check_adamw(const std::string& dir, const Open& open, double tol) {
  const Golden g(dir);
  TinyModel t(open(), g.config, {.B = g.B, .T = g.T, .train = true}, g.optim());
  t.set(g.weights(t.model->params()));
  const std::vector<double> losses = g.j["adamw_losses"], norms = g.j["adamw_grad_norms"];
  REQUIRE(losses.size() == 10);
  for (size_t i = 0; i < losses.size(); ++i) {
    const double loss = t.loss_and_grad(g.rows());
    const StepVerdict v = t.optimizer->step(t.store.weights(), g.optim().lr, int64_t(i) + 1);
    INFO("step " << i);
    CHECK(v.ok);
    CHECK(std::fabs(loss - losses[i]) < tol);
    CHECK(std::fabs(v.grad_norm - norms[i]) / norms[i] < tol);
  }
}

const std::string kOwn = HGRN_SOURCE_DIR "/tests/golden/";

}  // namespace

TEST_CASE("golden: loss, logits and gradients of both parameterisations", "[model][golden]") {
  for (const char* name : {"llm", "wikitext"}) {
    INFO(name);
    check_golden(kOwn + name, cpu(DType::f64), 1e-7, 3e-7);
    check_golden(kOwn + name, cpu(DType::f32), 1e-5, 1e-4);
  }
}

TEST_CASE("golden: recomputation gives the same gradients", "[model][golden]") {
  for (const Recompute recompute : {Recompute::elementwise, Recompute::block}) {
    check_golden(kOwn + "llm", cpu(DType::f64), 1e-7, 3e-7, recompute);
    check_golden(kOwn + "wikitext", cpu(DType::f32), 1e-5, 1e-4, recompute);
  }
}

TEST_CASE("golden: ten AdamW steps", "[model][golden]") {
  for (const char* name : {"llm", "wikitext"}) {
    INFO(name);
    check_adamw(kOwn + name, cpu(DType::f64), 1e-7);
    check_adamw(kOwn + name, cpu(DType::f32), 1e-4);
  }
}

TEST_CASE("golden: an fla checkpoint of the shared set", "[model][golden]") {
  const std::string dir = shared_dir() + "/golden/tiny-a";
  if (!exists(dir + "/golden.json")) {
    WARN("skipped: " << dir << " is not here (set HGRN_SHARED to the folder that holds golden/)");
    return;
  }
  check_golden(dir, cpu(DType::f32), 1e-5, 1e-4);
  check_adamw(dir, cpu(DType::f32), 1e-4);
  check_golden(dir, cpu(DType::f64), 1e-7, 1e-6);
}

TEST_CASE("golden: given states, resets inside rows, final states", "[model][golden]") {
  const Golden g(kOwn + "state");
  REQUIRE(g.config.eos_token_id == 2);
  std::vector<uint8_t> reset;
  for (int32_t token : g.inputs) reset.push_back(token == 2);
  TinyModel t(make_cpu_ops(DType::f64), g.config, {.B = g.B, .T = g.T, .state = true});
  t.set(g.weights(t.model->params()));
  const std::vector<double> h0 = g.tensor("h0"), want_hT = g.tensor("hT");
  REQUIRE(int64_t(h0.size()) == t.model->state().numel());
  t.ops->upload(t.model->state(), h0.data());

  TokenRows rows = g.rows();
  rows.reset = reset.data();
  const std::vector<float> nll = t.nll(rows);
  const std::vector<double> want_nll = g.tensor("nll"), want_logits = g.tensor("logits");
  CHECK(vector_error(nll.data(), want_nll.data(), g.B * g.T) < 3e-7);
  CHECK(vector_error(logits_of(t, g.B * g.T).data(), want_logits.data(),
                     int64_t(want_logits.size())) < 3e-7);
  std::vector<double> hT(h0.size());
  t.ops->download(hT.data(), t.model->state());
  CHECK(vector_error(hT.data(), want_hT.data(), int64_t(hT.size())) < 3e-7);
}

TEST_CASE("golden: the same on a GPU", "[model][golden][gpu]") {
  if (!cuda_available()) {
    WARN("skipped: no GPU is visible, or this build has no CUDA");
    return;
  }
  std::vector<std::string> dirs = {kOwn + "llm", kOwn + "wikitext"};
  if (exists(shared_dir() + "/golden/tiny-a/golden.json"))
    dirs.push_back(shared_dir() + "/golden/tiny-a");
  for (const std::string& dir : dirs) {
    INFO(dir);
    check_golden(dir, cuda(DType::f32), 1e-4, 1e-4);
    for (const Recompute recompute : {Recompute::elementwise, Recompute::block})
      check_golden(dir, cuda(DType::f32), 1e-4, 1e-4, recompute);
    check_adamw(dir, cuda(DType::f32), 1e-4);
    // bf16 weights and activations: 2^-9 a rounding, through the depth of the model. `llm` is too
    // ill-conditioned for gradients in bf16: rounding its weights alone, all else in double, moves
    // one of them by 27 % (1.5 % for `wikitext`, 1.0 % for the fla checkpoint). Its losses hold.
    if (dir != kOwn + "llm") check_golden(dir, cuda(DType::bf16), 1e-2, 2.5e-2);
    check_adamw(dir, cuda(DType::bf16), 2e-2);
  }
}
