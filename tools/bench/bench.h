// What hgrn-bench shares: timing, and a model with everything a training step needs.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/lm.h"
#include "train/optimizer.h"

namespace hgrn {
class Ranks;
}

namespace hgrn::bench {

// Median milliseconds of `runs` calls after `warmup`, the device waited for in each.
double median_ms(Ops& ops, int warmup, int runs, const std::function<void()>& f);
double median(std::vector<double> v);  // of an even number the upper one

struct OpTime {
  std::string name, shape;
  double us = 0, flops = 0, bytes = 0;  // bytes: what must move, each input and output once
  double copy_us = 0;  // of a copy that moves as many bytes, where no products are in it
};
// Every operation of a training step at the config's shapes; `only`: a name, or empty for all.
std::vector<OpTime> time_ops(Ops& ops, const Config& config, const std::string& only);

struct OpShare {
  std::string name;
  int64_t calls = 0;
  double ms = 0;  // of one step
};

struct StepTime {
  // As the trainer runs it; on a GPU with forward and backward recorded, and the next step started
  // before the host waits for this one. Then without the recording, the host waiting in every step.
  double ms = 0, waiting_ms = 0, tokens_per_s = 0, mfu = -1;
  double memory_gib = 0;   // in use on the device, of all processes
  double context_gib = 0;  // of which before the model was laid out
  int64_t tokens = 0;
  std::vector<OpShare> breakdown;  // of one step, the longest first, less what marks cost
  double breakdown_ms = 0;         // that whole step with its marks, on the device's own clock
  double between_ms = 0;           // as `ms`, of steps between those; on the CPU `ms` itself
  double mark_us = 0;              // what one operation's marks cost
};
// Whole optimizer steps of `micro_batches` on random tokens.
StepTime time_step(Ops& ops, const Config& config, int steps, int64_t micro_batches);

struct ProductTime {
  std::string name;
  Product product;
  int64_t calls = 0;  // in a step of one micro-batch
  std::vector<ProductTrial> trials;
  double tflops(const ProductTrial& t) const;
  const ProductTrial& best() const;
  const ProductTrial& chosen() const;
};
// Every matrix product of a training step, by algorithms of the backend's library, as each is
// timed. Fails where the backend has no choice.
void time_products(Ops& ops, const Config& config, const ProductTrials& what,
                   const std::function<void(const ProductTime&)>& timed);

struct CommTime {
  int ranks = 1, zero = 0;
  int64_t tokens = 0;  // of one step, over all ranks
  double tokens_per_s = 0;
  double whole_ms = 0, silent_ms = 0, alone_ms = 0;  // comm.cpp; the last two for several ranks
  double host_ms = 0;       // of a whole step: that collectives kept the host which began them
  double agreement_ms = 0;  // of a silent step: the device waits for the other ranks, mean of all
  int64_t calls = 0, bytes = 0;  // of the collectives of one step
  double state_gib = 0;          // weights, gradients, moments of one rank
  double memory_gib = 0;         // in use on its GPU, of all processes
};
// Steps of a config on random tokens over the ranks of this run, with and without communication.
CommTime time_comm(Ranks& ranks, Ops& ops, const Config& config, int runs);

struct GenerateTime {
  double tokens_per_s = 0;    // over all rows, without the first token
  double first_token_ms = 0;  // prompt included
  double memory_start_gib = 0, memory_end_gib = 0;
};
// Random weights and prompts of `prompt` tokens; `tokens` more of each of `batch` rows are sampled.
GenerateTime time_generate(Ops& ops, const Config& config, int64_t batch, int64_t prompt,
                           int64_t tokens);

}  // namespace hgrn::bench
