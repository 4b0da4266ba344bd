// Batches of token sequences from shards, for training and for validation.
//
// A shard of `count` tokens holds floor((count-1)/T) sequences: sequence s reads tokens
// sT .. sT+T-1 and predicts sT+1 .. sT+T. None crosses shards. Which sequence a global sample
// index names is told by sample_order.h.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace hgrn {

struct DataSource {
  std::string path;   // a glob over shards
  double weight = 1;  // share in the mixture, relative to the other sources
};

struct LoaderOptions {
  std::vector<DataSource> sources;
  int64_t seq_len = 0;       // T
  int64_t micro_batch = 0;   // B, sequences
  int64_t global_batch = 0;  // G, sequences over all ranks and accumulation steps
  int64_t vocab_size = 0;
  bool shuffle = true;
  uint64_t seed = 0;
  int32_t reset_token = -1;  // reset_at_eos: the end-of-text id; -1: off
  int rank = 0, world = 1;
  int64_t first_sample = 0;  // global sample index of the first step's first row
  int prefetch = 4;          // batches prepared ahead
};

struct Batch {
  int64_t B = 0, T = 0;
  int64_t first_sample = 0;      // global sample index of row 0; rows are consecutive
  std::vector<int32_t> inputs;   // (B,T)
  std::vector<int32_t> targets;  // (B,T); -1: not scored
  std::vector<uint8_t> reset;    // (B,T), 1: zero the state before this input; empty when off
};

// Endless stream of micro-batches: at step s rank r gets samples
// first_sample + sG + rG/W .. first_sample + sG + (r+1)G/W - 1, in pieces of B.
// A background thread reads ahead. One thread at a time may call next().
class DataLoader {
 public:
  // Exit::usage where the batch sizes do not divide, Exit::data where a source has no sequence.
  explicit DataLoader(LoaderOptions options);
  ~DataLoader();
  DataLoader(const DataLoader&) = delete;
  DataLoader& operator=(const DataLoader&) = delete;

  Batch next();  // rethrows what the background thread met, at the batch where it met it

  int64_t sequences() const;                      // of all sources, one epoch each
  int64_t tokens() const;                         // in all shards
  std::vector<int64_t> by_source() const;         // sequences of each source
  const std::vector<std::string>& files() const;  // every shard, in order

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct ValidOptions {
  std::string path;  // a glob over shards
  int64_t seq_len = 0, batch = 0, vocab_size = 0;
  int64_t max_tokens = 0;    // scored tokens over all ranks; 0: all
  int32_t reset_token = -1;  // as in LoaderOptions
  int rank = 0, world = 1;   // batch k of the pass goes to rank k mod world
};

// One pass over validation shards, in order, every token scored once: the sequences of each shard
// and its last partial one. Batches always have B rows of T; what is missing has input 0 and
// target -1. Every rank gets the same number of batches, the last ones perhaps without any target.
class ValidLoader {
 public:
  explicit ValidLoader(ValidOptions options);
  ~ValidLoader();
  ValidLoader(const ValidLoader&) = delete;
  ValidLoader& operator=(const ValidLoader&) = delete;

  bool next(Batch& batch);  // false at the end of the pass
  void rewind();
  int64_t tokens() const;   // scored in one pass, over all ranks
  int64_t batches() const;  // of this rank, one pass

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hgrn
