// `hgrn launch`: one process a GPU or CPU rank on this machine, with torchrun's environment
// contract (rank_env.h). It shows their output line by line with the rank in front, forwards
// signals, ends all when one fails, and starts them again from the newest checkpoint if asked to.
// No process outlives it, whatever ends it: the kernel kills the ranks with their launcher.
#pragma once
#include <string>
#include <vector>

#include "core/check.h"

namespace hgrn {

struct LaunchOptions {
  bool standalone = false;  // one machine, a free port
  int nnodes = 1, node_rank = 0;
  int nproc_per_node = 1;
  std::string master_addr;           // required for several machines
  int master_port = 0;               // 0: a free one on one machine, else 29500
  int max_restarts = 0;              // after exit 1 or a signal
  std::string log_dir;               // rank-N.log in it; empty: none
  std::vector<std::string> command;  // "train", ...
};

// Returns the ranks' code: that of the first to fail (1 for one that a signal killed), else 75
// where they were stopped, else 0. Exit::usage for options that do not fit together.
Exit launch(const LaunchOptions& options);

}  // namespace hgrn
