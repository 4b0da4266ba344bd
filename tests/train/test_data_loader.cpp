#include "train/data_loader.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "catch.h"
#include "text/shard.h"
#include "text/shard_files.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

// Shards whose token i of shard k is 1000 k + i: a row's first token names its sequence.
struct Files {
  TempFolder folder;
  explicit Files(const std::vector<int>& counts) {
    for (size_t k = 0; k < counts.size(); ++k)
      write_range(folder / fmt::format("s_{}.bin", k), 1000 * int(k), counts[k]);
  }
  LoaderOptions options(int64_t T, int64_t micro, int64_t global) const {
    LoaderOptions o;
    o.sources = {{folder / "s_*.bin", 1}};
    o.seq_len = T, o.micro_batch = micro, o.global_batch = global;
    o.vocab_size = 65'536;
    return o;
  }
  ValidOptions valid(int64_t T, int64_t batch) const {
    ValidOptions o;
    o.path = folder / "s_*.bin";
    o.seq_len = T, o.batch = batch, o.vocab_size = 65'536;
    return o;
  }
};

// Row r of a batch as its inputs followed by its last target, after checking that targets are
// inputs moved by one.
std::vector<int32_t> row_of(const Batch& batch, int64_t r) {
  const auto in = batch.inputs.begin() + r * batch.T, target = batch.targets.begin() + r * batch.T;
  REQUIRE(std::equal(in + 1, in + batch.T, target));
  std::vector<int32_t> row(in, in + batch.T);
  row.push_back(*(target + batch.T - 1));
  return row;
}

// The first tokens of `samples` rows, by global sample index, from all ranks.
std::vector<int32_t> firsts(LoaderOptions options, int64_t samples) {
  std::vector<int32_t> seen(size_t(samples), -1);
  const int64_t base = options.first_sample;
  for (options.rank = 0; options.rank < options.world; ++options.rank) {
    DataLoader loader(options);
    for (int64_t got = 0; got < samples / options.world;) {
      const Batch batch = loader.next();
      REQUIRE(batch.B == options.micro_batch);
      for (int64_t r = 0; r < batch.B; ++r, ++got) {
        int32_t& slot = seen.at(size_t(batch.first_sample - base + r));
        REQUIRE(slot == -1);  // no sample is given out twice
        slot = row_of(batch, r)[0];
      }
    }
  }
  return seen;
}

}  // namespace

TEST_CASE("a shard holds floor((count-1)/T) sequences and none crosses shards", "[train]") {
  Files files({0, 1, 8, 9, 16, 17, 18});  // with T = 8: 0, 0, 0, 1, 1, 2, 2 sequences
  LoaderOptions options = files.options(8, 1, 1);
  options.shuffle = false;
  DataLoader loader(options);
  CHECK(loader.sequences() == 6);
  CHECK(loader.by_source() == std::vector<int64_t>{6});
  CHECK(loader.tokens() == 69);
  CHECK(loader.files().size() == 7);
  for (int epoch = 0; epoch < 2; ++epoch)
    for (int32_t first : {3000, 4000, 5000, 5008, 6000, 6008}) {  // in order, again and again
      const std::vector<int32_t> row = row_of(loader.next(), 0);
      for (int32_t t = 0; t <= 8; ++t) CHECK(row[size_t(t)] == first + t);
    }
}

TEST_CASE("a shuffled epoch shows every sequence once; the next one in another order", "[train]") {
  Files files({400, 800, 161});  // T = 8: 49 + 99 + 20
  const std::vector<int32_t> seen = firsts(files.options(8, 4, 4), 2 * 168);
  const std::set<int32_t> once(seen.begin(), seen.begin() + 168);
  CHECK(once.size() == 168);
  CHECK(std::set<int32_t>(seen.begin() + 168, seen.end()) == once);
  CHECK_FALSE(std::equal(seen.begin(), seen.begin() + 168, seen.begin() + 168));
  CHECK_FALSE(std::is_sorted(seen.begin(), seen.begin() + 168));
  LoaderOptions other = files.options(8, 4, 4);
  other.seed = 1;
  CHECK(firsts(other, 168) != std::vector<int32_t>(seen.begin(), seen.begin() + 168));
}

TEST_CASE("ranks and micro-batches change no global batch", "[train]") {
  Files files({500, 900});
  const std::vector<int32_t> wanted = firsts(files.options(8, 8, 8), 64);
  for (int world : {1, 2, 4, 8})
    for (int64_t micro = 8 / world; micro >= 1; micro /= 2) {
      LoaderOptions options = files.options(8, micro, 8);
      options.world = world;
      INFO("world " << world << " micro " << micro);
      CHECK(firsts(options, 64) == wanted);
    }
}

TEST_CASE("a rank's share of a step is one run of rows in pieces of the micro-batch", "[train]") {
  Files files({900});
  LoaderOptions options = files.options(8, 2, 12);
  options.world = 2, options.rank = 1, options.first_sample = 24;
  DataLoader loader(options);
  for (int64_t first : {30, 32, 34, 42, 44, 46, 54}) CHECK(loader.next().first_sample == first);
}

TEST_CASE("starting at first_sample equals skipping to it", "[train]") {
  Files files({500, 900});
  const std::vector<int32_t> all = firsts(files.options(8, 4, 8), 400);
  for (int64_t first : {8, 104, 168, 344, 13}) {  // 13: not a multiple of this global batch
    LoaderOptions options = files.options(8, 4, 8);
    options.first_sample = first;
    CHECK(firsts(options, 56) ==
          std::vector<int32_t>(all.begin() + first, all.begin() + first + 56));
  }
  LoaderOptions far = files.options(8, 4, 8);
  far.first_sample = int64_t(1) << 55;  // O(1), and no overflow
  CHECK(firsts(far, 8).size() == 8);
}

TEST_CASE("a mixture draws its sources by weight", "[train]") {
  Files files({900, 801, 81});
  LoaderOptions options = files.options(8, 5, 10);
  options.sources = {{files.folder / "s_0.bin", 0.6}, {files.folder / "s_[12].bin", 0.4}};
  DataLoader loader(options);
  CHECK(loader.by_source() == std::vector<int64_t>{112, 110});
  const std::vector<int32_t> seen = firsts(options, 500);
  int64_t from_first = 0;
  std::set<int32_t> different;
  for (size_t g = 0; g < seen.size(); ++g) {
    from_first += seen[g] < 1000;
    if (seen[g] >= 1000 && different.size() < 110) CHECK(different.insert(seen[g]).second);
    CHECK(std::abs(double(from_first) - 0.6 * double(g + 1)) < 1);
  }
  CHECK(different.size() == 110);  // an epoch of the second source, each sequence once
}

TEST_CASE("the reset mask marks the end-of-text inputs", "[train]") {
  Files files({900});
  LoaderOptions options = files.options(8, 2, 2);
  options.reset_token = 11;
  options.shuffle = false;
  DataLoader loader(options);
  const Batch batch = loader.next();
  std::vector<uint8_t> wanted(16, 0);
  wanted[11] = 1;  // row 1, t = 3
  CHECK(batch.reset == wanted);
  options.reset_token = -1;
  CHECK(DataLoader(options).next().reset.empty());
}

TEST_CASE("what the background thread meets comes out of next(), at its place", "[train]") {
  Files files({900});
  LoaderOptions options = files.options(8, 1, 1);
  options.shuffle = false;
  options.vocab_size = 20;  // tokens 20, 21, ... are outside: sequence 2 is the first with one
  for (int prefetch : {1, 4}) {
    options.prefetch = prefetch;
    DataLoader loader(options);
    CHECK(row_of(loader.next(), 0)[0] == 0);
    CHECK(row_of(loader.next(), 0)[0] == 8);
    for (int time = 0; time < 2; ++time) {
      const Error error = error_of([&] { loader.next(); });
      CHECK(error.code() == Exit::data);
      CHECK(has(error, "s_0.bin"));
      CHECK(has(error, "token 20 (offset 1064)"));
    }
  }
}

TEST_CASE("a shard that shrinks during training is an error with its name", "[train]") {
  Files files({60'000});
  LoaderOptions options = files.options(1024, 4, 4);
  DataLoader loader(options);
  (void)loader.next();
  REQUIRE(::truncate((files.folder / "s_0.bin").c_str(), 1024) == 0);
  const Error error = error_of([&] {
    for (int i = 0; i < 10; ++i) (void)loader.next();
  });
  CHECK(error.code() == Exit::data);
  CHECK(has(error, "s_0.bin shrank"));
}

// Positions are 64-bit all the way from the sample index to the byte.
TEST_CASE("shards above 2^31 tokens and 2 GiB are read at their true positions", "[train]") {
  TempFolder folder;
  const int64_t big = int64_t(1) << 32, T = 64;
  // Two shards of 2^32 + 100 T + 1 and 2^31 + 1 tokens: 8 GiB and 4 GiB.
  const std::string a = folder / "s_0.bin", b = folder / "s_1.bin";
  if (!write_sparse(a, big + 100 * T + 1, false) || !write_sparse(b, big / 2 + 1, false)) {
    WARN("the file system holds no sparse file of 8 GiB: skipped");
    return;
  }
  const int64_t in_a = big / T + 100, in_b = big / 2 / T;
  // Sequences on both sides of 2^31 and 2^32 tokens and of 2^31 bytes, the last of a, and of b.
  const std::vector<std::pair<int64_t, int64_t>> places = {
      // sample, token of shard a (or b)
      {(int64_t(1) << 30) / T, int64_t(1) << 30},
      {big / 2 / T - 1, big / 2 - T},
      {big / 2 / T, big / 2},
      {big / T, big},
      {in_a - 1, big + 99 * T},
      {in_a, 0},
      {in_a + in_b - 1, big / 2 - T}};
  uint16_t token = 1000;
  for (const auto& [sample, at] : places) put_token(sample < in_a ? a : b, at, token++);
  LoaderOptions o;
  o.sources = {{folder / "s_*.bin", 1}};
  o.seq_len = T, o.micro_batch = 1, o.global_batch = 1, o.vocab_size = 65'536, o.shuffle = false;
  token = 1000;
  for (const auto& place : places) {
    o.first_sample = place.first;
    INFO("sample " << place.first);
    DataLoader loader(o);
    CHECK(loader.sequences() == in_a + in_b);
    CHECK(loader.tokens() == big + 100 * T + 1 + big / 2 + 1);
    const Batch batch = loader.next();
    CHECK(batch.first_sample == place.first);
    CHECK(batch.inputs[0] == token++);
    CHECK(batch.inputs[1] == 0);
    o.first_sample += (in_a + in_b) * 3;  // epochs later
    CHECK(DataLoader(o).next().inputs == batch.inputs);
  }
  // One token a sequence: more than 2^32 of them, also in a shuffled order.
  o.seq_len = 1, o.first_sample = big + 5;
  put_token(a, big + 5, 77);
  CHECK(DataLoader(o).next().inputs[0] == 77);
  o.shuffle = true;
  CHECK(DataLoader(o).sequences() == big + 100 * T + big / 2);
  CHECK_NOTHROW(DataLoader(o).next());

  ValidOptions v;
  v.path = folder / "s_*.bin", v.seq_len = T, v.batch = 1, v.vocab_size = 65'536;
  const ValidLoader valid(v);
  CHECK(valid.tokens() == big + 100 * T + big / 2);
  CHECK(valid.batches() == in_a + in_b);
}

TEST_CASE("loaders end cleanly whatever their queue holds", "[train]") {
  Files files({900});
  for (int i = 0; i < 30; ++i) {
    LoaderOptions options = files.options(8, 4, 8);
    options.prefetch = 1 + i % 3;
    DataLoader loader(options);
    for (int n = 0; n < i % 4; ++n) CHECK(loader.next().B == 4);
  }
}

TEST_CASE("options that do not fit are refused with what would", "[train]") {
  Files files({900, 5});
  const auto refused = [&](const std::function<void(LoaderOptions&)>& change) {
    LoaderOptions options = files.options(8, 4, 8);
    change(options);
    return error_of([&] { DataLoader{options}; });
  };
  const Error batch = refused([](auto& o) { o.global_batch = 30, o.world = 2; });
  CHECK(batch.code() == Exit::usage);
  CHECK(has(batch, "nearest that does is 32"));
  CHECK(has(refused([](auto& o) { o.global_batch = 1; }), "nearest that does is 4"));
  CHECK(refused([](auto& o) { o.seq_len = 0; }).code() == Exit::usage);
  CHECK(refused([](auto& o) { o.micro_batch = 0; }).code() == Exit::usage);
  CHECK(refused([](auto& o) { o.sources[0].weight = 0; }).code() == Exit::usage);
  CHECK(refused([](auto& o) { o.sources.clear(); }).code() == Exit::usage);
  const Error none = refused([&](auto& o) { o.sources[0].path = files.folder / "x*.bin"; });
  CHECK(none.code() == Exit::data);
  CHECK(has(none, "data.train"));
  const Error small = refused([&](auto& o) { o.sources.push_back({files.folder / "s_1.bin", 1}); });
  CHECK(small.code() == Exit::data);
  CHECK(has(small, "seq_len+1 = 9"));
}

TEST_CASE("validation scores every token once, in order, the partial sequences too", "[train]") {
  Files files({1, 20, 9, 2});  // T = 8: rows of 8+8+3, 8, 1 targets
  ValidLoader loader(files.valid(8, 2));
  CHECK(loader.tokens() == 19 + 8 + 1);
  CHECK(loader.batches() == 3);
  std::vector<int32_t> wanted;
  for (int32_t t = 1; t < 20; ++t) wanted.push_back(1000 + t);
  for (int32_t t = 1; t < 9; ++t) wanted.push_back(2000 + t);
  wanted.push_back(3001);
  for (int pass = 0; pass < 2; ++pass) {
    std::vector<int32_t> scored;
    int64_t rows = 0;
    for (Batch batch; loader.next(batch);) {
      CHECK(batch.B == 2);
      CHECK(batch.first_sample == rows);
      rows += batch.B;
      REQUIRE(batch.inputs.size() == 16);
      for (size_t i = 0; i < batch.targets.size(); ++i) {
        if (batch.targets[i] == -1) {
          CHECK(batch.inputs[i] == 0);
          continue;
        }
        CHECK(batch.inputs[i] == batch.targets[i] - 1);
        scored.push_back(batch.targets[i]);
      }
    }
    CHECK(scored == wanted);
    Batch none;
    CHECK_FALSE(loader.next(none));
    loader.rewind();
  }
}

TEST_CASE("validation stops at its token limit and is dealt over ranks", "[train]") {
  Files files({500, 40});
  for (int64_t limit : {0, 1, 8, 9, 100, 510, 9999})
    for (int world : {1, 2, 3}) {
      ValidOptions options = files.valid(8, 4);
      options.max_tokens = limit, options.world = world;
      const int64_t all = 499 + 39, wanted = limit == 0 ? all : std::min(limit, all);
      std::multiset<int32_t> scored;
      std::set<int64_t> batches;
      for (options.rank = 0; options.rank < world; ++options.rank) {
        ValidLoader loader(options);
        CHECK(loader.tokens() == wanted);
        int64_t count = 0;
        for (Batch batch; loader.next(batch); ++count)
          for (int32_t target : batch.targets)
            if (target >= 0) scored.insert(target);
        CHECK(count == loader.batches());
        batches.insert(count);
      }
      INFO("limit " << limit << " world " << world);
      CHECK(batches.size() == 1);  // ranks stay in step
      CHECK(int64_t(scored.size()) == wanted);
      CHECK(std::set<int32_t>(scored.begin(), scored.end()).size() == scored.size());
    }
}

TEST_CASE("validation marks resets and refuses bad input", "[train]") {
  Files files({20, 1});
  ValidOptions options = files.valid(8, 4);
  options.reset_token = 9;
  Batch batch;
  CHECK(ValidLoader(options).next(batch));
  std::vector<uint8_t> wanted(32, 0);
  wanted[9] = 1;
  CHECK(batch.reset == wanted);
  options.vocab_size = 10;
  ValidLoader outside(options);
  CHECK(error_of([&] { outside.next(batch); }).code() == Exit::data);
  options.path = files.folder / "s_1.bin";
  const Error error = error_of([&] { ValidLoader{options}; });
  CHECK(error.code() == Exit::data);
  CHECK(has(error, "data.valid"));
}
