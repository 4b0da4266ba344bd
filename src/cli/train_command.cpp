// hgrn train: flags to TrainArgs.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>

#include "cli/command.h"
#include "core/log.h"
#include "eval/generate.h"
#include "train/trainer.h"

namespace hgrn {

Command train_command(CLI::App& root) {
  auto args = std::make_shared<TrainArgs>();
  CLI::App* app = root.add_subcommand("train", "Pretrain a model from a config");
  app->footer(
      "Example:\n  hgrn train --config configs/quickstart.json --set optim.lr=1e-3 --out "
      "runs/first");
  app->add_option("--config", args->config, "config file (JSON, comments allowed)")->required();
  app->add_option("--set", args->overrides, "KEY=VALUE, overrides a config key; repeatable")
      ->take_all();
  app->add_option("--out", args->out, "run folder (default: runs/<config's name>)");
  add_device(app, args->device);
  app->add_option("--resume", args->resume,
                  "auto: from the newest complete checkpoint in --out; never; or a folder")
      ->default_str("auto");
  app->add_option("--init-from", args->init_from,
                  "weights from a Hugging Face HGRN2 folder, a checkpoint or a run folder");
  app->add_option("--steps", args->stop_after,
                  "stop after this step; the schedule still spans train.steps")
      ->check(CLI::NonNegativeNumber);
  app->add_option("--prometheus", args->monitor.prometheus,
                  "write metrics to this file for node_exporter's textfile collector (.prom)");
  app->add_flag("--plain", args->monitor.plain, "log lines alone, no live view on a terminal");
  args->monitor.sampler = sample_ids;
  args->give_up = [](const Error& e) {  // the main thread hangs in a collective
    log_status({});
    std::fprintf(stderr, "error: %s\n", e.what());
    std::_Exit(int(e.code()));
  };
  return {app, [args] { return Trainer(*args).run(); }};
}

}  // namespace hgrn
