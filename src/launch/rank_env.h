// Which rank of a run this process is, from the environment that a launcher sets: torchrun's
// contract (`hgrn launch` sets it too), else Slurm's, else Open MPI's, else one rank.
// docs/distributed.md lists the variables.
#pragma once
#include <functional>
#include <string>

namespace hgrn {

struct RankEnv {
  int rank = 0, world = 1;
  // On this machine. local_world is `world` only where no rank is elsewhere; Slurm tells no more
  // of several machines than how many ranks one has at most.
  int local_rank = 0, local_world = 1;
  std::string master_addr;  // of rank 0; empty for one rank
  int master_port = 0;
  std::string token;       // secret of the job, empty: none
  int restarts = 0;        // how often the launcher has started the ranks again
  std::string source;      // "RANK", "SLURM_PROCID" or "OMPI_COMM_WORLD_RANK"; empty: one rank
  bool prefixed = false;   // the launcher puts the rank in front of each line
  double join_s = 300;     // HGRN_JOIN_TIMEOUT: waiting for all ranks to come
  double silence_s = 120;  // HGRN_RANK_TIMEOUT: a rank that says nothing for so long is lost
  // HGRN_COLLECTIVE_TIMEOUT: of one collective, waiting for the slowest rank included
  double collective_s = 1800;
};

using GetEnv = std::function<const char*(const char*)>;

// Exit::usage names the variable that is missing or wrong.
RankEnv read_rank_env(const GetEnv& get);
RankEnv read_rank_env();  // of this process

}  // namespace hgrn
