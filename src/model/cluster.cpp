#include "model/cluster.h"

#include <algorithm>
#include <cmath>

namespace hgrn {
namespace {

struct Ring {
  const Network& network;
  double gpus, nodes;

  // Seconds and bytes of one pass around the ring: a reduce-scatter or an all-gather of `bytes` in
  // `buckets` pieces. An all-reduce is two.
  double sent(double bytes) const { return bytes * (gpus - 1) / gpus; }
  double link_s(double bytes) const { return sent(bytes) / (network.link_gbs * 1e9); }
  // The ring enters a node once and leaves it once, whatever number of GPUs it has.
  double network_s(double bytes) const {
    return nodes > 1 ? sent(bytes) / (network.network_gbs * 1e9) : 0;
  }
  double seconds(double bytes, double buckets) const {
    const double hops =
        ((gpus - nodes) * network.link_us + (nodes - 1) * network.network_us) * 1e-6;
    return std::max(link_s(bytes), network_s(bytes)) + buckets * hops;
  }
};

double buckets_of(double elements, const Network& network) {
  return std::max(1.0, std::ceil(elements / double(network.bucket_elements)));
}

}  // namespace

ClusterStep cluster_step(const Config& c, const ModelSize& size, int64_t act_bytes,
                         const Card& card, double share, const Network& network, int64_t gpus) {
  const TrainConfig& t = c.train;
  ClusterStep s;
  s.gpus = gpus;
  s.nodes = (gpus + network.gpus_per_node - 1) / network.gpus_per_node;
  const int64_t together = gpus * t.micro_batch;
  s.accumulation = std::max<int64_t>(1, (t.global_batch + together - 1) / together);
  s.sequences = s.accumulation * together;

  const bool sharded = t.zero == 1 && gpus > 1;
  const StepTime time = step_time(c, size.parameters, act_bytes, card, sharded ? gpus : 1);
  s.compute_s = (double(s.accumulation) * (time.forward + time.backward) + time.update) / share;
  if (gpus > 1) {
    const Ring ring{network, double(gpus), double(s.nodes)};
    const double P = double(size.parameters), D = double(c.model.hidden_size);
    // The first layer's gradients are ready last. Those of the embedding are ready before the
    // gradients of q, f and i's weights, 6 D^2 of backward's 4 P operations a token, are made.
    const double rest = P - double(size.first);  // layers and an untied head
    const double last = std::min(rest, std::max(rest / double(c.model.num_hidden_layers),
                                                double(network.bucket_elements / kSmallBuckets)));
    const double first = double(size.first) + last;
    const double products_s = 1.5 * D * D / P * time.backward / share;
    const double grad = t.reduce_dtype == ReduceDType::bf16 ? 2 : 4;
    const double passes = sharded ? 1 : 2;  // reduce-scatter, or an all-reduce
    const double small = 2;                 // buckets at the end of backward
    const double reduce_s = passes * ring.seconds(grad * P, buckets_of(P, network) + small);
    const double first_s =
        passes * ring.seconds(grad * double(size.first), buckets_of(double(size.first), network));
    const double last_s =
        std::max(0.0, first_s - products_s) + passes * ring.seconds(grad * last, 1);
    const double weights = sharded ? double(act_bytes) * P : 0;
    const double gather_s = sharded ? ring.seconds(weights, buckets_of(P, network) + small) : 0;
    const double needed_s =
        sharded ? ring.seconds(double(act_bytes) * first, buckets_of(first, network)) : 0;
    const double moved = passes * grad * P + weights;
    s.bytes = ring.sent(moved);
    s.link_s = ring.link_s(moved);
    s.network_s = ring.network_s(moved);
    s.collective_s = reduce_s + gather_s;
    s.exposed_s = std::max(last_s, reduce_s - time.backward / share) +
                  std::max(needed_s, gather_s - time.forward / share);
  }
  const double step_s = s.compute_s + s.exposed_s;
  s.tokens_per_s = double(s.sequences * c.data.seq_len) / step_s;
  s.efficiency = s.compute_s / step_s;
  return s;
}

}  // namespace hgrn
