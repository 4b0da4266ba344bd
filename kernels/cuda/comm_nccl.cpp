// Collectives between GPUs through NCCL, on a stream of their own. Events order it against the
// stream of CudaOps: a collective starts after the work before it, wait() holds the work after it;
// the host waits for neither. NCCL's settings (NCCL_*) are left as the environment has them.
//
// Each such hop from one stream to another costs time on the device. agree(), under which nothing
// is hidden, does without: its collective is on the stream of CudaOps. NCCL itself keeps all calls
// of a communicator in order, copies included: each waits for the one before through a stream of
// NCCL's own, whatever streams the two are on. So there is one order on the device, that of the
// calls, and between two calls in a row there are two hops even on one stream.
//
// NCCL's kernels take multiprocessors from those of the step. Copies need none: between memory that
// is registered as symmetric, NCCL 2.28 and newer has the copy engines do gathers and exchanges
// (within a node's NVLink). A sum over the ranks is then an exchange of parts, after which each
// rank adds up its own (sum_parts.cu), and where all want it, a gather: as many bytes on the wires
// as in a ring. Between machines NCCL's own sums are better. HGRN_NCCL_COPY_ENGINES=0 does without.
//
// A collective whose peer is gone never ends, and with it the stream of CudaOps, on which the host
// waits. So a thread looks several times a second: where the run is lost, NCCL met an error or
// nothing has ended for too long, it aborts the communicator. The kernels end, the host goes on,
// and throw_if_failed() keeps it from believing what it then reads. Copies do not end so: they wait
// on the device for a peer's word, and with them every call that waits for the device. The process
// then ends by end_process(), with the message and the code that it would have ended with.
// Twin: kernels/cpu/comm_gloo.cpp   Test: tests/ops/test_comm.cpp, tests/train/test_gpu_ranks.cpp
#include <nccl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/sum_parts.h"
#include "ops/comm.h"

namespace hgrn {
namespace {

void nccl_check(ncclResult_t r, const char* what) {
  if (r == ncclSuccess) [[likely]]
    return;
  fail(Exit::failed, "{}: {} ({}); NCCL_DEBUG=WARN says more", what, ncclGetErrorString(r),
       ncclGetLastError(nullptr));
}

ncclDataType_t type_of(DType t) {
  switch (t) {
    case DType::f32: return ncclFloat32;
    case DType::f64: return ncclFloat64;
    case DType::bf16: return ncclBfloat16;
    default: fail(Exit::failed, "nccl: no collectives of {}", name_of(t));
  }
}

class NcclComm final : public Comm {
 public:
  NcclComm(CudaOps& ops, const CommOptions& o)
      : Comm(o.rank, o.world),
        ops_(ops),
        timeout_s_(o.timeout_s),
        lost_(o.lost),
        give_up_run_(o.give_up),
        explain_(o.explain) {
    ncclUniqueId id;
    if (o.rank == 0) {
      nccl_check(ncclGetUniqueId(&id), "ncclGetUniqueId");
      o.store->set("nccl/id", std::string_view(id.internal, sizeof id.internal));
    }
    const std::string text = o.store->get("nccl/id");
    check(text.size() == sizeof id.internal, "an NCCL id of {} bytes", text.size());
    std::memcpy(id.internal, text.data(), sizeof id.internal);
    CUDA_CHECK(cudaGetDevice(&device_));
    connect(id, o.one_machine);
    int least = 0, greatest = 0;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
    CUDA_CHECK(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming));
    for (cudaEvent_t& e : done_) CUDA_CHECK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    CUDA_CHECK(cudaMalloc(&flag_, sizeof(float)));
    CUDA_CHECK(cudaMemset(flag_, 0, sizeof(float)));
    watch_ = std::thread([this] { watch(); });
  }

  ~NcclComm() override {
    close();
    // ncclCommDestroy waits for the other ranks of this machine. Where this one ends with an error,
    // they may never come.
    if (std::uncaught_exceptions() > 0) give_up("this rank ends");
    {
      const std::lock_guard lock(watch_mutex_);
      ended_ = true;
    }
    ending_.notify_all();
    watch_.join();
    if (last_resort_.joinable()) last_resort_.join();
    if (comm_) release_shared();
    if (comm_) ncclCommDestroy(comm_);
    for (cudaEvent_t e : done_) cudaEventDestroy(e);
    cudaEventDestroy(ready_);
    cudaStreamDestroy(stream_);
    cudaFree(flag_);
  }

  bool close() override {
    if (!failed_ && !idle_within(2)) give_up("it had not ended when the run did");
    const bool idle = idle_within(failed_ ? 0.5 : 0);  // after an abort: the kernels see it and end
    if (!idle && copies_) end_process();
    return idle;
  }

  void last_words(const Error& e) override {
    const std::lock_guard lock(watch_mutex_);
    if (!last_words_) last_words_ = e;
  }

  std::string describe() const override {
    int version = 0;
    ncclGetVersion(&version);
    return fmt::format("NCCL {}.{}.{}, {} ranks", version / 10000, version / 100 % 100,
                       version % 100, world());
  }

  Ticket all_reduce(Tensor x) override {
    const int64_t even = x.numel() / (world() * kSumAlign) * (world() * kSumAlign);
    if (!by_copies(x, even)) {
      return post(x, [&] {
        return ncclAllReduce(x.data, x.data, size_t(x.numel()), type_of(x.dtype), ncclSum, comm_,
                             stream_);
      });
    }
    const Tensor flat = x.view({x.numel()}), most = flat.slice(0, even);
    reduce_scatter(most);
    const Ticket ticket = all_gather(most);
    if (even == x.numel()) return ticket;
    return all_reduce(flat.slice(even, x.numel() - even));
  }
  Ticket reduce_scatter(Tensor x) override {
    const Tensor own = part(x);
    if (by_copies(x, x.numel())) {
      return post(x, [&] {
        const ncclResult_t r = exchange(x, own.numel());
        if (r == ncclSuccess) sum_parts(own, landing_, world(), stream_);
        return r;
      });
    }
    return post(x, [&] {
      return ncclReduceScatter(x.data, own.data, size_t(own.numel()), type_of(x.dtype), ncclSum,
                               comm_, stream_);
    });
  }
  Ticket all_gather(Tensor x) override {
    const Tensor own = part(x);
    return post(x, [&] {
      return ncclAllGather(own.data, x.data, size_t(own.numel()), type_of(x.dtype), comm_, stream_);
    });
  }
  Ticket broadcast(Tensor x, int root) override {
    return post(x, [&] {
      return ncclBroadcast(x.data, x.data, size_t(x.numel()), type_of(x.dtype), root, comm_,
                           stream_);
    });
  }

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
  void* alloc_shared(size_t bytes, size_t reduced) override {
    if (world() == 1 || bytes == 0 || !copy_engines_) return nullptr;
    if (reduced > landing_bytes_) {
      free_shared(landing_);
      landing_ = shared_memory(reduced);
      landing_bytes_ = landing_ ? reduced : 0;
      if (!landing_) return nullptr;
    }
    for (Shared& s : shared_)
      if (s.idle && s.bytes >= bytes) {
        s.idle = false;
        return s.memory;
      }
    return shared_memory(bytes);
  }
  void free_shared(void* memory) override {
    for (Shared& s : shared_)
      if (s.memory == memory) s.idle = true;
  }
#endif

  void wait(Ticket ticket) override {
    if (ticket <= 0) return;
    throw_if_failed();
    CUDA_CHECK(cudaStreamWaitEvent(ops_.stream(), done_[size_t(ticket) % kEvents], 0));
    waited_ = std::max(waited_, ticket);
  }

  void agree(Tensor x) override {
    if (x.numel() == 0) return;
    if (waited_ < posted_) wait(posted_);  // for what is ours on stream_: sum_parts()
    const cudaStream_t stream = ops_.stream();
    waited_ = begin(stream, [&] {
      return ncclAllReduce(x.data, x.data, size_t(x.numel()), type_of(x.dtype), ncclSum, comm_,
                           stream);
    });
  }

  void throw_if_failed() override {
    if (!failed_) return;
    std::string why;
    {
      const std::lock_guard lock(watch_mutex_);
      why = why_;
    }
    const std::string who = explain_ ? explain_() : "";
    fail(Exit::failed, "rank {} of {}: a collective failed: {}; {}", rank(), world(), why,
         who.empty() ? "see the other ranks' logs" : who);
  }

  void barrier() override {
    all_reduce(Tensor(flag_, DType::f32, {1}));
    while (cudaStreamQuery(stream_) == cudaErrorNotReady)
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    throw_if_failed();
    CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

 private:
  using Clock = std::chrono::steady_clock;
  // Collectives are in order, so an event that was recorded again since only waits for more. Enough
  // for the gathers of one step of the largest models.
  static constexpr size_t kEvents = 2048;
  static constexpr auto kLook = std::chrono::milliseconds(100);
  static constexpr auto kGrace = std::chrono::seconds(3);
  static constexpr size_t kFewBytes = size_t(1) << 20;  // sums of less go through NCCL's kernels

  void connect(const ncclUniqueId& id, bool one_machine) {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
    int version = 0;  // of the library that is here, not of the header
    ncclGetVersion(&version);
    const char* const wanted = std::getenv("HGRN_NCCL_COPY_ENGINES");
    copy_engines_ = version >= NCCL_VERSION(2, 28, 0) && one_machine && !(wanted && *wanted == '0');
    if (copy_engines_) {
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      config.CTAPolicy = NCCL_CTA_POLICY_ZERO;
      nccl_check(ncclCommInitRankConfig(&comm_, world(), id, rank(), &config),
                 "ncclCommInitRankConfig");
      return;
    }
#endif
    (void)one_machine;
    nccl_check(ncclCommInitRank(&comm_, world(), id, rank()), "ncclCommInitRank");
  }

  // Whether a sum over the ranks of x, of whose elements `even` split into parts, can do without
  // multiprocessors: the parts change places by copies, and each rank adds up its own.
  bool by_copies(Tensor x, int64_t even) const {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
    if (x.bytes() < kFewBytes || x.bytes() > landing_bytes_ || even % (world() * kSumAlign) != 0 ||
        x.dtype == DType::f64 || reinterpret_cast<uintptr_t>(x.data) % 16 != 0)
      return false;
    const auto* const from = static_cast<const char*>(x.data);
    for (const Shared& s : shared_)
      if (s.memory <= from && from + x.bytes() <= s.memory + s.bytes) return true;
#else
    (void)x, (void)even;
#endif
    return false;
  }

  // Part r of x goes to rank r, which has it as its part `rank` of landing_.
  ncclResult_t exchange(Tensor x, int64_t elements) {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
    return ncclAlltoAll(x.data, landing_, size_t(elements), type_of(x.dtype), comm_, stream_);
#else
    (void)x, (void)elements;
    return ncclInvalidUsage;
#endif
  }

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
  // Memory that NCCL's copies reach on every rank; null where that cannot be had.
  void* shared_memory(size_t bytes) {
    Shared s;
    s.bytes = bytes;
    void* memory = nullptr;
    nccl_check(ncclMemAlloc(&memory, bytes),
               "memory of collectives (ncclMemAlloc); lower train.micro_batch, or set "
               "HGRN_NCCL_COPY_ENGINES=0");
    ncclResult_t r = ncclSuccess;
    {
      const std::lock_guard lock(call_mutex_);
      if (!failed_)
        r = ncclCommWindowRegister(comm_, memory, bytes, &s.window, NCCL_WIN_COLL_SYMMETRIC);
    }
    throw_if_failed();
    if (r != ncclSuccess || !s.window) {
      ncclMemFree(memory);
      return nullptr;
    }
    s.memory = static_cast<char*>(memory);
    shared_.push_back(s);
    copies_ = true;
    return memory;
  }
#endif

  void release_shared() {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
    for (const Shared& s : shared_) {
      ncclCommWindowDeregister(comm_, s.window);
      ncclMemFree(s.memory);
    }
#endif
  }

  Tensor part(Tensor x) const {
    check(x.numel() % world() == 0, "{} elements do not split over {} ranks", x.numel(), world());
    const int64_t n = x.numel() / world();
    return x.view({x.numel()}).slice(rank() * n, n);
  }

  struct Calling {
    explicit Calling(std::atomic<bool>& c) : calling(c) { calling = true; }
    ~Calling() { calling = false; }
    std::atomic<bool>& calling;
  };

  template <class F>
  Ticket post(Tensor x, F&& call) {
    if (x.numel() == 0) return posted_;
    CUDA_CHECK(cudaEventRecord(ready_, ops_.stream()));
    CUDA_CHECK(cudaStreamWaitEvent(stream_, ready_, 0));
    return begin(stream_, call);
  }

  // `call` gives NCCL a collective on `stream`.
  template <class F>
  Ticket begin(cudaStream_t stream, F&& call) {
    ncclResult_t r = ncclSuccess;
    {
      const std::lock_guard lock(call_mutex_);
      const Calling calling(calling_);
      if (!failed_) r = call();  // else comm_ is gone
    }
    if (r != ncclSuccess && r != ncclInProgress)
      give_up(fmt::format("{} ({})", ncclGetErrorString(r), ncclGetLastError(nullptr)));
    const Ticket ticket = posted_ + 1;  // where it failed meanwhile, too: close() looks for its end
    CUDA_CHECK(cudaEventRecord(done_[size_t(ticket) % kEvents], stream));
    posted_ = ticket;
    throw_if_failed();
    return ticket;
  }

  // Whether nothing travels any more: on stream_, nor, if agree() came last, on that of CudaOps.
  bool idle_within(double seconds) const {
    const auto deadline = Clock::now() + std::chrono::duration<double>(seconds);
    while (cudaStreamQuery(stream_) == cudaErrorNotReady ||
           cudaEventQuery(done_[size_t(posted_) % kEvents]) == cudaErrorNotReady) {
      if (Clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  }

  // The communicator goes, once. Whoever is in the middle of a call of NCCL is let out by the abort
  // itself; a call that is about to begin is kept out by call_mutex_.
  void give_up(const std::string& why) {
    {
      const std::lock_guard lock(watch_mutex_);
      if (failed_) return;
      why_ = why;
      failed_ = true;
      if (copies_)
        last_resort_ = std::thread([this] {
          std::unique_lock ending(watch_mutex_);
          if (!ending_.wait_for(ending, kGrace, [&] { return ended_; })) {
            ending.unlock();
            end_process();
          }
        });
    }
    const bool alone = call_mutex_.try_lock_for(std::chrono::seconds(1));
    ncclCommAbort(comm_);
    comm_ = nullptr;
    if (alone) call_mutex_.unlock();
  }

  // As main() would, were it let: whoever waits for the device waits for ever.
  [[noreturn]] void end_process() {
    if (ending_process_.exchange(true))
      for (;;) std::this_thread::sleep_for(std::chrono::seconds(1));  // another thread is at it
    std::optional<Error> e;
    {
      const std::lock_guard lock(watch_mutex_);
      e = last_words_;
    }
    try {
      if (!e) throw_if_failed();
    } catch (const Error& why) {
      e = why;
    }
    if (!e) e = Error(Exit::failed, "a collective does not end");
    if (give_up_run_) give_up_run_(*e);
    std::fprintf(stderr, "error: %s\n", e->what());
    std::_Exit(int(e->code()));
  }

  void watch() {
    cudaSetDevice(device_);
    Ticket ended = 0;
    Clock::time_point moved = Clock::now();
    std::unique_lock lock(watch_mutex_);
    while (!ending_.wait_for(lock, kLook, [&] { return ended_; }) && !failed_) {
      lock.unlock();
      const std::string why = trouble(ended, moved);
      if (!why.empty()) give_up(why);
      lock.lock();
    }
  }

  // What has gone wrong, or nothing. `ended`: the newest collective known to have ended, `moved`:
  // when that last changed, or nothing was under way.
  std::string trouble(Ticket& ended, Clock::time_point& moved) {
    if (lost_ && lost_()) return "another rank is lost";
    ncclResult_t state = ncclSuccess;
    {
      const std::unique_lock lock(call_mutex_, std::try_to_lock);
      if (lock && comm_ && ncclCommGetAsyncError(comm_, &state) != ncclSuccess)
        state = ncclInternalError;
    }
    if (state != ncclSuccess && state != ncclInProgress) return ncclGetErrorString(state);
    const Ticket posted = posted_;
    const Ticket before = ended;
    // A call that stands waits for room among copies that stand; it may keep others from the
    // device.
    const bool calling = calling_;
    while (!calling && ended < posted &&
           cudaEventQuery(done_[size_t(ended + 1) % kEvents]) != cudaErrorNotReady)
      ++ended;
    const auto now = Clock::now();
    if (ended > before || (ended == posted && !calling)) moved = now;
    if (std::chrono::duration<double>(now - moved).count() < timeout_s_) return {};
    return fmt::format("it did not end within {:g} s (HGRN_COLLECTIVE_TIMEOUT)", timeout_s_);
  }

  CudaOps& ops_;
  const double timeout_s_;
  const std::function<bool()> lost_;
  const std::function<void(const Error&)> give_up_run_;
  const std::function<std::string()> explain_;
  int device_ = 0;
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t ready_ = nullptr, done_[kEvents] = {};
  void* flag_ = nullptr;
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
  struct Shared {
    char* memory = nullptr;
    size_t bytes = 0;
    ncclWindow_t window = nullptr;
    bool idle = false;
  };
  std::vector<Shared> shared_;  // after an abort it stays until the process ends
  void* landing_ = nullptr;     // parts of the other ranks, until they are added up
  size_t landing_bytes_ = 0;
  bool copy_engines_ = false;
#endif
  std::atomic<Ticket> posted_ = 0;
  Ticket waited_ = 0;  // the stream of CudaOps has that and all before it behind it
  std::atomic<bool> failed_ = false, calling_ = false, ending_process_ = false;
  std::atomic<bool> copies_ = false;  // some have been possible: shared_ is not empty

  std::timed_mutex call_mutex_;  // of calls that use comm_
  std::mutex watch_mutex_;       // of the three below, and of failed_ becoming true
  std::string why_;
  std::optional<Error> last_words_;
  bool ended_ = false;
  std::condition_variable ending_;
  std::thread watch_, last_resort_;
};

}  // namespace

bool nccl_built() {
  return true;
}

std::unique_ptr<Comm> make_nccl_comm(Ops& ops, const CommOptions& options) {
  auto* cuda = dynamic_cast<CudaOps*>(&ops);
  check(cuda != nullptr, "NCCL needs the CUDA backend");
  return std::make_unique<NcclComm>(*cuda, options);
}

}  // namespace hgrn
