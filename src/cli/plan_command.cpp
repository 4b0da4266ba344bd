// hgrn plan: what a config needs, on stdout.
#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "model/config.h"
#include "model/plan.h"

namespace hgrn {

Command plan_command(CLI::App& root) {
  struct Args {
    std::string config;
    std::vector<std::string> overrides;
    PlanOptions options;
  };
  auto a = std::make_shared<Args>();
  CLI::App* app = root.add_subcommand("plan", "Parameters, memory, FLOPs and limits of a config");
  app->footer("Example:\n  hgrn plan --config configs/hgrn2_1b.json --gpus 8 --device-memory 80");
  app->add_option("--config", a->config, "config file")->required();
  app->add_option("--set", a->overrides, "KEY=VALUE, overrides a config key; repeatable")
      ->take_all();
  app->add_option("--gpus", a->options.gpus, "GPUs")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--device-memory", a->options.device_memory_gib, "memory of a GPU, GiB")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_flag("--cpu", a->options.cpu, "plan for the CPU");
  return {app, [a] {
            print(plan_text(load_config(a->config, a->overrides), a->options));
            return Exit::ok;
          }};
}

}  // namespace hgrn
