// hgrn launch: flags to LaunchOptions.
#include <CLI/CLI.hpp>
#include <algorithm>

#include "cli/command.h"
#include "core/version.h"
#include "launch/launcher.h"

namespace hgrn {

Command launch_command(CLI::App& root) {
  auto o = std::make_shared<LaunchOptions>();
  o->nproc_per_node = 0;
  CLI::App* app = root.add_subcommand("launch", "Start one rank a GPU, or several CPU ranks");
  app->footer(
      "Example:\n  hgrn launch --nproc-per-node 8 --max-restarts 3 -- train --config "
      "configs/hgrn2_1b.json --out runs/1b");
  app->add_flag("--standalone", o->standalone, "one machine, any free port (the default)");
  app->add_option("--nnodes", o->nnodes, "machines")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app->add_option("--node-rank", o->node_rank, "this machine's number, from 0")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  app->add_option("--nproc-per-node", o->nproc_per_node,
                  "ranks on each machine (default: its GPUs, else 1)")
      ->check(CLI::Range(1, 4096));
  app->add_option("--master-addr", o->master_addr, "address of machine 0");
  app->add_option("--master-port", o->master_port,
                  "its port (default: a free one on one machine, else 29500)")
      ->check(CLI::Range(1, 65535));
  app->add_option("--max-restarts", o->max_restarts,
                  "times to go on from the newest checkpoint after exit 1 or a signal")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--log-dir", o->log_dir, "folder for each rank's output, rank-N.log");
  app->add_option("command", o->command, "after --: train and its flags");
  return {app, [o] {
            if (o->nproc_per_node == 0) o->nproc_per_node = std::max(1, cuda_device_count());
            return launch(*o);
          }};
}

}  // namespace hgrn
