// Collectives between CPU ranks through Gloo, on one thread of their own.
// all_reduce is Gloo's ring: every rank gets the same bits, in an order that only size and number
// of ranks decide. reduce_scatter is the same ring: Gloo's own is an object with registered buffers
// for each pointer and size.
// Twin: kernels/cuda/comm_nccl.cpp   Test: tests/ops/test_comm.cpp
#include <gloo/allgather.h>
#include <gloo/allreduce.h>
#include <gloo/barrier.h>
#include <gloo/broadcast.h>
#include <gloo/math.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/store.h>
#include <gloo/transport/tcp/device.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "core/dtype.h"
#include "ops/comm.h"

namespace hgrn {
namespace {

// Gloo's view of our store.
class Store final : public gloo::rendezvous::Store {
 public:
  explicit Store(KeyValueStore& store) : store_(store) {}
  void set(const std::string& key, const std::vector<char>& data) override {
    store_.set(name(key), std::string_view(data.data(), data.size()));
  }
  std::vector<char> get(const std::string& key) override {
    const std::string value = store_.get(name(key));
    return {value.begin(), value.end()};
  }
  void wait(const std::vector<std::string>& keys) override {
    for (const std::string& key : keys) store_.get(name(key));
  }
  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds&) override {
    wait(keys);
  }

 private:
  static std::string name(const std::string& key) { return "gloo/" + key; }
  KeyValueStore& store_;
};

using Sum = void (*)(void*, const void*, const void*, size_t);

void sum_bf16(void* out, const void* a, const void* b, size_t n) {
  auto* o = static_cast<uint16_t*>(out);
  const auto *x = static_cast<const uint16_t*>(a), *y = static_cast<const uint16_t*>(b);
  for (size_t i = 0; i < n; ++i) o[i] = float_to_bf16(bf16_to_float(x[i]) + bf16_to_float(y[i]));
}

class GlooComm final : public Comm {
 public:
  explicit GlooComm(const CommOptions& o) : Comm(o.rank, o.world), explain_(o.explain) {
    try {
      gloo::transport::tcp::attr attr;
      if (const char* iface = std::getenv("GLOO_SOCKET_IFNAME"))
        attr.iface = iface;
      else
        attr.hostname = o.address;
      auto device = gloo::transport::tcp::CreateDevice(attr);
      auto context = std::make_shared<gloo::rendezvous::Context>(o.rank, o.world);
      context->setTimeout(std::chrono::milliseconds(int64_t(o.timeout_s * 1e3)));
      Store store(*o.store);
      context->connectFullMesh(store, device);
      context_ = context;
    } catch (const Error&) {
      throw;
    } catch (const std::exception& e) {
      fail(Exit::failed, "rank {} of {} cannot connect with the others from {}: {}{}", o.rank,
           o.world, o.address, e.what(),
           explain_ ? explain_() : "; check that the machines reach each other on all ports");
    }
    thread_ = std::thread([this] { work(); });
  }

  ~GlooComm() override {
    bool stuck = false;
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      stuck = done_ < posted_ && !error_;
    }
    filled_.notify_all();
    // The run ends on an error while a collective is under way: closing its connections ends it.
    if (stuck) context_->closeConnections();
    thread_.join();
  }

  std::string describe() const override { return fmt::format("gloo, {} ranks", world()); }

  Ticket all_reduce(Tensor x) override {
    return post(x, [this, x] { reduce(x); });
  }
  Ticket reduce_scatter(Tensor x) override {
    check_parts(x);
    return post(x, [this, x] { reduce(x); });
  }
  Ticket all_gather(Tensor x) override {
    check_parts(x);
    return post(x, [this, x] {
      gloo::AllgatherOptions options(context_);
      options.setOutput(static_cast<char*>(x.data), x.bytes());
      gloo::allgather(options);
    });
  }
  Ticket broadcast(Tensor x, int root) override {
    return post(x, [this, x, root] {
      gloo::BroadcastOptions options(context_);
      options.setOutput(static_cast<char*>(x.data), x.bytes());
      options.setRoot(root);
      gloo::broadcast(options);
    });
  }

  void wait(Ticket ticket) override {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [&] { return done_ >= ticket || error_; });
    if (done_ >= ticket) return;
    const std::exception_ptr error = error_;
    lock.unlock();
    rethrow(error);
  }

  void barrier() override {
    wait(enqueue([this] {
      gloo::BarrierOptions options(context_);
      gloo::barrier(options);
    }));
  }

 private:
  void check_parts(Tensor x) const {
    check(x.numel() % world() == 0, "{} elements do not split over {} ranks", x.numel(), world());
  }

  void reduce(Tensor x) {
    gloo::AllreduceOptions options(context_);
    options.setAlgorithm(gloo::AllreduceOptions::Algorithm::RING);
    const size_t n = size_t(x.numel());
    switch (x.dtype) {
      case DType::f32:
        options.setOutput(static_cast<float*>(x.data), n);
        options.setReduceFunction(static_cast<Sum>(&gloo::sum<float>));
        break;
      case DType::f64:
        options.setOutput(static_cast<double*>(x.data), n);
        options.setReduceFunction(static_cast<Sum>(&gloo::sum<double>));
        break;
      case DType::bf16:
        options.setOutput(static_cast<uint16_t*>(x.data), n);
        options.setReduceFunction(static_cast<Sum>(&sum_bf16));
        break;
      default: fail(Exit::failed, "gloo: no sum of {}", name_of(x.dtype));
    }
    gloo::allreduce(options);
  }

  template <class F>
  Ticket post(Tensor x, F&& job) {
    if (x.numel() == 0) return posted_;
    return enqueue(std::forward<F>(job));
  }

  Ticket enqueue(std::function<void()> job) {
    std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
    filled_.notify_one();
    return ++posted_;
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      filled_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
      if (jobs_.empty() || error_) {
        if (stop_) return;
        jobs_.clear();
        continue;
      }
      const std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      std::exception_ptr met;
      try {
        job();
      } catch (...) {
        met = std::current_exception();
      }
      lock.lock();
      if (met)
        error_ = met;
      else
        ++done_;
      finished_.notify_all();
    }
  }

  [[noreturn]] void rethrow(const std::exception_ptr& error) const {
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& e) {
      const std::string blame = explain_ ? explain_() : "";
      fail(Exit::failed, "rank {} of {}: a collective failed: {}{}", rank(), world(), e.what(),
           blame.empty() ? "; see the other ranks' logs" : "; " + blame);
    }
  }

  std::function<std::string()> explain_;
  std::shared_ptr<gloo::Context> context_;
  std::mutex mutex_;  // of all below
  std::condition_variable filled_, finished_;
  std::deque<std::function<void()>> jobs_;
  Ticket posted_ = 0, done_ = 0;
  std::exception_ptr error_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace

bool gloo_built() {
  return true;
}

std::unique_ptr<Comm> make_gloo_comm(const CommOptions& options) {
  return std::make_unique<GlooComm>(options);
}

}  // namespace hgrn
