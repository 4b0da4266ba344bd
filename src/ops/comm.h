// Collectives between the ranks of a run. Two engines: Gloo for ranks on CPUs
// (kernels/cpu/comm_gloo.cpp) and NCCL for GPUs (kernels/cuda/comm_nccl.cpp); no collective is
// written here. One rank has a Comm too, which does nothing.
//
// Collectives are asynchronous. Each starts once the work that Ops was given before the call is
// done, on a thread (Gloo) or stream (NCCL) of its own, one after another in the order of the
// calls, which must be the same on all ranks. It returns a ticket; wait(ticket) makes the work that
// Ops is given afterwards start after that collective and all before it. Until then its tensors
// must be left alone. A lost peer or an error of the engine is Exit::failed, thrown by wait().
// All calls come from one thread. The same calls on the same ranks give the same bits, and an
// all_reduce gives the same bits on every rank.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "ops/ops.h"

namespace hgrn {

class Comm {
 public:
  Comm(int rank, int world) : rank_(rank), world_(world) {}
  virtual ~Comm() = default;
  int rank() const { return rank_; }
  int world() const { return world_; }
  virtual std::string describe() const = 0;  // "gloo, 4 ranks"

  using Ticket = int64_t;
  // x = sum over the ranks; f32, f64 or bf16.
  virtual Ticket all_reduce(Tensor x) = 0;
  // Of x (world*n), part `rank` becomes the sum over the ranks; the other parts are undefined
  // afterwards.
  virtual Ticket reduce_scatter(Tensor x) = 0;
  // x (world*n), of which part `rank` is given, becomes whole.
  virtual Ticket all_gather(Tensor x) = 0;
  // x = that of rank `root`.
  virtual Ticket broadcast(Tensor x, int root) = 0;

  // Memory between which collectives are faster, or cost the device less, than between any other;
  // of one size on all ranks, which ask for it in the same order. `reduced`: bytes of the largest
  // tensor in it that is summed over the ranks. It goes with this Comm. Null: there is nothing of
  // the kind, and any memory does as well.
  virtual void* alloc_shared(size_t bytes, size_t reduced) {
    (void)bytes, (void)reduced;
    return nullptr;
  }
  // It may be had again by the next alloc_shared().
  virtual void free_shared(void* memory) { (void)memory; }

  virtual void wait(Ticket ticket) = 0;
  // x = sum over the ranks, in the order of Ops' operations: what Ops is given afterwards sees it,
  // and all collectives before it are done by then. For the few numbers on which ranks agree, where
  // there is nothing to hide it under: costs the device less than all_reduce() and wait().
  virtual void agree(Tensor x) { wait(all_reduce(x)); }
  // After the host has waited for the device (Ops::download): throws where a collective was given
  // up meanwhile, so that what came out of it is not believed. Where wait() holds the host, it has
  // said so.
  virtual void throw_if_failed() {}
  // Returns on the host once every rank has called it and all collectives before are done.
  virtual void barrier() = 0;
  // Before the tensors' memory goes: waits shortly for what still travels. False: a collective does
  // not end, since the run has failed; the memory must then be left until the process ends.
  virtual bool close() { return true; }
  // What the program is about to end with, for the case that the device does not let it.
  virtual void last_words(const Error& e) { (void)e; }

 private:
  const int rank_, world_;
};

// Where ranks leave small values for each other while they connect. launch/rendezvous.h has one.
class KeyValueStore {
 public:
  virtual ~KeyValueStore() = default;
  virtual void set(const std::string& key, std::string_view value) = 0;
  virtual std::string get(const std::string& key) = 0;  // waits until some rank has set it
};

struct CommOptions {
  int rank = 0, world = 1;
  KeyValueStore* store = nullptr;  // for more than one rank; used while connecting only
  bool one_machine = false;        // all ranks are on this one
  std::string address;             // of this machine, as the other ranks reach it (Gloo)
  double timeout_s = 1800;         // of one collective, waiting for the slowest rank included
  // Asked several times a second by the engine's own thread: true once the run is lost. A
  // collective that its peer will never join is then given up, and the device goes on.
  std::function<bool()> lost;
  // Ends the program with this error, and does not return: called where the engine's own thread
  // sees that the main thread waits for a device that will never be done.
  std::function<void(const Error&)> give_up;
  // Asked when a collective fails: who is to blame, as far as is known. It may throw the Error that
  // the run should end with, or return an empty text.
  std::function<std::string()> explain;
};

// Connects with all other ranks; the engine is that of the device (not `automatic`).
std::unique_ptr<Comm> open_comm(Device device, Ops& ops, const CommOptions& options);

// Factories that the kernels libraries define; Exit::usage in a build without the engine.
std::unique_ptr<Comm> make_gloo_comm(const CommOptions& options);
std::unique_ptr<Comm> make_nccl_comm(Ops& ops, const CommOptions& options);
bool gloo_built();
bool nccl_built();

}  // namespace hgrn
