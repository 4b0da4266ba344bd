// `hgrn plan`: what a config costs, without a device.
#pragma once
#include <string>

#include "model/config.h"

namespace hgrn {

struct PlanOptions {
  int64_t gpus = 1;
  double device_memory_gib = 80;
  bool cpu = false;  // plan for the CPU backend
};

// Text tables: parameters by kind, memory by kind a device, FLOPs a token, the largest micro-batch
// that fits, tokens/s that the roofline allows.
std::string plan_text(const Config& config, const PlanOptions& options);

}  // namespace hgrn
