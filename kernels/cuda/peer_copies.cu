// Collectives by copy engines; the header says how. A sum of x over ranks, part r of it on rank r:
//   out = x_0[r] + x_1[r] + ... + x_{W-1}[r], in this order, in fp32; bf16 is rounded once.
// Test: tests/train/test_gpu_ranks.cpp
#include "cuda/peer_copies.h"

#include <cuda.h>

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "core/file.h"
#include "cuda/cuda_check.h"
#include "cuda/vec.cuh"
#include "ops/comm.h"

namespace hgrn {
namespace {

constexpr int kMaxPeers = 16;                        // GPUs of one machine
constexpr size_t kFlagBytes = size_t(2) << 20;       // an allocation of its own: IPC shares whole ones
constexpr size_t kStagingBytes = size_t(64) << 20;   // over all peers
constexpr size_t kLeastBytes = size_t(256) << 10;    // a part; smaller ones are latency alone
enum Kind { kComplete = 0, kRead = 1 };

struct Parts {
  const void* of[kMaxPeers];
};

template <class T>
__global__ void __launch_bounds__(512)
    sum_parts(T* out, const __grid_constant__ Parts parts, int world, int64_t n) {
  constexpr int V = 16 / sizeof(T);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < n; i += step) {
    float total[V], v[V];
    Pack<T, V> pack;
    pack.load(static_cast<const T*>(parts.of[0]) + i);
    pack.unpack(total);
    for (int p = 1; p < world; ++p) {
      pack.load(static_cast<const T*>(parts.of[p]) + i);
      pack.unpack(v);
#pragma unroll
      for (int k = 0; k < V; ++k) total[k] += v[k];
    }
    pack.pack(total);
    pack.store(out + i);
  }
}

using StreamValue = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
using AddressRange = CUresult (*)(CUdeviceptr*, size_t*, CUdeviceptr);

void* driver_function(const char* name) {
  void* function = nullptr;
#if CUDART_VERSION >= 12050
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) !=
          cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    function = nullptr;
  cudaGetLastError();
#else
  (void)name;
#endif
  return function;
}

void driver_check(CUresult r, const char* what) {
  check(r == CUDA_SUCCESS, Exit::failed, "{}: error {} of the CUDA driver", what, int(r));
}

// Ranks of one machine alone can share memory.
std::string machine() {
  const std::string id = "/proc/sys/kernel/random/boot_id";
  return exists(id) ? read_file(id, 100) : "";
}

}  // namespace

PeerCopies::PeerCopies(int rank, int world, KeyValueStore& store, cudaStream_t stream, bool on)
    : rank_(rank), world_(world), store_(store), stream_(stream) {
  write_value_ = driver_function("cuStreamWriteValue32");
  wait_value_ = driver_function("cuStreamWaitValue32");
  const bool well = on && write_value_ && wait_value_ && world <= kMaxPeers && world > 1;
  if (well) {
    CUDA_CHECK(cudaStreamCreateWithFlags(&release_stream_, cudaStreamNonBlocking));
    CUDA_CHECK(cudaMalloc(&flags_, kFlagBytes));
    CUDA_CHECK(cudaMemset(flags_, 0, kFlagBytes));
    CUDA_CHECK(cudaMalloc(&staging_, kStagingBytes));
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  Buffer flags;
  const Tensor words(flags_, DType::f32, {well ? int64_t(kFlagBytes / 4) : 0});
  if (!exchange(words, flags)) return;
  their_flags_.resize(size_t(world));
  for (int p = 0; p < world; ++p)
    their_flags_[size_t(p)] = reinterpret_cast<uint32_t*>(flags.theirs[size_t(p)]);
}

PeerCopies::~PeerCopies() {
  for (const auto& [handle, memory] : opened_) cudaIpcCloseMemHandle(memory);
  if (flags_) cudaFree(flags_);
  if (staging_) cudaFree(staging_);
  if (release_stream_) cudaStreamDestroy(release_stream_);
  cudaGetLastError();
}

// ---- sharing

bool PeerCopies::all_agree(bool mine) {
  const std::string key = fmt::format("peer/{}/agree/", exchanges_);
  store_.set(key + std::to_string(rank_), mine ? "1" : "0");
  bool all = true;
  for (int p = 0; p < world_; ++p) all &= store_.get(key + std::to_string(p)) == "1";
  ++exchanges_;
  return all;
}

char* PeerCopies::open(int rank, const std::string& handle) {
  char*& memory = opened_[fmt::format("{} ", rank) + handle];
  if (memory) return memory;
  cudaIpcMemHandle_t h;
  std::memcpy(&h, handle.data(), sizeof h);
  void* p = nullptr;
  if (cudaIpcOpenMemHandle(&p, h, cudaIpcMemLazyEnablePeerAccess) == cudaSuccess)
    return memory = static_cast<char*>(p);
  cudaGetLastError();
  opened_.erase(fmt::format("{} ", rank) + handle);
  return nullptr;
}

// Everybody says where its memory is, and opens the others'.
bool PeerCopies::exchange(Tensor whole, Buffer& buffer) {
  buffer.mine = static_cast<char*>(whole.data);
  buffer.bytes = whole.bytes();
  buffer.theirs.assign(size_t(world_), nullptr);
  struct Place {
    cudaIpcMemHandle_t handle;
    uint64_t offset, bytes;
  } place = {};
  const auto range = reinterpret_cast<AddressRange>(driver_function("cuMemGetAddressRange"));
  CUdeviceptr base = 0;
  bool well = buffer.bytes > 0 && range &&
              range(&base, nullptr, CUdeviceptr(buffer.mine)) == CUDA_SUCCESS &&
              cudaIpcGetMemHandle(&place.handle, reinterpret_cast<void*>(base)) == cudaSuccess;
  cudaGetLastError();
  place.offset = well ? uint64_t(CUdeviceptr(buffer.mine) - base) : 0;
  place.bytes = buffer.bytes;
  const std::string here = machine(), key = fmt::format("peer/{}/place/", exchanges_);
  store_.set(key + std::to_string(rank_),
             well ? std::string(reinterpret_cast<const char*>(&place), sizeof place) + here : "");
  for (int p = 0; p < world_; ++p) {
    const std::string text = store_.get(key + std::to_string(p));
    if (text.size() < sizeof place || text.substr(sizeof place) != here) {
      well = false;
    } else if (p != rank_ && well) {
      Place other;
      std::memcpy(&other, text.data(), sizeof other);
      char* memory =
          open(p, std::string(reinterpret_cast<const char*>(&other.handle), sizeof other.handle));
      well = memory && other.bytes == place.bytes;
      buffer.theirs[size_t(p)] = memory + other.offset;
    }
  }
  return all_agree(well);
}

bool PeerCopies::share(Tensor whole) {
  if (their_flags_.empty()) return false;  // on all ranks alike
  Buffer buffer;
  if (!exchange(whole, buffer)) return false;
  buffers_.push_back(std::move(buffer));
  return true;
}

const PeerCopies::Buffer* PeerCopies::buffer_of(Tensor x) const {
  const char* const begin = static_cast<const char*>(x.data);
  for (const Buffer& b : buffers_)
    if (b.mine <= begin && begin + x.bytes() <= b.mine + b.bytes) return &b;
  return nullptr;
}

bool PeerCopies::takes(Tensor x) const {
  const size_t part = x.bytes() / size_t(world_);
  return (x.dtype == DType::f32 || x.dtype == DType::bf16) && x.numel() % world_ == 0 &&
         part % 16 == 0 && part >= kLeastBytes && buffer_of(x) != nullptr;
}

// ---- agreements

void PeerCopies::tell(int kind) {
  for (int p = 0; p < world_; ++p)
    if (p != rank_)
      driver_check(reinterpret_cast<StreamValue>(write_value_)(
                       stream_, CUdeviceptr(their_flags_[size_t(p)] + kind * kMaxPeers + rank_),
                       sequence_, CU_STREAM_WRITE_VALUE_DEFAULT),
                   "cuStreamWriteValue32");
}

void PeerCopies::await(int kind) {
  for (int p = 0; p < world_; ++p)
    if (p != rank_)
      driver_check(reinterpret_cast<StreamValue>(wait_value_)(
                       stream_, CUdeviceptr(flags_ + kind * kMaxPeers + p), sequence_,
                       CU_STREAM_WAIT_VALUE_GEQ),
                   "cuStreamWaitValue32");
}

void PeerCopies::begin() {
  ++sequence_;
  tell(kComplete);
  await(kComplete);
}

void PeerCopies::end() {
  tell(kRead);
  await(kRead);
}

// 0x7f7f7f7f is beyond every collective of a run.
void PeerCopies::release() {
  if (flags_) cudaMemsetAsync(flags_, 0x7f, 2 * kMaxPeers * sizeof(uint32_t), release_stream_);
}

// ---- collectives

void PeerCopies::reduce_scatter(Tensor x) {
  const Buffer& b = *buffer_of(x);
  const size_t part = x.bytes() / size_t(world_), at = size_t(rank_) * part;
  const size_t offset = size_t(static_cast<char*>(x.data) - b.mine) + at;
  const size_t chunk = kStagingBytes / size_t(world_ - 1) / 256 * 256;
  begin();
  for (size_t done = 0; done < part; done += chunk) {
    const size_t bytes = std::min(chunk, part - done);
    Parts parts{};
    char* staging = staging_;
    for (int turn = 1; turn < world_; ++turn) {  // each rank begins with another peer
      const int p = (rank_ + turn) % world_;
      CUDA_CHECK(cudaMemcpyAsync(staging, b.theirs[size_t(p)] + offset + done, bytes,
                                 cudaMemcpyDeviceToDevice, stream_));
      parts.of[p] = staging;
      staging += chunk;
    }
    char* const own = b.mine + offset + done;
    parts.of[rank_] = own;
    const int64_t n = int64_t(bytes / size_of(x.dtype));
    const auto blocks = unsigned(std::min<size_t>((bytes / 16 + 511) / 512, 1024));
    if (x.dtype == DType::f32)
      sum_parts<float><<<blocks, 512, 0, stream_>>>(reinterpret_cast<float*>(own), parts, world_, n);
    else
      sum_parts<bf16><<<blocks, 512, 0, stream_>>>(reinterpret_cast<bf16*>(own), parts, world_, n);
    CUDA_CHECK(cudaGetLastError());
  }
  end();
}

void PeerCopies::all_gather(Tensor x) {
  const Buffer& b = *buffer_of(x);
  const size_t part = x.bytes() / size_t(world_);
  const size_t offset = size_t(static_cast<char*>(x.data) - b.mine);
  begin();
  for (int turn = 1; turn < world_; ++turn) {
    const size_t p = size_t((rank_ + turn) % world_);
    CUDA_CHECK(cudaMemcpyAsync(b.mine + offset + p * part, b.theirs[p] + offset + p * part, part,
                               cudaMemcpyDeviceToDevice, stream_));
  }
  end();
}

}  // namespace hgrn
