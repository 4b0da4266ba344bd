#include <nlohmann/json.hpp>
#include <string>

#include "catch.h"
#include "model/lm.h"
#include "model/plan.h"
#include "model/weights.h"
#include "ops/plan_ops.h"
#include "temp_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

const std::string kConfigs = std::string(HGRN_SOURCE_DIR) + "/configs/";

Config config_of(const std::string& name, const std::vector<std::string>& set = {}) {
  return load_config(kConfigs + name, set);
}

}  // namespace

TEST_CASE("plan: the roofline's products are the model's", "[model]") {
  for (const char* name : {"hgrn2_150m.json", "hgrn2_2.9b.json"}) {
    const Config c = config_of(name);
    double flops = 0;
    for (const StepPart& p : step_parts(c, 2))
      if (p.product) flops += p.forward + p.backward;
    const auto ops = make_plan_ops(DType::bf16, false);
    const LanguageModel model(*ops, c.model);
    const double recurrence = 3.0 * double(c.model.num_hidden_layers) * 4 *
                              double(c.model.hidden_size * c.model.expand_ratio);
    CHECK(flops == Approx(model.flops_per_token() - recurrence).epsilon(1e-9));
  }
}

TEST_CASE("plan: a bf16 weight takes 16 bytes, with ZeRO-1 six and its share of ten", "[model]") {
  const Config c = config_of("hgrn2_1b.json");
  for (int64_t gpus : {1, 8}) {
    const Plan p = make_plan(c, {.gpus = gpus});
    double shared = 0, whole = 0;
    for (const auto& [name, bytes] : p.memory.rows) {
      const auto is = [&, row = name](const char* start) { return row.rfind(start, 0) == 0; };
      if (is(kLowerHalves) || is("optimizer moments")) shared += double(bytes);
      if (is("compute weights") || is("gradients") || is("weights read in fp32"))
        whole += double(bytes);
    }
    CHECK(shared == Approx(10.0 * double(p.total_parameters) / double(gpus)).epsilon(2e-3));
    CHECK(whole == Approx(6.0 * double(p.total_parameters)).epsilon(2e-3));
  }
}

TEST_CASE("plan: time falls with better cards and grows with recomputation", "[model]") {
  const Config c = config_of("hgrn2_1b.json");
  const Plan p = make_plan(c, {.gpus = 8, .tokens = 100e9, .price = 2.5});
  REQUIRE(p.rooflines.size() == 3);
  CHECK(p.rooflines[1].tokens_per_s > p.rooflines[0].tokens_per_s);
  CHECK(p.rooflines[0].tokens_per_s > 2 * p.rooflines[2].tokens_per_s);
  for (const Roofline& r : p.rooflines) {
    CHECK(r.expected < p.options.share * r.tokens_per_s * 1.01);
    CHECK(r.mfu > 0.3);
    CHECK(r.mfu < 0.8);
  }
  CHECK(p.hours * 3600 * p.rooflines[0].expected == Approx(100e9).epsilon(1e-9));

  REQUIRE(p.savings.size() == 6);  // none, elementwise and block, each with ZeRO 0 and 1
  CHECK(p.savings[1].configured);
  for (size_t i : {1, 3, 5}) CHECK(p.savings[i].peak < p.savings[i - 1].peak);
  for (size_t i : {2, 3, 4, 5}) {
    CHECK(p.savings[i].peak < p.savings[i - 2].peak);
    CHECK(p.savings[i].tokens_per_s < p.savings[i - 2].tokens_per_s);
    CHECK(p.savings[i].largest > p.savings[i - 2].largest);
  }
  CHECK(p.savings[2].tokens_per_s > 0.98 * p.savings[0].tokens_per_s);
  CHECK(p.savings[4].tokens_per_s < 0.85 * p.savings[0].tokens_per_s);
  CHECK(p.savings[1].peak == p.memory.peak);
  CHECK(p.largest_micro_batch == p.savings[1].largest);

  // What is known of the cards are bf16's rates.
  const Plan exact = make_plan(config_of("hgrn2_1b.json", {"train.precision=fp32"}), {});
  CHECK(exact.rooflines.empty());
  CHECK(exact.scaling.empty());
  CHECK(exact.hours == 0);
  CHECK(exact.memory.peak > p.memory.peak);
  CHECK(plan_text(exact).find("--tflops") != std::string::npos);

  const Plan given = make_plan(c, {.tflops = 798, .bandwidth_gbs = 3000});
  REQUIRE(given.rooflines.size() == 1);
  CHECK(given.rooflines[0].tokens_per_s * 8 == Approx(p.rooflines[0].tokens_per_s).epsilon(0.02));
}

TEST_CASE("plan: the activations are those that a model lays out", "[model]") {
  for (const char* recompute : {"none", "elementwise", "block"})
    for (const char* dropout : {"0", "0.1"}) {
      INFO(recompute << ", dropout " << dropout);
      const Config c =
          config_of("wikitext103_44m.json", {std::string("train.recompute=") + recompute,
                                             std::string("model.dropout=") + dropout,
                                             "train.micro_batch=2", "model.num_hidden_layers=4"});
      const LmShape shape = {
          .B = 2, .T = c.data.seq_len, .train = true, .recompute = c.train.recompute};
      const auto cpu = make_cpu_ops(DType::f32), plan = make_plan_ops(DType::f32, /*cpu=*/true);
      Arena taken("taken"), planned("planned");
      LanguageModel(*cpu, c.model).layout(taken, shape);
      LanguageModel(*plan, c.model).layout(planned, shape);
      CHECK(taken.peak() == planned.peak());
      const double N = double(shape.B * shape.T), D = double(c.model.hidden_size);
      double kept = 0;  // of what `elementwise` does not keep: the final norm's output remains
      for (const Arena::Row& row : planned.rows())
        if (row.name == "normed inputs" || row.name == "mixer normed output" ||
            row.name == "GLU hidden")
          kept += double(row.bytes);
      if (c.train.recompute == Recompute::elementwise) CHECK(kept == 4 * N * D);
      if (c.train.recompute == Recompute::none)
        CHECK(kept == 4 * N * (D + 4 * (3 * D + double(Block::stored_width(*cpu, c.model)))));
    }
}

TEST_CASE("plan: communication of 1 to 512 GPUs", "[model]") {
  const Config c = config_of("hgrn2_150m.json");
  const double P = 144'812'544;
  const Plan p = make_plan(c, {});
  REQUIRE(p.scaling.size() == 10);
  CHECK(p.scaling.front().step.bytes == 0);
  CHECK(p.scaling.front().step.efficiency == 1);
  for (size_t i = 1; i < p.scaling.size(); ++i) {
    const ClusterStep &s = p.scaling[i].step, &before = p.scaling[i - 1].step;
    const double G = double(s.gpus);
    CHECK(s.gpus == 2 * before.gpus);
    CHECK(s.sequences % (s.gpus * c.train.micro_batch) == 0);
    CHECK(s.sequences >= c.train.global_batch);
    // ZeRO-1: fp32 gradients are scattered, bf16 weights gathered.
    CHECK(s.bytes == Approx((4 * P + 2 * P) * (G - 1) / G).epsilon(1e-9));
    CHECK(s.tokens_per_s > before.tokens_per_s);
    CHECK(s.efficiency < before.efficiency);
    CHECK(s.exposed_s <= s.collective_s);
    CHECK((s.network_s > 0) == (s.gpus > 8));
    CHECK(p.scaling[i].peak < p.scaling[i - 1].peak);
  }
  Config plain = c;
  plain.train.zero = 0;
  plain.train.reduce_dtype = ReduceDType::bf16;
  const ClusterStep s = make_plan(plain, {}).scaling[3].step;  // 8 GPUs: an all-reduce
  CHECK(s.bytes == Approx(2 * 2 * P * 7 / 8).epsilon(1e-9));
  PlanOptions slow;
  slow.network.network_gbs = 5;
  CHECK(make_plan(c, slow).scaling[6].step.efficiency < 0.8 * p.scaling[6].step.efficiency);
}

TEST_CASE("plan: as JSON, and its errors", "[model]") {
  const Config c = config_of("hgrn2_150m.json");
  const auto j = nlohmann::json::parse(
      plan_json(make_plan(c, {.gpus = 2, .card = "H200", .tokens = 1e9, .price = 3})));
  CHECK(j["parameters"]["total"] == 144'812'544);
  CHECK(j["memory"]["peak_bytes"] == planned_bytes(c, {.gpus = 2}));
  CHECK(j["assumptions"]["card"] == "H200");
  CHECK(j["budget"]["cost"].get<double>() ==
        Approx(3 * j["budget"]["gpu_hours"].get<double>()).epsilon(1e-12));
  CHECK(j["scaling"].size() == 10);
  CHECK(thrown_by([&] { make_plan(c, {.card = "B200"}); }).has("H100, H200, A100"));
  CHECK(thrown_by([&] { make_plan(c, {.tflops = 3}); }).code == Exit::usage);
  CHECK(thrown_by([&] { make_plan(c, {.card = "H100", .tflops = 3, .bandwidth_gbs = 1}); }).code ==
        Exit::usage);
  CHECK(parse_tokens("100B") == 100e9);
  CHECK(parse_tokens("1.5t") == 1.5e12);
  CHECK(parse_tokens("3e9") == 3e9);
  CHECK(parse_tokens("250M") == 250e6);
  for (const char* bad : {"", "B", "12X", "-3", "nan", "1BB"})
    CHECK(thrown_by([&] { parse_tokens(bad); }).code == Exit::usage);
}
