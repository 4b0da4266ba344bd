// `hgrn plan`: what a config costs, without a device.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "model/config.h"

namespace hgrn {

// A card's ceilings as measured on it: an 8192^3 bf16 GEMM, a device-to-device copy (bytes read and
// written).
struct Card {
  const char* name;  // a part of what the driver calls it
  double gemm_flops, bytes_per_s;
};
std::span<const Card> cards();

// What CUDA's context, the loaded kernels and cuBLASLt's workspace take on a device; measured
// (docs/benchmarks.md).
constexpr double kContextGiB = 0.6;

struct PlanOptions {
  int64_t gpus = 1;
  double device_memory_gib = 80;
  bool cpu = false;  // plan for the CPU backend
};

// Text tables: parameters by kind, memory by kind a device, FLOPs a token, the largest micro-batch
// that fits, tokens/s that the roofline allows.
std::string plan_text(const Config& config, const PlanOptions& options);

// Bytes of a training process on one device: everything it allocates, and on a GPU what CUDA's
// context and the libraries keep. What plan_text() calls the peak.
size_t planned_bytes(const Config& config, const PlanOptions& options);

// The largest B for which bytes(B) <= room; 0 if there is none. bytes() must not fall.
int64_t largest_micro_batch(const std::function<size_t(int64_t)>& bytes, double room);

}  // namespace hgrn
