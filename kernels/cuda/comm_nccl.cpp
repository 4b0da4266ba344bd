// Collectives between GPUs through NCCL, on a stream of their own. Events order it against the
// stream of CudaOps: a collective starts after the work before it, wait() holds the work after it.
// NCCL's settings (NCCL_*) are left as the environment has them.
// Twin: kernels/cpu/comm_gloo.cpp   Test: tests/ops/test_comm.cpp
#include <nccl.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "ops/comm.h"

namespace hgrn {
namespace {

void nccl_check(ncclResult_t r, const char* what) {
  if (r == ncclSuccess || r == ncclInProgress) [[likely]]
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
      : Comm(o.rank, o.world), ops_(ops), timeout_s_(o.timeout_s), explain_(o.explain) {
    ncclUniqueId id;
    if (o.rank == 0) {
      nccl_check(ncclGetUniqueId(&id), "ncclGetUniqueId");
      o.store->set("nccl/id", std::string_view(id.internal, sizeof id.internal));
    }
    const std::string text = o.store->get("nccl/id");
    check(text.size() == sizeof id.internal, "an NCCL id of {} bytes", text.size());
    std::memcpy(id.internal, text.data(), sizeof id.internal);
    nccl_check(ncclCommInitRank(&comm_, o.world, id, o.rank), "ncclCommInitRank");
    int least = 0, greatest = 0;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
    CUDA_CHECK(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming));
    for (cudaEvent_t& e : done_) CUDA_CHECK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    CUDA_CHECK(cudaMalloc(&flag_, sizeof(float)));
    CUDA_CHECK(cudaMemset(flag_, 0, sizeof(float)));
  }

  ~NcclComm() override {
    close();
    if (comm_) ncclCommDestroy(comm_);
    for (cudaEvent_t e : done_) cudaEventDestroy(e);
    cudaEventDestroy(ready_);
    cudaStreamDestroy(stream_);
    cudaFree(flag_);
  }

  // Where a peer is gone, a collective never ends, and neither would ncclCommDestroy.
  bool close() override {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(2);
    while (comm_ && !failed_ && cudaStreamQuery(stream_) == cudaErrorNotReady &&
           std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (comm_ && (failed_ || cudaStreamQuery(stream_) == cudaErrorNotReady)) {
      ncclCommAbort(comm_);
      comm_ = nullptr;
    }
    return true;
  }

  std::string describe() const override {
    int version = 0;
    ncclGetVersion(&version);
    return fmt::format("NCCL {}.{}.{}, {} ranks", version / 10000, version / 100 % 100,
                       version % 100, world());
  }

  Ticket all_reduce(Tensor x) override {
    return post(x, [&] {
      return ncclAllReduce(x.data, x.data, size_t(x.numel()), type_of(x.dtype), ncclSum, comm_,
                           stream_);
    });
  }
  Ticket reduce_scatter(Tensor x) override {
    const Tensor own = part(x);
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

  void wait(Ticket ticket) override {
    if (ticket <= 0) return;
    check_async();
    CUDA_CHECK(cudaStreamWaitEvent(ops_.stream(), done_[size_t(ticket) % kEvents], 0));
  }

  void barrier() override {
    all_reduce(Tensor(flag_, DType::f32, {1}));
    const auto deadline =
        std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s_);
    while (cudaStreamQuery(stream_) == cudaErrorNotReady) {
      check_async();
      check(std::chrono::steady_clock::now() < deadline, Exit::failed,
            "rank {} of {}: the others did not come to a barrier within {} s{}", rank(), world(),
            timeout_s_, blame());
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

 private:
  // Collectives are in order, so an event that was recorded again since only waits for more.
  static constexpr size_t kEvents = 256;

  Tensor part(Tensor x) const {
    check(x.numel() % world() == 0, "{} elements do not split over {} ranks", x.numel(), world());
    const int64_t n = x.numel() / world();
    return x.view({x.numel()}).slice(rank() * n, n);
  }

  template <class F>
  Ticket post(Tensor x, F&& call) {
    if (x.numel() == 0) return posted_;
    CUDA_CHECK(cudaEventRecord(ready_, ops_.stream()));
    CUDA_CHECK(cudaStreamWaitEvent(stream_, ready_, 0));
    nccl_check(call(), "NCCL collective");
    ++posted_;
    CUDA_CHECK(cudaEventRecord(done_[size_t(posted_) % kEvents], stream_));
    return posted_;
  }

  std::string blame() const {
    const std::string who = explain_ ? explain_() : "";
    return who.empty() ? "; see the other ranks' logs" : "; " + who;
  }

  void check_async() {
    ncclResult_t state = ncclSuccess;
    ncclCommGetAsyncError(comm_, &state);
    if (state == ncclSuccess || state == ncclInProgress) return;
    failed_ = true;
    fail(Exit::failed, "rank {} of {}: a collective failed: {}{}", rank(), world(),
         ncclGetErrorString(state), blame());
  }

  CudaOps& ops_;
  const double timeout_s_;
  std::function<std::string()> explain_;
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t ready_ = nullptr, done_[kEvents] = {};
  void* flag_ = nullptr;
  Ticket posted_ = 0;
  bool failed_ = false;
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
