// hgrn sweep: flags to SweepOptions.
#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "sweep/sweep.h"

namespace hgrn {

Command sweep_command(CLI::App& root) {
  auto o = std::make_shared<SweepOptions>();
  CLI::App* app =
      root.add_subcommand("sweep", "One training run for each combination of config values");
  app->footer(
      "Example:\n  hgrn sweep --config configs/quickstart.json --grid optim.lr=1e-3,3e-3 --grid "
      "train.seed=0,1 --out sweeps/lr");
  app->add_option("--config", o->config, "config file (JSON, comments allowed)")->required();
  app->add_option("--set", o->overrides, "KEY=VALUE for all runs; repeatable")->take_all();
  app->add_option("--grid", o->grid, "KEY=VALUE,VALUE,...; repeatable: every combination is a run")
      ->take_all();
  app->add_option("--out", o->out, "folder of the sweep: runs/, logs/, results.jsonl, results.csv")
      ->required();
  add_device(app, o->device);
  app->add_option("--jobs", o->jobs,
                  "runs side by side (default: one a GPU, 1 on the CPU; with --slurm: no limit)")
      ->check(CLI::Range(1, 4096));
  app->add_option("--slurm", o->slurm, "write a Slurm array job to this file, start nothing");
  app->add_flag("--report", o->report, "only gather the results of the runs that are there");
  return {app, [o] {
            std::string table;
            const Exit code = sweep(*o, table);
            print(table);
            return code;
          }};
}

}  // namespace hgrn
