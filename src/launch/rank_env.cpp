#include "launch/rank_env.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <optional>

#include "core/check.h"

namespace hgrn {
namespace {

constexpr int kDefaultPort = 29500;  // torchrun's
constexpr int kMaxWorld = 1 << 16;

class Reader {
 public:
  explicit Reader(const GetEnv& get) : get_(get) {}

  std::string text(const char* name) const {
    const char* value = get_(name);
    return value ? value : "";
  }
  bool has(const char* name) const { return !text(name).empty(); }

  int number(const char* name, int low, int high) const {
    const std::string value = text(name);
    int n = 0;
    const auto [end, err] = std::from_chars(value.data(), value.data() + value.size(), n);
    check(err == std::errc() && end == value.data() + value.size() && low <= n && n <= high,
          Exit::usage, "{}=\"{}\" in the environment: a number from {} to {} is expected", name,
          value, low, high);
    return n;
  }
  int number(const char* name, int low, int high, int otherwise) const {
    return has(name) ? number(name, low, high) : otherwise;
  }
  double seconds(const char* name, double otherwise) const {
    if (!has(name)) return otherwise;
    char* end = nullptr;
    const std::string value = text(name);
    const double s = std::strtod(value.c_str(), &end);
    check(*end == 0 && s > 0 && s < 1e7, Exit::usage,
          "{}=\"{}\" in the environment: seconds are expected", name, value);
    return s;
  }

 private:
  const GetEnv& get_;
};

// Slurm names no port: one that differs between jobs which share a machine.
int port_of_job(const Reader& env) {
  return env.has("SLURM_JOB_ID") ? 20000 + env.number("SLURM_JOB_ID", 0, INT32_MAX) % 20000
                                 : kDefaultPort;
}

void read_torchrun(const Reader& env, RankEnv& e) {
  e.source = "RANK";
  e.world = env.number("WORLD_SIZE", 1, kMaxWorld);
  e.rank = env.number("RANK", 0, e.world - 1);
  e.local_rank = env.number("LOCAL_RANK", 0, kMaxWorld, 0);
  e.local_world = env.number("LOCAL_WORLD_SIZE", 1, kMaxWorld, 1);
  e.master_addr = env.text("MASTER_ADDR");
  e.master_port = env.number("MASTER_PORT", 1, 65535, kDefaultPort);
  // torchrun's agent listens on MASTER_PORT itself.
  if (env.text("TORCHELASTIC_USE_AGENT_STORE") == "True") ++e.master_port;
  e.restarts = env.number("TORCHELASTIC_RESTART_COUNT", 0, INT32_MAX, 0);
}

void read_slurm(const Reader& env, RankEnv& e) {
  e.source = "SLURM_PROCID";
  e.world = env.number("SLURM_NTASKS", 1, kMaxWorld);
  e.rank = env.number("SLURM_PROCID", 0, e.world - 1);
  e.local_rank = env.number("SLURM_LOCALID", 0, kMaxWorld, 0);
  const char* const nodes = env.has("SLURM_NNODES") ? "SLURM_NNODES" : "SLURM_JOB_NUM_NODES";
  if (env.number(nodes, 1, kMaxWorld, 2) == 1)
    e.local_world = e.world;
  else  // at most: Slurm may have put fewer ranks here, but not all of several
    e.local_world =
        std::min(env.number("SLURM_NTASKS_PER_NODE", 1, kMaxWorld, 1), std::max(1, e.world - 1));
  e.master_addr =
      env.has("MASTER_ADDR") ? env.text("MASTER_ADDR") : env.text("SLURM_LAUNCH_NODE_IPADDR");
  e.master_port = env.has("MASTER_PORT") ? env.number("MASTER_PORT", 1, 65535) : port_of_job(env);
  e.restarts = env.number("SLURM_RESTART_COUNT", 0, INT32_MAX, 0);
}

void read_open_mpi(const Reader& env, RankEnv& e) {
  e.source = "OMPI_COMM_WORLD_RANK";
  e.world = env.number("OMPI_COMM_WORLD_SIZE", 1, kMaxWorld);
  e.rank = env.number("OMPI_COMM_WORLD_RANK", 0, e.world - 1);
  e.local_rank = env.number("OMPI_COMM_WORLD_LOCAL_RANK", 0, kMaxWorld, 0);
  e.local_world = env.number("OMPI_COMM_WORLD_LOCAL_SIZE", 1, kMaxWorld, e.world);
  e.master_addr = env.text("MASTER_ADDR");
  e.master_port = env.number("MASTER_PORT", 1, 65535, kDefaultPort);
  if (e.master_addr.empty() && e.local_world == e.world) e.master_addr = "127.0.0.1";
}

}  // namespace

RankEnv read_rank_env(const GetEnv& get) {
  const Reader env(get);
  RankEnv e;
  if (env.has("RANK") || env.has("WORLD_SIZE"))
    read_torchrun(env, e);
  else if (env.has("SLURM_PROCID"))
    read_slurm(env, e);
  else if (env.has("OMPI_COMM_WORLD_RANK"))
    read_open_mpi(env, e);
  else
    return e;
  check(e.world == 1 || !e.master_addr.empty(), Exit::usage,
        "{} is set, so this is one rank of {}, but MASTER_ADDR is not: set it to the address of "
        "rank 0's machine, on all ranks",
        e.source, e.world);
  e.master_port = env.number("HGRN_MASTER_PORT", 1, 65535, e.master_port);
  check(e.master_port <= 65535, Exit::usage, "port {} does not exist; set HGRN_MASTER_PORT",
        e.master_port);
  e.token = env.text("HGRN_JOB_TOKEN");
  check(e.token.size() <= 256, Exit::usage, "HGRN_JOB_TOKEN is longer than 256 characters");
  e.restarts = env.number("HGRN_RESTARTS", 0, INT32_MAX, e.restarts);
  e.prefixed = env.has("HGRN_LAUNCHED");
  e.join_s = env.seconds("HGRN_JOIN_TIMEOUT", e.join_s);
  e.silence_s = env.seconds("HGRN_RANK_TIMEOUT", e.silence_s);
  e.collective_s = env.seconds("HGRN_COLLECTIVE_TIMEOUT", e.collective_s);
  return e;
}

RankEnv read_rank_env() {
  return read_rank_env([](const char* name) { return std::getenv(name); });
}

}  // namespace hgrn
