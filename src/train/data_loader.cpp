#include "train/data_loader.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "core/check.h"
#include "text/shard.h"
#include "train/sample_order.h"

namespace hgrn {
namespace {

void check_sizes(int64_t seq_len, int64_t batch, int rank, int world) {
  check(seq_len >= 1, Exit::usage, "data.seq_len is {}; it must be at least 1", seq_len);
  check(batch >= 1, Exit::usage, "train.micro_batch is {}; it must be at least 1", batch);
  check(world >= 1 && rank >= 0 && rank < world, "rank {} of {}", rank, world);
}

// One row of `n` targets (n <= T) from token `first` of a shard; the rest of the row is padding.
void fill_row(Batch& batch, int64_t row, const Shard& shard, int64_t first, int64_t n,
              int64_t vocab_size, int32_t reset_token, std::vector<int32_t>& tokens) {
  const int64_t T = batch.T;
  tokens.resize(size_t(n) + 1);
  shard.read(first, n + 1, tokens.data(), vocab_size);
  std::copy_n(tokens.begin(), n, batch.inputs.begin() + row * T);
  std::copy_n(tokens.begin() + 1, n, batch.targets.begin() + row * T);
  if (batch.reset.empty()) return;
  for (int64_t t = 0; t < n; ++t)
    batch.reset[size_t(row * T + t)] = tokens[size_t(t)] == reset_token;
}

// B rows of padding.
Batch empty_batch(int64_t B, int64_t T, int64_t first_sample, bool with_reset) {
  Batch batch;
  batch.B = B, batch.T = T, batch.first_sample = first_sample;
  batch.inputs.assign(size_t(B * T), 0);
  batch.targets.assign(size_t(B * T), -1);
  if (with_reset) batch.reset.assign(size_t(B * T), 0);
  return batch;
}

// A source's shards as one list of sequences.
struct Sequences {
  std::vector<Shard> shards;
  std::vector<int64_t> end;  // end[i]: sequences in shards 0..i

  Sequences(const DataSource& source, int64_t T) {
    int64_t tokens = 0, total = 0;
    for (const std::string& path : expand_glob(source.path, "data.train")) {
      const Shard& shard = shards.emplace_back(path);
      tokens += shard.count();
      total += std::max<int64_t>(0, shard.count() - 1) / T;
      end.push_back(total);
    }
    check(total > 0, Exit::data,
          "data.train: the {} tokens in {} file(s) of '{}' hold no sequence: each file needs "
          "data.seq_len+1 = {} tokens; lower data.seq_len or give more text",
          tokens, shards.size(), source.path, T + 1);
  }
  int64_t count() const { return end.back(); }
};

}  // namespace

// ---- training

struct DataLoader::Impl {
  explicit Impl(LoaderOptions o) : options(std::move(o)) {
    check_sizes(options.seq_len, options.micro_batch, options.rank, options.world);
    check(options.prefetch >= 1 && options.first_sample >= 0, "prefetch {}, first_sample {}",
          options.prefetch, options.first_sample);
    const int64_t G = options.global_batch, unit = options.micro_batch * options.world;
    check(G >= 1 && G % unit == 0, Exit::usage,
          "train.global_batch {} does not divide by {} ranks x micro_batch {} = {}; the nearest "
          "that does is {}",
          G, options.world, options.micro_batch, unit,
          std::max<int64_t>(1, (G + unit / 2) / unit) * unit);
    std::vector<int64_t> counts;
    std::vector<double> weights;
    for (const DataSource& source : options.sources) {
      const Sequences& opened = sources.emplace_back(source, options.seq_len);
      counts.push_back(opened.count());
      weights.push_back(source.weight);
      for (const Shard& shard : opened.shards) {
        files.push_back(shard.path());
        tokens += shard.count();
      }
    }
    order = std::make_unique<SampleOrder>(counts, weights, options.seed, options.shuffle);
    worker = std::thread([this] { work(); });
  }

  ~Impl() {
    {
      std::lock_guard lock(mutex);
      stop = true;
    }
    room.notify_all();
    worker.join();
  }

  // Micro-batch n (from 0) of this rank.
  Batch make(int64_t n, std::vector<int32_t>& scratch) const {
    const int64_t share = options.global_batch / options.world,
                  pieces = share / options.micro_batch;
    const int64_t first = options.first_sample + n / pieces * options.global_batch +
                          options.rank * share + n % pieces * options.micro_batch;
    const int64_t T = options.seq_len;
    Batch batch = empty_batch(options.micro_batch, T, first, options.reset_token >= 0);
    for (int64_t row = 0; row < batch.B; ++row) {
      const SampleOrder::Sample sample = order->at(first + row);
      const Sequences& source = sources[size_t(sample.source)];
      const size_t shard =
          size_t(std::upper_bound(source.end.begin(), source.end.end(), sample.sequence) -
                 source.end.begin());
      const int64_t in_shard = sample.sequence - (shard ? source.end[shard - 1] : 0);
      fill_row(batch, row, source.shards[shard], in_shard * T, T, options.vocab_size,
               options.reset_token, scratch);
    }
    return batch;
  }

  void work() {
    std::vector<int32_t> scratch;
    for (int64_t n = 0;; ++n) {
      Batch batch;
      std::exception_ptr met;
      try {
        batch = make(n, scratch);
      } catch (...) {
        met = std::current_exception();
      }
      std::unique_lock lock(mutex);
      room.wait(lock, [&] { return stop || int(ready.size()) < options.prefetch; });
      if (stop) return;
      if (met)
        error = met;
      else
        ready.push_back(std::move(batch));
      filled.notify_one();
      if (met) return;
    }
  }

  Batch next() {
    std::unique_lock lock(mutex);
    filled.wait(lock, [&] { return !ready.empty() || error; });
    if (ready.empty()) std::rethrow_exception(error);
    Batch batch = std::move(ready.front());
    ready.pop_front();
    room.notify_one();
    return batch;
  }

  LoaderOptions options;
  std::vector<Sequences> sources;
  std::vector<std::string> files;
  int64_t tokens = 0;
  std::unique_ptr<SampleOrder> order;

  std::mutex mutex;  // of all below
  std::condition_variable room, filled;
  std::deque<Batch> ready;
  std::exception_ptr error;
  bool stop = false;
  std::thread worker;
};

DataLoader::DataLoader(LoaderOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
DataLoader::~DataLoader() = default;
Batch DataLoader::next() {
  return impl_->next();
}
int64_t DataLoader::sequences() const {
  int64_t sum = 0;
  for (const Sequences& source : impl_->sources) sum += source.count();
  return sum;
}
int64_t DataLoader::tokens() const {
  return impl_->tokens;
}
std::vector<int64_t> DataLoader::by_source() const {
  std::vector<int64_t> counts;
  for (const Sequences& source : impl_->sources) counts.push_back(source.count());
  return counts;
}
const std::vector<std::string>& DataLoader::files() const {
  return impl_->files;
}

// ---- validation

struct ValidLoader::Impl {
  explicit Impl(ValidOptions o) : options(std::move(o)) {
    check_sizes(options.seq_len, options.batch, options.rank, options.world);
    int64_t left = options.max_tokens > 0 ? options.max_tokens : INT64_MAX;
    for (const std::string& path : expand_glob(options.path, "data.valid")) {
      Part part{Shard(path), 0, 0};
      part.targets = std::min(left, std::max<int64_t>(0, part.shard.count() - 1));
      rows += (part.targets + options.seq_len - 1) / options.seq_len;
      part.end = rows;
      left -= part.targets;
      tokens += part.targets;
      parts.push_back(std::move(part));
    }
    check(tokens > 0, Exit::data,
          "data.valid: the {} file(s) of '{}' hold no token to predict; give more text",
          parts.size(), options.path);
    const int64_t round = options.batch * options.world;
    batches = (rows + round - 1) / round;
  }

  bool next(Batch& batch) {
    if (done == batches) return false;
    const int64_t B = options.batch, T = options.seq_len;
    const int64_t first = (done++ * options.world + options.rank) * B;
    batch = empty_batch(B, T, first, options.reset_token >= 0);
    for (int64_t row = 0; row < B && first + row < rows; ++row) {
      const auto part = std::upper_bound(parts.begin(), parts.end(), first + row,
                                         [](int64_t r, const Part& p) { return r < p.end; });
      const int64_t start = part == parts.begin() ? 0 : (part - 1)->end;
      const int64_t at = (first + row - start) * T;
      fill_row(batch, row, part->shard, at, std::min(T, part->targets - at), options.vocab_size,
               options.reset_token, scratch);
    }
    return true;
  }

  struct Part {
    Shard shard;
    int64_t targets;  // scored tokens
    int64_t end;      // rows in this and the earlier parts
  };
  ValidOptions options;
  std::vector<Part> parts;
  std::vector<int32_t> scratch;
  int64_t rows = 0, tokens = 0, batches = 0;
  int64_t done = 0;  // batches given out in this pass
};

ValidLoader::ValidLoader(ValidOptions options)
    : impl_(std::make_unique<Impl>(std::move(options))) {}
ValidLoader::~ValidLoader() = default;
bool ValidLoader::next(Batch& batch) {
  return impl_->next(batch);
}
void ValidLoader::rewind() {
  impl_->done = 0;
}
int64_t ValidLoader::tokens() const {
  return impl_->tokens;
}
int64_t ValidLoader::batches() const {
  return impl_->batches;
}

}  // namespace hgrn
