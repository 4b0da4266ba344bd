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
#include <csignal>
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

// The thread and what it shares with the Comm. It holds on to this alone, so that it may be left
// behind where a collective never ends.
struct Worker {
  std::shared_ptr<gloo::Context> context;
  std::mutex mutex;  // of all below
  std::condition_variable filled, finished;
  std::deque<std::function<void()>> jobs;
  Comm::Ticket posted = 0, done = 0;
  std::exception_ptr error;
  bool stop = false;

  void run() {
    std::unique_lock lock(mutex);
    for (;;) {
      filled.wait(lock, [&] { return stop || !jobs.empty(); });
      if (jobs.empty() || error) {
        if (stop) return;
        jobs.clear();
        continue;
      }
      const std::function<void()> job = std::move(jobs.front());
      jobs.pop_front();
      lock.unlock();
      std::exception_ptr met;
      try {
        job();
      } catch (...) {
        met = std::current_exception();
      }
      lock.lock();
      if (met)
        error = met;
      else
        ++done;
      finished.notify_all();
    }
  }
};

void reduce(const std::shared_ptr<gloo::Context>& context, Tensor x) {
  gloo::AllreduceOptions options(context);
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

class GlooComm final : public Comm {
 public:
  explicit GlooComm(const CommOptions& o)
      : Comm(o.rank, o.world), explain_(o.explain), worker_(std::make_shared<Worker>()) {
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
      worker_->context = context;
    } catch (const Error&) {
      throw;
    } catch (const std::exception& e) {
      fail(Exit::failed, "rank {} of {} cannot connect with the others from {}: {}{}", o.rank,
           o.world, o.address, e.what(),
           explain_ ? explain_() : "; check that the machines reach each other on all ports");
    }
    thread_ = std::thread([w = worker_] { w->run(); });
  }

  ~GlooComm() override {
    if (close())
      thread_.join();
    else
      thread_.detach();
  }

  bool close() override {
    std::unique_lock lock(worker_->mutex);
    worker_->stop = true;
    worker_->filled.notify_all();
    return worker_->finished.wait_for(lock, std::chrono::seconds(2), [&] {
      return worker_->done == worker_->posted || worker_->error;
    });
  }

  std::string describe() const override { return fmt::format("gloo, {} ranks", world()); }

  Ticket all_reduce(Tensor x) override {
    return post(x, [c = worker_->context, x] { reduce(c, x); });
  }
  Ticket reduce_scatter(Tensor x) override {
    check_parts(x);
    return post(x, [c = worker_->context, x] { reduce(c, x); });
  }
  Ticket all_gather(Tensor x) override {
    check_parts(x);
    return post(x, [c = worker_->context, x] {
      gloo::AllgatherOptions options(c);
      options.setOutput(static_cast<char*>(x.data), x.bytes());
      gloo::allgather(options);
    });
  }
  Ticket broadcast(Tensor x, int root) override {
    return post(x, [c = worker_->context, x, root] {
      gloo::BroadcastOptions options(c);
      options.setOutput(static_cast<char*>(x.data), x.bytes());
      options.setRoot(root);
      gloo::broadcast(options);
    });
  }

  void wait(Ticket ticket) override {
    Worker& w = *worker_;
    std::unique_lock lock(w.mutex);
    w.finished.wait(lock, [&] { return w.done >= ticket || w.error; });
    if (w.done >= ticket) return;
    const std::exception_ptr error = w.error;
    lock.unlock();
    rethrow(error);
  }

  void barrier() override {
    wait(enqueue([c = worker_->context] {
      gloo::BarrierOptions options(c);
      gloo::barrier(options);
    }));
  }

 private:
  void check_parts(Tensor x) const {
    check(x.numel() % world() == 0, "{} elements do not split over {} ranks", x.numel(), world());
  }

  template <class F>
  Ticket post(Tensor x, F&& job) {
    return enqueue(x.numel() > 0 ? std::function<void()>(std::forward<F>(job)) : nullptr);
  }

  Ticket enqueue(std::function<void()> job) {
    std::lock_guard lock(worker_->mutex);
    if (!job) return worker_->posted;
    worker_->jobs.push_back(std::move(job));
    worker_->filled.notify_one();
    return ++worker_->posted;
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
  std::shared_ptr<Worker> worker_;
  std::thread thread_;
};

}  // namespace

bool gloo_built() {
  return true;
}

std::unique_ptr<Comm> make_gloo_comm(const CommOptions& options) {
  // Gloo writes to its sockets without MSG_NOSIGNAL: a peer that is gone would end this process
  // before it can say so. Ignored, the write fails and with it the collective.
  std::signal(SIGPIPE, SIG_IGN);
  return std::make_unique<GlooComm>(options);
}

}  // namespace hgrn
