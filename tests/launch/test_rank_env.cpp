// Which rank a process is: torchrun's, Slurm's and Open MPI's variables.
#include <map>

#include "catch.h"
#include "launch/rank_env.h"
#include "temp_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

RankEnv read(const std::map<std::string, std::string>& vars) {
  return read_rank_env([&](const char* name) -> const char* {
    const auto found = vars.find(name);
    return found == vars.end() ? nullptr : found->second.c_str();
  });
}

Thrown refused(const std::map<std::string, std::string>& vars) {
  return thrown_by([&] { read(vars); });
}

const std::map<std::string, std::string> kTorchrun = {
    {"RANK", "3"},          {"WORLD_SIZE", "8"},     {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "2"},
    {"MASTER_ADDR", "n17"}, {"MASTER_PORT", "29501"}};

}  // namespace

TEST_CASE("rank_env: nothing set is one rank", "[launch]") {
  const RankEnv e = read({});
  CHECK(e.rank == 0);
  CHECK(e.world == 1);
  CHECK(read({{"RANK", ""}, {"SLURM_PROCID", ""}}).world == 1);
}

TEST_CASE("rank_env: torchrun's contract, and its agent's port", "[launch]") {
  RankEnv e = read(kTorchrun);
  CHECK(e.rank == 3);
  CHECK(e.world == 8);
  CHECK(e.local_rank == 1);
  CHECK(e.local_world == 2);
  CHECK(e.master_addr == "n17");
  CHECK(e.master_port == 29501);
  auto vars = kTorchrun;
  vars["TORCHELASTIC_USE_AGENT_STORE"] = "True";
  vars["TORCHELASTIC_RESTART_COUNT"] = "2";
  e = read(vars);
  CHECK(e.master_port == 29502);
  CHECK(e.restarts == 2);
  vars["HGRN_MASTER_PORT"] = "1234";
  CHECK(read(vars).master_port == 1234);
  vars.erase("HGRN_MASTER_PORT");
  vars["TORCHELASTIC_USE_AGENT_STORE"] = "False";
  CHECK(read(vars).master_port == 29501);
  // It comes before the others.
  vars["SLURM_PROCID"] = "0";
  vars["OMPI_COMM_WORLD_RANK"] = "0";
  CHECK(read(vars).rank == 3);
}

TEST_CASE("rank_env: Slurm", "[launch]") {
  std::map<std::string, std::string> vars = {
      {"SLURM_PROCID", "5"},        {"SLURM_NTASKS", "16"},
      {"SLURM_LOCALID", "1"},       {"SLURM_LAUNCH_NODE_IPADDR", "10.0.0.7"},
      {"SLURM_JOB_ID", "41234567"}, {"SLURM_RESTART_COUNT", "1"}};
  RankEnv e = read(vars);
  CHECK(e.rank == 5);
  CHECK(e.world == 16);
  CHECK(e.local_rank == 1);
  CHECK(e.master_addr == "10.0.0.7");
  CHECK(e.master_port == 20000 + 41234567 % 20000);
  CHECK(e.restarts == 1);
  vars["MASTER_ADDR"] = "head";
  vars["MASTER_PORT"] = "777";
  e = read(vars);
  CHECK(e.master_addr == "head");
  CHECK(e.master_port == 777);
}

TEST_CASE("rank_env: Slurm's ranks are on one machine only if it has one node", "[launch]") {
  using Vars = std::map<std::string, std::string>;
  const auto local_world = [](const char* tasks, Vars more) {
    more.insert({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", tasks}, {"MASTER_ADDR", "head"}});
    return read(more).local_world;
  };
  CHECK(local_world("8", {{"SLURM_NNODES", "1"}}) == 8);
  CHECK(local_world("8", {{"SLURM_JOB_NUM_NODES", "1"}}) == 8);
  // Fewer tasks than the job's limit a node.
  CHECK(local_world("4", {{"SLURM_NNODES", "1"}, {"SLURM_NTASKS_PER_NODE", "8"}}) == 4);
  CHECK(local_world("16", {{"SLURM_NNODES", "2"}, {"SLURM_NTASKS_PER_NODE", "8"}}) == 8);
  // The limit may be as large as the world, or larger, and the ranks still on two machines.
  CHECK(local_world("8", {{"SLURM_NNODES", "2"}, {"SLURM_NTASKS_PER_NODE", "8"}}) < 8);
  CHECK(local_world("8", {{"SLURM_JOB_NUM_NODES", "2"}, {"SLURM_NTASKS_PER_NODE", "64"}}) < 8);
  CHECK(local_world("2", {{"SLURM_NNODES", "2"}, {"SLURM_NTASKS_PER_NODE", "2"}}) == 1);
  // SLURM_NNODES comes first; of an unknown number of nodes nothing is concluded.
  CHECK(local_world("8", {{"SLURM_NNODES", "1"}, {"SLURM_JOB_NUM_NODES", "2"}}) == 8);
  CHECK(local_world("8", {{"SLURM_NTASKS_PER_NODE", "8"}}) < 8);
  CHECK(local_world("1", {{"SLURM_NNODES", "2"}}) == 1);
  CHECK(thrown_by([&] { local_world("8", {{"SLURM_NNODES", "two"}}); }).has("SLURM_NNODES"));
}

TEST_CASE("rank_env: Open MPI", "[launch]") {
  std::map<std::string, std::string> vars = {{"OMPI_COMM_WORLD_RANK", "1"},
                                             {"OMPI_COMM_WORLD_SIZE", "4"},
                                             {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                             {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}};
  const RankEnv e = read(vars);
  CHECK(e.rank == 1);
  CHECK(e.world == 4);
  CHECK(e.local_rank == 1);
  CHECK(e.master_addr == "127.0.0.1");  // all are on this machine
  vars["OMPI_COMM_WORLD_LOCAL_SIZE"] = "2";
  CHECK(refused(vars).has("MASTER_ADDR"));
}

TEST_CASE("rank_env: what is missing or wrong is named", "[launch]") {
  const auto with = [](const char* name, const char* value) {
    auto vars = kTorchrun;
    vars[name] = value;
    return vars;
  };
  const std::vector<std::pair<const char*, const char*>> wrong = {
      {"RANK", "8"},
      {"RANK", "-1"},
      {"RANK", "x"},
      {"WORLD_SIZE", "0"},
      {"WORLD_SIZE", ""},
      {"LOCAL_RANK", "1x"},
      {"MASTER_ADDR", ""},
      {"MASTER_PORT", "65536"},
      {"HGRN_MASTER_PORT", "0"},
      {"HGRN_JOIN_TIMEOUT", "no"},
      {"HGRN_RANK_TIMEOUT", "0"},
      {"HGRN_COLLECTIVE_TIMEOUT", "-1"}};
  for (const auto& [name, value] : wrong) {
    const Thrown t = refused(with(name, value));
    INFO(name << "=" << value << ": " << t.text);
    CHECK(t.code == Exit::usage);
    CHECK(t.has(name));
  }
}
