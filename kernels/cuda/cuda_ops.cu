// CudaOps: the device, its memory and transfers, and the sequence kernels' registry.
// Twin: kernels/cpu/cpu_ops.cpp   Test: tests/ops
#include "cuda/cuda_ops.h"

#include <algorithm>
#include <cstring>

#include "cuda/cuda_check.h"
#include "cuda/hgru2.h"
#include "cuda/hopper.h"
#include "cuda/partial_rows.h"
#if __has_include(<nccl.h>)
#include <nccl.h>
#endif
#if __has_include(<cudnn_version.h>)
#include <cudnn_version.h>
#endif

namespace hgrn {
namespace {

constexpr size_t kOwnScratchBytes = size_t(1) << 20;  // at least
constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

std::string cublas_version() {
  const size_t v = cublasLtGetVersion();  // 13.0.2 is 130002, 12.4.5 is 120405
  return fmt::format("{}.{}.{}", v / 10000, v / 100 % 100, v % 100);
}

std::string cuda_version(int v) {
  return fmt::format("{}.{}", v / 1000, v % 1000 / 10);
}

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

}  // namespace

CudaOps::CudaOps(DType act_dtype, int local_rank) : act_dtype_(act_dtype), device_(local_rank) {
  check(act_dtype == DType::bf16 || act_dtype == DType::f32, Exit::usage,
        "the CUDA backend computes in bf16 or fp32, not in {}; set train.precision",
        name_of(act_dtype));
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  check(found == cudaSuccess && count > 0, Exit::failed,
        "no GPU can be used ({}); choose --device cpu, or look at nvidia-smi for the driver",
        found == cudaSuccess ? "none is visible" : cudaGetErrorString(found));
  check(local_rank >= 0 && local_rank < count, Exit::usage,
        "local rank {} has no GPU: {} visible; start at most that many ranks on a machine, or "
        "check CUDA_VISIBLE_DEVICES",
        local_rank, count);
  CUDA_CHECK(cudaSetDevice(device_));
  CUDA_CHECK(cudaGetDeviceProperties(&prop_, device_));
  check(prop_.major >= 8, Exit::failed,
        "GPU {} ({}) has compute capability {}.{}; 8.0 (A100) or newer is needed for bf16", device_,
        prop_.name, prop_.major, prop_.minor);
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  gemm_ = std::make_unique<Gemm>(stream_);
  for (Staging& s : staging_) {
    CUDA_CHECK(cudaMallocHost(&s.host, kStagingBytes));
    CUDA_CHECK(cudaEventCreateWithFlags(&s.free, cudaEventDisableTiming));
  }
  for (LaterSlot& s : later_) {
    CUDA_CHECK(cudaMallocHost(&s.host, kLaterBytes));
    CUDA_CHECK(cudaEventCreateWithFlags(&s.done, cudaEventDisableTiming));
  }
}

CudaOps::~CudaOps() {
  cudaStreamSynchronize(stream_);
  seq_.clear();
  gemm_.reset();
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
  for (Staging& s : staging_) {
    cudaEventDestroy(s.free);
    cudaFreeHost(s.host);
  }
  for (LaterSlot& s : later_) {
    cudaEventDestroy(s.done);
    cudaFreeHost(s.host);
  }
  for (char* p : retired_scratch_) cudaFree(p);
  cudaFree(own_scratch_);
  cudaStreamDestroy(stream_);
}

std::string CudaOps::describe() const {
  return fmt::format("cuda {}, {} (sm_{}{}, {} SMs, {:.1f} GiB), {}",
                     act_dtype_ == DType::bf16 ? "bf16" : "fp32", prop_.name, prop_.major,
                     prop_.minor, prop_.multiProcessorCount, double(prop_.totalGlobalMem) / kGiB,
                     cuda_versions());
}

// Dense, from the vendor's data sheets where the card's name is known: these are what published
// MFU figures divide by. Else multiprocessors x clock x operations a clock.
double CudaOps::peak_flops() const {
  int khz = 0;
  if (cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, device_) != cudaSuccess) khz = 0;
  const double clocks = double(prop_.multiProcessorCount) * khz * 1e3;
  const int cc = prop_.major * 10 + prop_.minor;
  if (act_dtype_ == DType::f32) return clocks * 2 * (cc == 80 ? 64 : 128);

  const std::string_view name = prop_.name;
  if (contains(name, "H100 PCIe")) return 756e12;
  if (contains(name, "H100 NVL")) return 835.5e12;
  if (contains(name, "H100") || contains(name, "H200") || contains(name, "GH200")) return 989.4e12;
  if (contains(name, "A100") || contains(name, "A800")) return 312e12;
  switch (cc) {
    case 80: return clocks * 2048;
    case 86:
    case 87:
    case 89: return clocks * 512;
    case 90: return clocks * 4096;
    case 100:
    case 103: return clocks * 8192;
    default: return 0;
  }
}

MemoryInfo CudaOps::memory() const {
  MemoryInfo info;
  CUDA_CHECK(cudaMemGetInfo(&info.free, &info.total));
  return info;
}

std::string CudaOps::pci_bus_id() const {
  char id[32] = "";
  if (cudaDeviceGetPCIBusId(id, sizeof id, device_) != cudaSuccess) cudaGetLastError();
  return id;
}

void* CudaOps::alloc(size_t bytes, std::string_view what) {
  void* p = nullptr;
  const cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
  if (e != cudaSuccess) {
    cudaGetLastError();
    size_t free_bytes = 0, total = 0;
    cudaMemGetInfo(&free_bytes, &total);
    fail(Exit::failed,
         "GPU {}: no memory for {}: {:.3f} GiB wanted, {:.3f} GiB free of {:.3f} ({}); lower "
         "train.micro_batch, set train.recompute to \"elementwise\" or \"block\", or see `hgrn "
         "plan`",
         device_, what, double(bytes) / kGiB, double(free_bytes) / kGiB, double(total) / kGiB,
         cudaGetErrorString(e));
  }
  return p;
}

// Throws nothing: it is called while an error of the device unwinds, which every later call
// repeats.
void CudaOps::free(void* p) {
  if (cudaFree(p) != cudaSuccess) cudaGetLastError();
}

void CudaOps::add_rows(Grad out, const float* partial, int64_t rows, int64_t cols) {
  add_partial_rows(out.to.ptr<float>(), partial, rows, cols, out.fresh, hopper_code(prop_.major),
                   stream_);
}

char* CudaOps::scratch(size_t bytes) {
  if (planned_scratch_ && bytes <= planned_scratch_.bytes())
    return static_cast<char*>(planned_scratch_.data);
  if (bytes > own_scratch_bytes_) {
    bytes = std::max(bytes, kOwnScratchBytes);
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    if (recorded_ && own_scratch_)
      retired_scratch_.push_back(own_scratch_);
    else
      CUDA_CHECK(cudaFree(own_scratch_));
    own_scratch_ = nullptr, own_scratch_bytes_ = 0;
    own_scratch_ = static_cast<char*>(alloc(bytes, "temporaries of an operation"));
    own_scratch_bytes_ = bytes;
  }
  return own_scratch_;
}

void CudaOps::zero(Tensor t) {
  if (t.numel() == 0) return;
  CUDA_CHECK(cudaMemsetAsync(t.data, 0, t.bytes(), stream_));
}

void CudaOps::copy(Tensor dst, Tensor src) {
  check(dst.dtype == src.dtype && dst.numel() == src.numel(), "copy: {} {} into {} {}",
        name_of(src.dtype), src.shape.str(), name_of(dst.dtype), dst.shape.str());
  if (dst.numel() == 0 || dst.data == src.data) return;
  CUDA_CHECK(cudaMemcpyAsync(dst.data, src.data, src.bytes(), cudaMemcpyDeviceToDevice, stream_));
}

namespace {

// What travels in a kernel's argument: between kernels that is sooner there than a copy.
struct FewBytes {
  static constexpr size_t kMost = 64;
  unsigned char bytes[kMost];
};

__global__ __launch_bounds__(FewBytes::kMost) void store_kernel(unsigned char* dst, FewBytes few) {
  dst[threadIdx.x] = few.bytes[threadIdx.x];
}

}  // namespace

void CudaOps::upload(Tensor dst, const void* host) {
  const size_t bytes = dst.bytes();
  if (bytes == 0) return;
  if (bytes <= FewBytes::kMost) {
    FewBytes few{};
    std::memcpy(few.bytes, host, bytes);
    store_kernel<<<1, unsigned(bytes), 0, stream_>>>(static_cast<unsigned char*>(dst.data), few);
    CUDA_CHECK(cudaGetLastError());
    return;
  }
  if (bytes <= kStagingBytes) {
    Staging& s = staging_[next_staging_];
    next_staging_ = (next_staging_ + 1) % kStagingSlots;
    CUDA_CHECK(cudaEventSynchronize(s.free));
    std::memcpy(s.host, host, bytes);
    CUDA_CHECK(cudaMemcpyAsync(dst.data, s.host, bytes, cudaMemcpyHostToDevice, stream_));
    CUDA_CHECK(cudaEventRecord(s.free, stream_));
    return;
  }
  CUDA_CHECK(cudaMemcpyAsync(dst.data, host, bytes, cudaMemcpyHostToDevice, stream_));
  CUDA_CHECK(cudaStreamSynchronize(stream_));  // the caller may change `host` once we return
}

void CudaOps::download(void* host, Tensor src) {
  if (src.numel() == 0) return;
  CUDA_CHECK(cudaMemcpyAsync(host, src.data, src.bytes(), cudaMemcpyDeviceToHost, stream_));
  CUDA_CHECK(cudaStreamSynchronize(stream_));
}

int64_t CudaOps::download_later(Tensor src) {
  check(src.bytes() <= kLaterBytes, "{} bytes are no small download", src.bytes());
  LaterSlot& s = later_[laters_ % kLaterSlots];
  s.size = src.bytes();
  CUDA_CHECK(cudaMemcpyAsync(s.host, src.data, s.size, cudaMemcpyDeviceToHost, stream_));
  CUDA_CHECK(cudaEventRecord(s.done, stream_));
  return laters_++;
}

void CudaOps::fetch(void* host, int64_t ticket) {
  check(ticket >= 0 && ticket < laters_ && ticket >= laters_ - kLaterSlots,
        "download {} of {} is not there any more", ticket, laters_);
  const LaterSlot& s = later_[ticket % kLaterSlots];
  CUDA_CHECK(cudaEventSynchronize(s.done));
  std::memcpy(host, s.host, s.size);
}

void CudaOps::synchronize() {
  CUDA_CHECK(cudaStreamSynchronize(stream_));
}

int64_t CudaOps::mark() {
  if (marks_ == int64_t(events_.size())) {
    cudaEvent_t event;
    CUDA_CHECK(cudaEventCreate(&event));
    events_.push_back(event);
  }
  CUDA_CHECK(cudaEventRecord(events_[size_t(marks_)], stream_));
  return marks_++;
}

double CudaOps::elapsed_ms(int64_t from, int64_t to) {
  float ms = 0;
  CUDA_CHECK(cudaEventElapsedTime(&ms, events_[size_t(from)], events_[size_t(to)]));
  return double(ms);
}

namespace {

class CudaRecording final : public Recording {
 public:
  CudaRecording(cudaGraph_t graph, cudaStream_t stream) : stream_(stream) {
    CUDA_CHECK(cudaGraphInstantiate(&exec_, graph, 0));
  }
  ~CudaRecording() override {
    cudaStreamSynchronize(stream_);  // it may still run
    cudaGraphExecDestroy(exec_);
  }
  CudaRecording(const CudaRecording&) = delete;
  CudaRecording& operator=(const CudaRecording&) = delete;
  void replay() override { CUDA_CHECK(cudaGraphLaunch(exec_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace

std::unique_ptr<Recording> CudaOps::record(std::function<void()> work) {
  cudaGraph_t graph = nullptr;
  recorded_ = true;
  CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream_, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
  std::unique_ptr<Recording> recording;
  try {
    recording = std::make_unique<CudaRecording>(graph, stream_);
  } catch (...) {
    cudaGraphDestroy(graph);
    throw;
  }
  CUDA_CHECK(cudaGraphDestroy(graph));
  return recording;
}

SeqKernel& CudaOps::seq(std::string_view name) {
  check(name == "hgru2", Exit::usage,
        "the CUDA backend has no sequence kernel \"{}\"; it has: hgru2", name);
  const auto known = seq_.find(name);
  if (known != seq_.end()) return *known->second;
  return *seq_.emplace(std::string(name), make_cuda_hgru2(act_dtype(), stream_)).first->second;
}

std::unique_ptr<Ops> make_cuda_ops(DType act_dtype, int local_rank) {
  // Slurm may show each rank its own GPU alone: that is number 0 for all of them.
  if (cuda_device_count() == 1) local_rank = 0;
  return std::make_unique<CudaOps>(act_dtype, local_rank);
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

bool cuda_available() {
  return cuda_device_count() > 0;
}

std::string cuda_versions() {
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  std::string text = fmt::format("CUDA {} (driver {}), cuBLASLt {}", cuda_version(runtime),
                                 cuda_version(driver), cublas_version());
#ifdef NCCL_MAJOR
  text += fmt::format(", NCCL {}.{}.{}", NCCL_MAJOR, NCCL_MINOR, NCCL_PATCH);
#endif
#ifdef CUDNN_MAJOR
  text += fmt::format(", cuDNN headers {}.{}.{}", CUDNN_MAJOR, CUDNN_MINOR, CUDNN_PATCHLEVEL);
#endif
  return text;
}

}  // namespace hgrn
