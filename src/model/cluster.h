// What several GPUs cost: bytes and time of the collectives of a step and how much of them shows,
// after the order in which train/grad_sync.h sends them. A model of rings, as NCCL forms them, with
// stated bandwidths; docs/planning.md says what is assumed.
#pragma once
#include <cstdint>
#include <vector>

#include "model/config.h"
#include "model/roofline.h"

namespace hgrn {

// Gradients travel in buckets of about so many elements. Smaller ones start earlier; but each costs
// its start, on the wire and by taking multiprocessors from the kernels beside it: with 8
// Mi a step's collectives took half as long again as in one bucket (docs/benchmarks.md).
constexpr int64_t kBucketElements = int64_t(32) << 20;
// Those at the end of backward are smaller, down to 1/kSmallBuckets of it.
constexpr int64_t kSmallBuckets = 8;

struct Network {
  int64_t gpus_per_node = 8;
  double link_gbs = 329;     // bus bandwidth of a collective within a node, GB/s
  double network_gbs = 400;  // of a node, one direction, GB/s
  int64_t bucket_elements = kBucketElements;
  double link_us = 3.4, network_us = 14;  // a hop of the ring
};

struct ModelSize {
  int64_t parameters = 0;
  int64_t first = 0;  // of them those before the first layer: embedding, and what layers share
};

// A step of each of `gpus` GPUs.
struct ClusterStep {
  int64_t gpus = 1, nodes = 1;
  int64_t accumulation = 1;  // micro-batches
  int64_t sequences = 0;     // of the global batch: the config's, or the least that gpus allow
  double bytes = 0;          // that a GPU sends
  double link_s = 0, network_s = 0;  // that they need on either kind of wire alone
  double collective_s = 0;           // the slower of them, and the hops
  double exposed_s = 0;              // of it what neither backward nor forward hides
  double compute_s = 0;
  double tokens_per_s = 0;  // of all GPUs
  double efficiency = 1;    // compute_s over the whole step
};

// share: of the roofline that the card's own work reaches.
ClusterStep cluster_step(const Config& config, const ModelSize& size, int64_t act_bytes,
                         const Card& card, double share, const Network& network, int64_t gpus);

}  // namespace hgrn
