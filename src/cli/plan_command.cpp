// hgrn plan: what a config needs, on stdout.
#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "model/config.h"
#include "model/plan.h"

namespace hgrn {
namespace {

struct PlanArgs {
  std::string config, tokens;
  std::vector<std::string> overrides;
  bool json = false;
  PlanOptions options;
};

void add_device_flags(CLI::App* app, PlanOptions& o) {
  app->add_option("--gpus", o.gpus, "GPUs")->check(CLI::PositiveNumber)->capture_default_str();
  app->add_option("--device-memory", o.device_memory_gib,
                  "memory of a GPU, GiB (default: that of --card, else 80)")
      ->check(CLI::PositiveNumber);
  app->add_flag("--cpu", o.cpu, "plan for the CPU");
  app->add_option("--card", o.card, "H100, H200 or A100: for cost and the table (default: H100)");
  app->add_option("--tflops", o.tflops, "another device: dense TFLOP/s that products reach")
      ->check(CLI::PositiveNumber);
  app->add_option("--bandwidth", o.bandwidth_gbs, "... and its memory bandwidth, GB/s")
      ->check(CLI::PositiveNumber);
  app->add_option("--roofline-share", o.share, "what a training step reaches of the roofline")
      ->check(CLI::Range(0.01, 1.0))
      ->capture_default_str();
}

void add_network_flags(CLI::App* app, Network& n) {
  app->add_option("--gpus-per-node", n.gpus_per_node, "GPUs of a machine")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--link-gbs", n.link_gbs, "bus bandwidth of a collective within a machine, GB/s")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--network-gbs", n.network_gbs,
                  "network bandwidth of a machine, one direction, GB/s")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--bucket-elements", n.bucket_elements,
                  "gradients of a collective, as HGRN_BUCKET_ELEMENTS sets it")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--link-us", n.link_us, "latency of a ring's hop within a machine, us")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--network-us", n.network_us, "... and between machines, us")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
}

}  // namespace

Command plan_command(CLI::App& root) {
  auto a = std::make_shared<PlanArgs>();
  CLI::App* app = root.add_subcommand(
      "plan", "Parameters, memory, speed, cost and scaling of a config, without a device");
  app->footer(
      "Example:\n  hgrn plan --config configs/hgrn2_1b.json --gpus 8 --card H100 --tokens 100B "
      "--price-per-gpu-hour 2.5");
  app->add_option("--config", a->config, "config file")->required();
  app->add_option("--set", a->overrides, "KEY=VALUE, overrides a config key; repeatable")
      ->take_all();
  add_device_flags(app, a->options);
  app->add_option("--tokens", a->tokens,
                  "token budget, such as 100B (default: the run's own tokens)");
  app->add_option("--price-per-gpu-hour", a->options.price, "for the cost of the budget")
      ->check(CLI::PositiveNumber);
  add_network_flags(app, a->options.network);
  app->add_flag("--json", a->json, "one JSON object instead of the tables");
  return {app, [a] {
            if (!a->tokens.empty()) a->options.tokens = parse_tokens(a->tokens);
            const Plan p = make_plan(load_config(a->config, a->overrides), a->options);
            print(a->json ? plan_json(p) : plan_text(p));
            return Exit::ok;
          }};
}

}  // namespace hgrn
