// hgrn-bench: times single operations, whole training steps and generation, one line each.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <tuple>

#include "bench.h"
#include "core/file.h"
#include "core/log.h"

namespace hgrn::bench {
namespace {

struct Args {
  std::string config, only, json;
  Device device = Device::automatic;
  int64_t micro_batch = 0;
  int steps = 20;
  int64_t tokens = 1000, batch = 1, prompt = 128;
};

// Ceilings measured on H100s: an 8192^3 bf16 GEMM and a device-to-device copy.
constexpr double kGemmFlops = 790e12, kCopyBytes = 3.0e12;

void run_ops(Ops& ops, const Config& config, const Args& a) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  const bool roofline = ops.peak_flops() > 0;
  std::printf("%-26s %-24s %12s %9s %9s %9s\n", "op", "shape", "us", "TFLOP/s", "GB/s", "roofline");
  for (const OpTime& t : time_ops(ops, config, a.only)) {
    const double s = t.us * 1e-6;
    const double share = std::max(t.flops / kGemmFlops, t.bytes / kCopyBytes) / s;
    std::printf("%-26s %-24s %12.1f %9.2f %9.1f %9s\n", t.name.c_str(), t.shape.c_str(), t.us,
                t.flops / s / 1e12, t.bytes / s / 1e9,
                roofline ? fmt::format("{:.2f}", share).c_str() : "-");
    rows.push_back({{"name", t.name},
                    {"shape", t.shape},
                    {"us", t.us},
                    {"tflops", t.flops / s / 1e12},
                    {"gbps", t.bytes / s / 1e9}});
    if (roofline) rows.back()["roofline"] = share;
  }
  if (!a.json.empty()) write_file_atomic(a.json, rows.dump(2) + "\n");
}

void run_step(Ops& ops, const Config& config, const Args& a) {
  const StepTime t = time_step(ops, config, a.steps);
  std::printf("step  %lld tokens  %.2f ms  %.0f tokens/s", static_cast<long long>(t.tokens), t.ms,
              t.tokens_per_s);
  if (t.mfu >= 0) std::printf("  mfu %.1f%%", 100 * t.mfu);
  std::printf("  memory in use on the device %.2f GiB  (median of %d steps)\n", t.memory_gib,
              a.steps);
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

int run(int argc, char** argv) {
  CLI::App root("hgrn-bench: times operations, training steps and generation", "hgrn-bench");
  root.require_subcommand(1);
  Args a;
  const std::map<std::string, Device> devices = {
      {"auto", Device::automatic}, {"cpu", Device::cpu}, {"cuda", Device::cuda}};
  CLI::App* ops_app = root.add_subcommand("ops", "Single operations at a config's shapes");
  CLI::App* step_app = root.add_subcommand("step", "Whole optimizer steps of one micro-batch");
  CLI::App* generate_app =
      root.add_subcommand("generate", "Sampling from a model with random weights");
  for (const auto& [flag, value, text] :
       {std::tuple{"--tokens", &a.tokens, "tokens of each row"},
        std::tuple{"--batch", &a.batch, "rows"},
        std::tuple{"--prompt", &a.prompt, "tokens of each prompt"}})
    generate_app->add_option(flag, *value, text)->check(CLI::PositiveNumber)->capture_default_str();
  ops_app->add_option("name", a.only, "only operations whose name holds this");
  ops_app->add_option("--json", a.json, "write the table to this file");
  step_app->add_option("--steps", a.steps, "steps to time")->check(CLI::PositiveNumber);
  for (CLI::App* app : {ops_app, step_app, generate_app}) {
    app->add_option("--config", a.config, "config file (default: configs/quickstart.json)");
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
  Config config = load_config(a.config.empty() ? "configs/quickstart.json" : a.config);
  if (a.micro_batch > 0) config.train.micro_batch = a.micro_batch;
  const auto ops = open_ops(a.device, config.train.precision == Precision::bf16 ? "bf16" : "fp32");
  std::printf("%s\n", ops->describe().c_str());
  if (ops_app->parsed()) run_ops(*ops, config, a);
  if (step_app->parsed()) run_step(*ops, config, a);
  if (generate_app->parsed()) run_generate(*ops, config, a);
  return 0;
}

}  // namespace
}  // namespace hgrn::bench

int main(int argc, char** argv) {
  hgrn::log_init(0, 1);
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
