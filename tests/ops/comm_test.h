// Ranks as threads of the test's process, on each engine that this build and machine have. Gloo
// runs anywhere; NCCL wants a GPU a rank, and one GPU tests it with one rank.
#pragma once
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "ops/comm.h"
#include "ops/op_test.h"

namespace hgrn::test {

class MemoryStore final : public KeyValueStore {
 public:
  void set(const std::string& key, std::string_view value) override {
    const std::lock_guard lock(mutex_);
    values_[key] = value;
    changed_.notify_all();
  }
  std::string get(const std::string& key) override {
    std::unique_lock lock(mutex_);
    const bool came =
        changed_.wait_for(lock, std::chrono::seconds(60), [&] { return values_.count(key) > 0; });
    check(came, "no rank has set {}", key);
    return values_.at(key);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
};

struct Engine {
  const char* name;
  std::vector<int> worlds;
  std::unique_ptr<Ops> (*ops)(int rank);
  std::unique_ptr<Comm> (*comm)(Ops&, const CommOptions&);
};

inline std::vector<Engine> engines() {
  std::vector<Engine> all;
  if (gloo_built())
    all.push_back({"gloo",
                   {2, 3, 4},
                   [](int) { return make_cpu_ops(DType::f32); },
                   [](Ops&, const CommOptions& o) { return make_gloo_comm(o); }});
  if (nccl_built() && cuda_available()) {
    std::vector<int> worlds;
    for (int n = 1; n <= std::min(4, cuda_device_count()); ++n) worlds.push_back(n);
    all.push_back({"nccl", worlds, [](int rank) { return make_cuda_ops(DType::bf16, rank); },
                   make_nccl_comm});
  }
  if (all.empty()) WARN("built without Gloo, and no GPU for NCCL: skipped");
  return all;
}

// One rank in a thread: what it saw is checked by the main thread, since Catch2 is not for threads.
struct Rank {
  std::unique_ptr<Bench> bench;
  std::unique_ptr<Comm> comm;
  std::exception_ptr error;
  std::vector<Tensor> made;
};

inline void each_rank(const Engine& e, int world, const std::function<void(Rank&, int)>& body,
                      const std::function<void(std::vector<Rank>&)>& look, double timeout_s = 60,
                      const std::function<bool()>& lost = {}) {
  MemoryStore store;
  std::vector<Rank> ranks(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int r = 0; r < world; ++r)
    threads.emplace_back([&, r] {
      Rank& me = ranks[size_t(r)];
      try {
        me.bench = std::make_unique<Bench>(e.ops(r));
        CommOptions o;
        o.rank = r, o.world = world, o.store = &store, o.timeout_s = timeout_s;
        o.one_machine = true;
        o.lost = lost;
        o.address = "127.0.0.1";
        me.comm = e.comm(me.bench->ops(), o);
        body(me, r);
      } catch (...) {
        me.error = std::current_exception();
      }
    });
  for (std::thread& t : threads) t.join();
  look(ranks);
  threads.clear();
  for (Rank& r : ranks)  // before its Ops, and at once: NCCL's end waits for the others
    threads.emplace_back([&r] { r.comm.reset(); });
  for (std::thread& t : threads) t.join();
}

inline void no_errors(const std::vector<Rank>& ranks) {
  for (const Rank& r : ranks)
    if (r.error) REQUIRE_NOTHROW(std::rethrow_exception(r.error));
}

}  // namespace hgrn::test
