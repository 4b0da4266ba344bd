// What a card's arithmetic and memory bandwidth allow: the parts of a training step with their
// FLOPs and the bytes that must move, nothing overlapped. docs/planning.md gives the accounting.
#pragma once
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "model/config.h"

namespace hgrn {

// A card's ceilings. H100 and H200: as measured on them, an 8192^3 bf16 GEMM and a device-to-device
// copy (bytes read and written). A100: NVIDIA's figures times the shares that an H100 reaches.
struct Card {
  const char* name;  // a part of what the driver calls it
  double gemm_flops, bytes_per_s;
  double peak_flops;  // dense bf16, NVIDIA's figure: MFU counts over it
  double memory_gib;  // what the driver shows, rounded down
};
std::span<const Card> cards();
const Card* find_card(std::string_view name);  // null where unknown

// One part of a step, a token.
struct StepPart {
  const char* name;
  bool product;                     // bound by arithmetic, else by memory
  double forward, backward, again;  // FLOPs or bytes; again: recomputation in backward
};
// act_bytes: of an activation, 2 or 4.
std::vector<StepPart> step_parts(const Config& config, int64_t act_bytes);

// Seconds of one card at its ceilings.
struct StepTime {
  double forward = 0, backward = 0;  // of one micro-batch, recomputation in backward
  double update = 0;                 // once a step
};
// parameters: of the model. shards: AdamW's work is divided by it (ZeRO-1).
StepTime step_time(const Config& config, int64_t parameters, int64_t act_bytes, const Card& card,
                   int64_t shards);

}  // namespace hgrn
