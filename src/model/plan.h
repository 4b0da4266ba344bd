// `hgrn plan`: what a config costs, without a device.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/arena.h"
#include "model/cluster.h"
#include "model/config.h"
#include "model/roofline.h"

namespace hgrn {

// What CUDA's context, the loaded kernels and cuBLASLt's workspace take on a device; measured
// (docs/benchmarks.md).
constexpr double kContextGiB = 0.6;

struct PlanOptions {
  int64_t gpus = 1;
  double device_memory_gib = 0;          // 0: the card's, 80 where none is named
  bool cpu = false;                      // plan for the CPU backend
  std::string card{};                    // "H100", ...; empty: H100
  double tflops = 0, bandwidth_gbs = 0;  // of another device; both or none
  // What training steps reach of the roofline; measured (docs/planning.md).
  double share = 0.75;
  double tokens = 0;  // budget; 0: the run's
  double price = 0;   // of a GPU and hour; 0: unknown
  Network network{};
};

// Bytes of one process, by the names that the arenas have.
struct MemoryPlan {
  std::vector<Arena::Row> rows;
  size_t peak = 0;       // temporaries share memory: less than the sum of the rows
  size_t host_save = 0;  // in the memory of rank 0's host, while a checkpoint is saved
};

struct Roofline {
  std::string name;
  double tokens_per_s = 0, expected = 0, mfu = 0;  // of all GPUs; mfu of `expected`
};

struct Saving {
  Recompute recompute = Recompute::none;
  int64_t zero = 0;
  bool configured = false;
  size_t peak = 0;
  int64_t largest = 0;      // micro-batch that fits
  double tokens_per_s = 0;  // expected
};

struct ScaleRow {
  ClusterStep step;
  size_t peak = 0;  // memory of a GPU
};

struct Plan {
  Config config;
  PlanOptions options;
  std::map<std::string, int64_t> parameters;  // by kind
  int64_t total_parameters = 0;
  MemoryPlan memory;
  double flops_per_token = 0;
  double device_memory_gib = 0;
  int64_t largest_micro_batch = 0;
  Card card{};  // that costs and the table are reckoned with; no rate where nothing is known
  std::vector<Roofline> rooflines;
  std::vector<Saving> savings;
  std::vector<ScaleRow> scaling;
  double budget_tokens = 0, hours = 0;  // on options.gpus
};

// Exit::usage for a card that is not known or options that do not fit together.
Plan make_plan(const Config& config, const PlanOptions& options);

std::string plan_text(const Plan& plan);
std::string plan_json(const Plan& plan);
inline std::string plan_text(const Config& config, const PlanOptions& options) {
  return plan_text(make_plan(config, options));
}

// Bytes of a training process on one device: everything it allocates, and on a GPU what CUDA's
// context and the libraries keep. What plan_text() calls the peak.
size_t planned_bytes(const Config& config, const PlanOptions& options);

// The largest B for which bytes(B) <= room; 0 if there is none. bytes() must not fall.
int64_t largest_micro_batch(const std::function<size_t(int64_t)>& bytes, double room);

// "100B", "1.5T", "250M", "3e9": a count of tokens. Exit::usage.
double parse_tokens(const std::string& text);

}  // namespace hgrn
