// hgrn-bench: times single operations, whole training steps, the algorithms of matrix products and
// generation, one line each, and what communication costs the steps of several ranks.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <tuple>

#include "bench.h"
#include "core/file.h"
#include "core/log.h"
#include "core/thread_wait.h"
#include "launch/rank_env.h"
#include "model/plan.h"
#include "train/ranks.h"

namespace hgrn::bench {
namespace {

struct Args {
  std::string config, only, json;
  std::vector<std::string> overrides;
  Device device = Device::automatic;
  int64_t micro_batch = 0;
  int steps = 20;
  ProductTrials trials;
  int64_t micro_batches = 1;
  int64_t tokens = 1000, batch = 1, prompt = 128;
  std::vector<int64_t> global_batch, zero = {0, 1};
};

const Card* card_of(const Ops& ops) {
  for (const Card& c : cards())
    if (ops.describe().find(c.name) != std::string::npos) return &c;
  return nullptr;
}

void run_ops(Ops& ops, const Config& config, const Args& a) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  const Card* const card = card_of(ops);
  std::printf("%-26s %-24s %12s %9s %9s %9s %9s\n", "op", "shape", "us", "TFLOP/s", "GB/s",
              "roofline", "of copy");
  for (const OpTime& t : time_ops(ops, config, a.only)) {
    const double s = t.us * 1e-6;
    const double share =
        card ? std::max(t.flops / card->gemm_flops, t.bytes / card->bytes_per_s) / s : 0;
    std::printf("%-26s %-24s %12.1f %9.2f %9.1f %9s %9s\n", t.name.c_str(), t.shape.c_str(), t.us,
                t.flops / s / 1e12, t.bytes / s / 1e9,
                card ? fmt::format("{:.2f}", share).c_str() : "-",
                t.copy_us > 0 ? fmt::format("{:.2f}", t.copy_us / t.us).c_str() : "-");
    rows.push_back({{"name", t.name},
                    {"shape", t.shape},
                    {"us", t.us},
                    {"tflops", t.flops / s / 1e12},
                    {"gbps", t.bytes / s / 1e9}});
    if (card) rows.back()["roofline"] = share;
    if (t.copy_us > 0) rows.back()["of_copy"] = t.copy_us / t.us;
  }
  if (!a.json.empty()) write_file_atomic(a.json, rows.dump(2) + "\n");
}

void write_step_json(const std::string& path, const StepTime& t, double sum, double products) {
  nlohmann::ordered_json root = {{"tokens", t.tokens},
                                 {"ms", t.ms},
                                 {"waiting_ms", t.waiting_ms},
                                 {"tokens_per_s", t.tokens_per_s},
                                 {"mfu", t.mfu},
                                 {"operations_ms", sum},
                                 {"products_ms", products},
                                 {"idle", 1 - sum / t.between_ms},
                                 {"between_ms", t.between_ms},
                                 {"marked_step_ms", t.breakdown_ms},
                                 {"mark_us", t.mark_us},
                                 {"memory_gib", t.memory_gib},
                                 {"context_gib", t.context_gib},
                                 {"operations", nlohmann::ordered_json::array()}};
  for (const OpShare& o : t.breakdown)
    root["operations"].push_back({{"name", o.name}, {"calls", o.calls}, {"ms", o.ms}});
  write_file_atomic(path, root.dump(2) + "\n");
}

void run_gemm(Ops& ops, const Config& config, const Args& a) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  double chosen_ms = 0, best_ms = 0;
  std::printf("%-24s %-22s %6s %10s %9s %10s %9s %7s  %s\n", "product", "N, O, I", "calls",
              "chosen us", "TFLOP/s", "best us", "TFLOP/s", "gain", "best");
  time_products(ops, config, a.trials, [&](const ProductTime& t) {
    const ProductTrial &chosen = t.chosen(), &best = t.best();
    chosen_ms += double(t.calls) * chosen.us / 1e3;
    best_ms += double(t.calls) * best.us / 1e3;
    const std::string shape = Shape{t.product.N, t.product.O, t.product.I}.str();
    std::printf("%-24s %-22s %6lld %10.1f %9.1f %10.1f %9.1f %6.1f%%  %s\n", t.name.c_str(),
                shape.c_str(), static_cast<long long>(t.calls), chosen.us, t.tflops(chosen),
                best.us, t.tflops(best), 100 * (chosen.us / best.us - 1), best.algorithm.c_str());
    rows.push_back({{"name", t.name}, {"shape", shape}, {"calls", t.calls}});
    for (const ProductTrial& p : t.trials)
      rows.back()["candidates"].push_back({{"algorithm", p.algorithm},
                                           {"us", p.us},
                                           {"tflops", t.tflops(p)},
                                           {"chosen", p.chosen}});
    std::fflush(stdout);
  });
  std::printf("products of a step: %.2f ms as chosen, %.2f ms by the best of what was timed\n",
              chosen_ms, best_ms);
  if (!a.json.empty()) write_file_atomic(a.json, rows.dump(2) + "\n");
}

void run_step(Ops& ops, const Config& config, const Args& a) {
  const StepTime t = time_step(ops, config, a.steps, a.micro_batches);
  std::printf("step  %lld tokens  %.2f ms  %.0f tokens/s", static_cast<long long>(t.tokens), t.ms,
              t.tokens_per_s);
  if (t.mfu >= 0) std::printf("  mfu %.1f%%", 100 * t.mfu);
  std::printf("  (median of %d steps)\n", a.steps);
  if (ops.asynchronous())
    std::printf("without recording, the host waiting in every step: %.2f ms\n", t.waiting_ms);
  std::printf("%-44s %6s %10s %8s\n", "one step by operation", "calls", "ms", "share");
  double sum = 0, products = 0;
  for (const OpShare& o : t.breakdown) {
    sum += o.ms;
    if (o.name.rfind("linear", 0) == 0) products += o.ms;
    std::printf("%-44s %6lld %10.3f %7.1f%%\n", o.name.c_str(), static_cast<long long>(o.calls),
                o.ms, 100 * o.ms / t.between_ms);
  }
  std::printf("%-44s %6s %10.3f %7.1f%%\n", "all operations", "", sum, 100 * sum / t.between_ms);
  std::printf("%-44s %6s %10.3f %7.1f%%\n", "of which matrix products", "", products,
              100 * products / t.between_ms);
  if (ops.asynchronous())
    std::printf("%-44s %6s %10.3f %7.1f%%\n%-44s %6s %10.3f\n", "the device idle", "",
                t.between_ms - sum, 100 * (1 - sum / t.between_ms),
                "a step as timed above, between these", "", t.between_ms);
  if (!a.json.empty()) write_step_json(a.json, t, sum, products);
  if (t.mfu < 0) return;
  const double planned = double(planned_bytes(config, {})) / double(1 << 30);
  std::printf(
      "memory in use on the device %.2f GiB, %.2f of it before the model; planned %.2f (%+.1f "
      "%%)\n",
      t.memory_gib, t.context_gib, planned, 100 * (planned / t.memory_gib - 1));
}

void run_generate(Ops& ops, const Config& config, const Args& a) {
  const GenerateTime t = time_generate(ops, config, a.batch, a.prompt, a.tokens);
  std::printf(
      "generate  batch %lld  prompt %lld  tokens %lld  %.1f tokens/s  first token %.2f ms  memory "
      "in use on the device %.3f GiB after 32 tokens, %.3f GiB at the end\n",
      static_cast<long long>(a.batch), static_cast<long long>(a.prompt),
      static_cast<long long>(a.tokens), t.tokens_per_s, t.first_token_ms, t.memory_start_gib,
      t.memory_end_gib);
}

// One of the ranks that a launcher's environment speaks of; rank 0 prints.
void run_comm(Ops& ops, const RankEnv& env, Config config, const Args& a) {
  log_init(env.rank, env.world);
  Ranks::Options o;
  o.env = env;
  o.agreed = fmt::format("{} {} {} {}", config_to_json(config), fmt::join(a.global_batch, ","),
                         fmt::join(a.zero, ","), a.steps);
  o.give_up = [](const Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    std::_Exit(int(e.code()));
  };
  Ranks ranks(resolve_device(a.device), ops, o);
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  if (ranks.first())
    std::printf("%5s %5s %7s %9s %10s %9s %9s %9s %7s %6s %8s %8s\n", "ranks", "zero", "global",
                "step ms", "tokens/s", "silent ms", "alone ms", "shown ms", "hidden", "calls",
                "state", "memory");
  std::vector<int64_t> batches = a.global_batch, zeros = a.zero;
  if (batches.empty()) batches = {config.train.micro_batch * ranks.world()};
  if (ranks.alone()) zeros = {0};
  for (int64_t batch : batches)
    for (int64_t zero : zeros) {
      config.train.global_batch = batch;
      config.train.zero = zero;
      const CommTime t = time_comm(ranks, ops, config, a.steps);
      if (!ranks.first()) continue;
      const bool several = t.ranks > 1;
      const double shown = t.whole_ms - t.silent_ms, hidden = 1 - shown / t.alone_ms;
      std::printf("%5d %5d %7lld %9.2f %10.0f %9.2f %9.2f %9.2f %7s %6lld %8.3f %8.3f\n", t.ranks,
                  t.zero, static_cast<long long>(batch), t.whole_ms, t.tokens_per_s, t.silent_ms,
                  t.alone_ms, several ? shown : 0,
                  several ? fmt::format("{:.1f}%", 100 * hidden).c_str() : "-",
                  static_cast<long long>(t.calls), t.state_gib, t.memory_gib);
      std::fflush(stdout);
      rows.push_back({{"ranks", t.ranks},
                      {"zero", t.zero},
                      {"global_batch", batch},
                      {"tokens", t.tokens},
                      {"step_ms", t.whole_ms},
                      {"tokens_per_s", t.tokens_per_s},
                      {"state_gib", t.state_gib},
                      {"memory_gib", t.memory_gib}});
      if (!several) continue;
      rows.back().update({{"host_ms", t.host_ms},
                          {"agreement_ms", t.agreement_ms},
                          {"silent_ms", t.silent_ms},
                          {"alone_ms", t.alone_ms},
                          {"shown_ms", shown},
                          {"hidden", hidden},
                          {"collectives", t.calls},
                          {"bytes", t.bytes}});
    }
  if (ranks.first() && !a.json.empty()) write_file_atomic(a.json, rows.dump(2) + "\n");
  ranks.barrier();  // nobody leaves while another still sums
}

int run(int argc, char** argv) {
  CLI::App root("hgrn-bench: times operations, training steps and generation", "hgrn-bench");
  root.require_subcommand(1);
  Args a;
  const std::map<std::string, Device> devices = {
      {"auto", Device::automatic}, {"cpu", Device::cpu}, {"cuda", Device::cuda}};
  CLI::App* ops_app = root.add_subcommand("ops", "Single operations at a config's shapes");
  CLI::App* step_app = root.add_subcommand("step", "Whole optimizer steps");
  CLI::App* comm_app = root.add_subcommand(
      "comm",
      "Training steps of several ranks, started with a launcher's environment: what "
      "communication costs and how much of it is hidden");
  CLI::App* generate_app =
      root.add_subcommand("generate", "Sampling from a model with random weights");
  for (const auto& [flag, value, text] :
       {std::tuple{"--tokens", &a.tokens, "tokens of each row"},
        std::tuple{"--batch", &a.batch, "rows"},
        std::tuple{"--prompt", &a.prompt, "tokens of each prompt"}})
    generate_app->add_option(flag, *value, text)->check(CLI::PositiveNumber)->capture_default_str();
  ops_app->add_option("name", a.only, "only operations whose name holds this");
  CLI::App* gemm_app = root.add_subcommand(
      "gemm", "The matrix products of a step by each algorithm of the GPU's library");
  gemm_app
      ->add_option("--candidates", a.trials.candidates,
                   "algorithms of each product, best-ranked first")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  gemm_app
      ->add_option("--sustain", a.trials.sustain_ms,
                   "time the fastest again, each for so many ms without a pause (the card's "
                   "limit of power); leave the others out")
      ->check(CLI::NonNegativeNumber);
  gemm_app->add_flag("--every", a.trials.every,
                     "and as many of those that the library accepts but may not rank, the fastest "
                     "of them all by one call");
  for (CLI::App* app : {ops_app, step_app, comm_app, gemm_app})
    app->add_option("--json", a.json, "write the table to this file");
  comm_app
      ->add_option("--global-batch", a.global_batch,
                   "sequences a step over all ranks; repeatable (default: one micro-batch a rank)")
      ->check(CLI::PositiveNumber);
  comm_app->add_option("--zero", a.zero, "train.zero; repeatable (default: 0 and 1)")
      ->check(CLI::Range(0, 1));
  for (CLI::App* app : {step_app, comm_app})
    app->add_option("--steps", a.steps, "steps to time")->check(CLI::PositiveNumber);
  step_app->add_option("--micro-batches", a.micro_batches, "micro-batches of a step")
      ->check(CLI::PositiveNumber);
  for (CLI::App* app : {ops_app, step_app, comm_app, generate_app, gemm_app}) {
    app->add_option("--config", a.config, "config file (default: configs/quickstart.json)");
    app->add_option("--set", a.overrides, "KEY=VALUE, overrides a config key; repeatable")
        ->take_all();
    app->add_option("--micro-batch", a.micro_batch, "sequences a step (default: the config's)")
        ->check(CLI::PositiveNumber);
    app->add_option("--device", a.device, "auto, cpu or cuda")
        ->transform(CLI::CheckedTransformer(devices, CLI::ignore_case).description(""));
    app->footer("Example:\n  hgrn-bench " + app->get_name() + " --config configs/hgrn2_150m.json");
  }
  try {
    root.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return root.exit(e) == 0 ? 0 : int(Exit::usage);
  }
  Config config = load_config(a.config.empty() ? "configs/quickstart.json" : a.config, a.overrides);
  if (a.micro_batch > 0) config.train.micro_batch = a.micro_batch;
  const RankEnv env = comm_app->parsed() ? read_rank_env() : RankEnv();
  const auto ops = open_ops(a.device, config.train.precision == Precision::bf16 ? "bf16" : "fp32",
                            env.local_rank);
  if (env.rank == 0) std::printf("%s\n", ops->describe().c_str());
  if (ops_app->parsed()) run_ops(*ops, config, a);
  if (step_app->parsed()) run_step(*ops, config, a);
  if (comm_app->parsed()) run_comm(*ops, env, config, a);
  if (gemm_app->parsed()) run_gemm(*ops, config, a);
  if (generate_app->parsed()) run_generate(*ops, config, a);
  return 0;
}

}  // namespace
}  // namespace hgrn::bench

int main(int argc, char** argv) {
  hgrn::spin_briefly(argv);
  hgrn::log_init(0, 1);  // the ranks of `comm` have warnings alone to tell
  try {
    return hgrn::bench::run(argc, argv);
  } catch (const hgrn::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return int(e.code());
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}
