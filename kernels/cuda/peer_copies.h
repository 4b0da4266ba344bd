// Sums and gathers between the GPUs of one machine by their copy engines. A kernel of NCCL that sums
// takes multiprocessors from the step's products, whose kernels have one block a multiprocessor and
// then need a second round. Here each GPU pulls the other GPUs' numbers of its own part through
// NVLink, without any kernel, and adds them up in the order of the ranks: one short kernel, and the
// same bits in every run.
//
// Buffers are shared between the processes (CUDA IPC) by share(), which all ranks call alike. Around
// each collective stand two agreements, made by the streams themselves in words of device memory: "my
// numbers are complete" before, "I have read yours" after. Nothing here waits on the host.
// Test: tests/train/test_gpu_ranks.cpp
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace hgrn {

class KeyValueStore;

class PeerCopies {
 public:
  // `stream`: of the collectives. All ranks construct it, or none; one that is not `on` keeps all out.
  PeerCopies(int rank, int world, KeyValueStore& store, cudaStream_t stream, bool on);
  ~PeerCopies();
  PeerCopies(const PeerCopies&) = delete;
  PeerCopies& operator=(const PeerCopies&) = delete;

  // True on all ranks where the others' `whole` can be read by each of them, else false on all.
  bool share(Tensor whole);
  // Whether a collective over x, with `world` equal parts, can go through here: the same on all ranks.
  bool takes(Tensor x) const;

  void reduce_scatter(Tensor x);  // part `rank` of x becomes the sum; the other parts stay
  void all_gather(Tensor x);      // part p of x becomes that of rank p

  // For another thread: whatever waits for a peer goes on; what it then reads is worthless.
  void release();

 private:
  struct Buffer {
    char* mine = nullptr;
    size_t bytes = 0;
    std::vector<char*> theirs;  // by rank; own: null
  };
  bool exchange(Tensor whole, Buffer& buffer);
  bool all_agree(bool mine);
  char* open(int rank, const std::string& handle);
  const Buffer* buffer_of(Tensor x) const;
  void begin();  // the peers' numbers may be read
  void end();    // the own ones have been read
  void tell(int kind);
  void await(int kind);

  const int rank_, world_;
  KeyValueStore& store_;
  const cudaStream_t stream_;
  cudaStream_t release_stream_ = nullptr;
  uint32_t* flags_ = nullptr;             // [kind][peer]: the newest collective that the peer told of
  std::vector<uint32_t*> their_flags_;    // by rank
  char* staging_ = nullptr;               // of the peers' numbers
  uint32_t sequence_ = 0;
  int exchanges_ = 0;
  std::vector<Buffer> buffers_;
  std::map<std::string, char*> opened_;  // by rank and handle: a handle opens once
  void *write_value_ = nullptr, *wait_value_ = nullptr;
};

}  // namespace hgrn
