// Twin of kernels/*/comm_*: the collectives that src/ops/comm.h promises.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>

#include "ops/comm_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

// What rank r holds: the same numbers wherever they are asked for, exact in `dtype`.
Values values_of(int rank, int64_t n, DType dtype) {
  Values v = normals(size_t(n), unsigned(91 * rank + n));
  if (dtype == DType::bf16) return exact(v);
  if (dtype == DType::f32)
    for (double& x : v) x = double(float(x));
  return v;
}

const std::vector<std::pair<DType, double>> kTypes =
    {  // and the error of a rounding; f64 is the reference too
        {DType::f32, 0x1p-24},
        {DType::f64, 0x1p-52},
        {DType::bf16, 0x1p-8}};

struct Sum {
  Values exact, bound;  // of each element: world - 1 roundings of at most the sum of magnitudes
};

Sum sum_over_ranks(int world, int64_t n, DType dtype, double rounding) {
  Sum s{Values(size_t(n), 0), Values(size_t(n), 0)};
  for (int r = 0; r < world; ++r) {
    const Values v = values_of(r, n, dtype);
    for (size_t i = 0; i < v.size(); ++i) {
      s.exact[i] += v[i];
      s.bound[i] += std::abs(v[i]) * rounding * world;
    }
  }
  return s;
}

bool near(const Values& got, const Sum& want) {
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(got[i] - want.exact[i]) <= want.bound[i])) return false;
  return got.size() == want.exact.size();
}

}  // namespace

TEST_CASE("comm: all_reduce gives every rank the same sum", "[ops][gpu]") {
  for (const Engine& e : engines())
    for (int world : e.worlds)
      for (const auto& [dtype, rounding] : kTypes)
        for (int64_t n : {1, 2, 7, 4099, 300000}) {
          INFO(e.name << ", " << world << " ranks, " << name_of(dtype) << ", n=" << n);
          const DType type = dtype;
          const Sum want = sum_over_ranks(world, n, type, rounding);
          each_rank(
              e, world,
              [&](Rank& me, int r) {
                const Values mine = values_of(r, n, type);
                for (int twice = 0; twice < 2; ++twice) {
                  const Tensor x = me.bench->empty({n}, type);
                  me.bench->fill(x, mine);
                  me.made.push_back(x);
                  me.comm->wait(me.comm->all_reduce(x));
                }
              },
              [&](std::vector<Rank>& ranks) {
                no_errors(ranks);
                const Values first = ranks[0].bench->read(ranks[0].made[0]);
                CHECK(near(first, want));
                for (const Rank& r : ranks)
                  for (const Tensor& x : r.made) CHECK(r.bench->read(x) == first);
              });
        }
}

TEST_CASE("comm: reduce_scatter then all_gather is all_reduce", "[ops][gpu]") {
  constexpr int64_t kPart = 1031;
  for (const Engine& e : engines())
    for (int world : e.worlds)
      for (const auto& [dtype, rounding] : kTypes) {
        INFO(e.name << ", " << world << " ranks, " << name_of(dtype));
        const DType type = dtype;
        const int64_t n = world * kPart;
        const Sum want = sum_over_ranks(world, n, type, rounding);
        each_rank(
            e, world,
            [&](Rank& me, int r) {
              const Tensor x = me.bench->empty({n}, type), whole = me.bench->zeros({n}, type);
              me.bench->fill(x, values_of(r, n, type));
              me.made = {x, whole};
              me.comm->wait(me.comm->reduce_scatter(x));
              const Tensor part = x.slice(r * kPart, kPart);
              (*me.bench)->copy(whole.slice(r * kPart, kPart), part);
              me.comm->wait(me.comm->all_gather(whole));
            },
            [&](std::vector<Rank>& ranks) {
              no_errors(ranks);
              const Values first = ranks[0].bench->read(ranks[0].made[1]);
              CHECK(near(first, want));
              for (const Rank& r : ranks) CHECK(r.bench->read(r.made[1]) == first);
            });
      }
}

// Where the engine has such memory, sums in it may take another way; its sizes are large enough for
// that, and not all of its tensors begin or end where that way would like.
TEST_CASE("comm: sums in memory that ranks share", "[ops][gpu]") {
  constexpr int64_t kRoom = 640000;
  for (const Engine& e : engines())
    for (int world : e.worlds)
      for (const auto& [dtype, rounding] : kTypes)
        for (int64_t n : {int64_t(1) << 19, (int64_t(1) << 19) + 8, (int64_t(1) << 19) + 5}) {
          INFO(e.name << ", " << world << " ranks, " << name_of(dtype) << ", n=" << n);
          const DType type = dtype;
          const Sum want = sum_over_ranks(world, n, type, rounding);
          each_rank(
              e, world,
              [&](Rank& me, int r) {
                const size_t bytes = size_t(kRoom) * size_of(type);
                void* memory = nullptr;
                for (int again = 0; again < 2; ++again) {  // what was given back is had again
                  memory = me.comm->alloc_shared(bytes, bytes);
                  if (again == 0 && memory) me.comm->free_shared(memory);
                }
                Tensor room = me.bench->empty({kRoom}, type);
                if (memory) room = Tensor(memory, type, {kRoom});
                const Values mine = values_of(r, n, type);
                for (int64_t offset : {0, 3, 1024}) {
                  const Tensor x = room.slice(offset, n);
                  me.bench->fill(x, mine);
                  me.comm->wait(me.comm->all_reduce(x));
                  const Tensor kept = me.bench->empty({n}, type);
                  (*me.bench)->copy(kept, x);
                  me.made.push_back(kept);
                }
                const int64_t even = n / world * world;
                const Tensor x = room.slice(0, even);
                me.bench->fill(x, Values(mine.begin(), mine.begin() + even));
                me.comm->wait(me.comm->reduce_scatter(x));
                me.comm->wait(me.comm->all_gather(x));
                const Tensor kept = me.bench->empty({even}, type);
                (*me.bench)->copy(kept, x);
                me.made.push_back(kept);
                (*me.bench)->synchronize();
              },
              [&](std::vector<Rank>& ranks) {
                no_errors(ranks);
                const Values first = ranks[0].bench->read(ranks[0].made[0]);
                CHECK(near(first, want));
                for (const Rank& r : ranks) {
                  for (size_t i = 1; i < 3; ++i) CHECK(near(r.bench->read(r.made[i]), want));
                  CHECK(r.bench->read(r.made[0]) == first);
                  Values scattered = r.bench->read(r.made[3]);
                  scattered.insert(scattered.end(), first.begin() + int64_t(scattered.size()),
                                   first.end());
                  CHECK(near(scattered, want));
                }
              });
        }
}

TEST_CASE("comm: broadcast from every root, and a ticket covers the ones before it", "[ops][gpu]") {
  for (const Engine& e : engines())
    for (int world : e.worlds) {
      INFO(e.name << ", " << world << " ranks");
      each_rank(
          e, world,
          [&](Rank& me, int r) {
            Comm::Ticket last = 0;
            for (int root = 0; root < world; ++root) {
              const Tensor x = me.bench->empty({777}, DType::f32);
              me.bench->fill(x, values_of(r, 777, DType::f32));
              me.made.push_back(x);
              last = me.comm->broadcast(x, root);
            }
            const Tensor nothing = me.bench->empty({0}, DType::f32);
            last = std::max(last, me.comm->all_reduce(nothing));
            me.comm->wait(last);
            me.comm->barrier();
          },
          [&](std::vector<Rank>& ranks) {
            no_errors(ranks);
            for (const Rank& r : ranks)
              for (int root = 0; root < world; ++root)
                CHECK(r.bench->read(r.made[size_t(root)]) == values_of(root, 777, DType::f32));
          });
    }
}

// A collective comes after the work that Ops had, and wait() holds back what Ops gets afterwards.
TEST_CASE("comm: collectives and operations keep their order without the host", "[ops][gpu]") {
  constexpr int64_t kN = 1 << 20;
  for (const Engine& e : engines())
    for (int world : e.worlds) {
      INFO(e.name << ", " << world << " ranks");
      each_rank(
          e, world,
          [&](Rank& me, int) {
            const Tensor x = me.bench->empty({kN}, DType::f32),
                         ones = me.bench->empty({kN}, DType::f32);
            me.bench->fill(ones, Values(size_t(kN), 1.0));
            const Tensor kept = me.bench->empty({kN}, DType::f32);
            me.made = {x, kept};
            (*me.bench)->zero(x);
            for (int i = 0; i < 5; ++i) {
              (*me.bench)->copy(x, ones);  // after the collectives before it
              me.comm->all_reduce(x);
              me.comm->wait(me.comm->all_reduce(x));
              (*me.bench)->copy(kept, x);  // after both
            }
            (*me.bench)->copy(x, ones);
          },
          [&](std::vector<Rank>& ranks) {
            no_errors(ranks);
            for (const Rank& r : ranks) {
              CHECK(r.bench->read(r.made[0]) == Values(size_t(kN), 1.0));
              CHECK(r.bench->read(r.made[1]) == Values(size_t(kN), double(world) * world));
            }
          });
    }
}

// Operations before it, gradients on their way, and operations after it keep their order.
TEST_CASE("comm: agree sums a few numbers in the order of the operations", "[ops][gpu]") {
  constexpr int64_t kN = 1 << 20;
  for (const Engine& e : engines())
    for (int world : e.worlds)
      for (const auto& [dtype, rounding] : kTypes) {
        INFO(e.name << ", " << world << " ranks, " << name_of(dtype));
        const DType type = dtype;
        const Sum want = sum_over_ranks(world, 3, type, rounding);
        each_rank(
            e, world,
            [&](Rank& me, int r) {
              const Tensor large = me.bench->empty({kN}, DType::f32);
              me.bench->fill(large, Values(size_t(kN), 1.0));
              const Tensor mine = me.bench->empty({3}, type), x = me.bench->empty({3}, type);
              me.bench->fill(mine, values_of(r, 3, type));
              for (int i = 0; i < 3; ++i) me.made.push_back(me.bench->empty({3}, type));
              me.made.push_back(me.bench->empty({kN}, DType::f32));
              me.comm->agree(x.slice(0, 0));
              for (size_t i = 0; i < 3; ++i) {
                (*me.bench)->copy(x, mine);
                me.comm->all_reduce(large);  // nobody waits for it but agree()
                me.comm->agree(x);
                (*me.bench)->copy(me.made[i], x);
                if (i == 0) (*me.bench)->copy(me.made[3], large);
              }
              (*me.bench)->zero(x);  // not before the last sum
            },
            [&](std::vector<Rank>& ranks) {
              no_errors(ranks);
              const Values first = ranks[0].bench->read(ranks[0].made[0]);
              CHECK(near(first, want));
              for (const Rank& r : ranks) {
                for (size_t i = 0; i < 3; ++i) CHECK(r.bench->read(r.made[i]) == first);
                CHECK(r.bench->read(r.made[3]) == Values(size_t(kN), double(world)));
              }
            });
      }
}

TEST_CASE("comm: a rank that leaves is an error of the others, with who is to blame", "[ops]") {
  for (const Engine& e : engines()) {
    if (std::string(e.name) != "gloo") continue;  // GPUs: the next test
    const int world = 3;
    std::vector<std::string> said(world);
    each_rank(
        e, world,
        [&](Rank& me, int r) {
          std::raise(SIGPIPE);  // what a write to a peer that is gone may do at any time
          if (r == 1) {
            me.comm.reset();
            return;
          }
          const Tensor x = me.bench->zeros({4096}, DType::f32);
          try {
            me.comm->wait(me.comm->all_reduce(x));
          } catch (const Error& error) {
            said[size_t(r)] = fmt::format("{} {}", int(error.code()), error.what());
          }
        },
        [&](std::vector<Rank>& ranks) { no_errors(ranks); }, /*timeout_s=*/5);
    for (int r : {0, 2}) {
      INFO(said[size_t(r)]);
      CHECK(said[size_t(r)].rfind(fmt::format("1 rank {} of 3: a collective failed", r), 0) == 0);
    }
  }
}

// The device waits for a peer that never comes; the host waits for the device.
TEST_CASE("comm: a collective on a GPU that a rank stays away from is given up", "[ops][gpu]") {
  if (!nccl_built() || cuda_device_count() < 2) WARN("skipped: two GPUs and NCCL are wanted");
  for (const Engine& e : engines()) {
    if (std::string(e.name) != "nccl" || e.worlds.back() < 2) continue;
    // By the news that the run is lost, or by the clock; a sum, or an agreement.
    for (const auto& [told, agrees] : {std::pair(false, false), std::pair(true, false),
                                       std::pair(false, true), std::pair(true, true)}) {
      std::atomic<bool> lost = false;
      const bool news = told, agree = agrees;
      std::vector<std::string> said(2);
      each_rank(
          e, 2,
          [&](Rank& me, int r) {
            const Tensor x = me.bench->zeros({4096}, DType::f32);
            me.comm->wait(me.comm->all_reduce(x));
            (*me.bench)->synchronize();
            me.comm->throw_if_failed();
            if (r == 1) return;
            if (agree)
              me.comm->agree(x);
            else
              me.comm->wait(me.comm->all_reduce(x));
            if (news) lost = true;
            (*me.bench)->synchronize();  // comes back after the abort alone
            try {
              me.comm->throw_if_failed();
            } catch (const Error& error) {
              said[0] = error.what();
            }
            try {
              if (agree)
                me.comm->agree(x);
              else
                me.comm->all_reduce(x);
            } catch (const Error& error) {
              said[1] = error.what();
            }
          },
          [&](std::vector<Rank>& ranks) { no_errors(ranks); }, told ? 60 : 1,
          [&] { return lost.load(); });
      const std::string why = told ? "another rank is lost" : "it did not end within 1 s";
      for (const std::string& text : said) {
        INFO(text);
        CHECK(text.rfind("rank 0 of 2: a collective failed: " + why, 0) == 0);
      }
    }
  }
}

// The run ends while the device waits at an agreement: before memory goes, that is seen.
TEST_CASE("comm: an agreement on a GPU that does not end is found at the end", "[ops][gpu]") {
  if (!nccl_built() || cuda_device_count() < 2) WARN("skipped: two GPUs and NCCL are wanted");
  for (const Engine& e : engines()) {
    if (std::string(e.name) != "nccl" || e.worlds.back() < 2) continue;
    std::string said;
    bool idle = false;
    each_rank(
        e, 2,
        [&](Rank& me, int r) {
          const Tensor x = me.bench->zeros({3}, DType::f64);
          me.comm->agree(x);
          (*me.bench)->synchronize();
          if (r == 1) return;
          me.comm->agree(x);
          idle = me.comm->close();
          try {
            me.comm->throw_if_failed();
          } catch (const Error& error) {
            said = error.what();
          }
        },
        [&](std::vector<Rank>& ranks) { no_errors(ranks); });
    INFO(said);
    CHECK(idle);
    CHECK(said.find("it had not ended when the run did") != std::string::npos);
  }
}
