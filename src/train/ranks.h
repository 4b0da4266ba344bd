// The ranks of one run: how this process joins them, their collectives, and small agreements that
// keep them in step. With one rank everything here is trivial.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "launch/rank_env.h"
#include "launch/rendezvous.h"
#include "ops/comm.h"

namespace hgrn {

class Ranks {
 public:
  struct Options {
    RankEnv env;
    std::string agreed;  // text that must be the same on all ranks
    std::function<bool()> stopped;
    std::function<void(const Error&)> give_up;
  };
  // Waits for the other ranks; see Rendezvous for the errors. `device` is not `automatic`.
  Ranks(Device device, Ops& ops, const Options& options);
  ~Ranks();

  int rank() const { return env_.rank; }
  int world() const { return env_.world; }
  bool first() const { return env_.rank == 0; }
  bool alone() const { return env_.world == 1; }
  Comm& comm() { return *comm_; }

  // Memory for what ranks exchange: the Comm's (Comm::alloc_shared(), which says what the arguments
  // are) where every rank got some, else each rank's own. It goes before this does.
  using Memory = std::unique_ptr<void, std::function<void(void*)>>;
  Memory alloc_shared(size_t bytes, size_t reduced, const std::string& name);

  // All ranks call these, and alloc_shared(), in the same order.
  std::vector<double> gather(double mine);          // one number of each rank; waits
  std::string from_first(const std::string& text);  // rank 0's text, the others' is ignored
  void barrier() { comm_->barrier(); }
  // Exit::data on all ranks where some do not see the folder that rank 0 sees under this path.
  void check_shared_folder(const std::string& folder);
  // Exit::data on all ranks where the text differs between them; `what` names it.
  void check_equal(const std::string& text, const std::string& what);

  // This rank ends with an error. It returns the one to throw: where a collective failed since
  // another rank is lost, that is the news of which; else e with the rank in front.
  Error failed(const Error& e);
  // Before memory goes that collectives use; see Comm::close().
  bool close();

 private:
  std::string missing_ranks(const std::vector<double>& ok) const;  // of those that gave 0
  const RankEnv env_;
  const bool gpu_;
  Ops& ops_;
  std::unique_ptr<Rendezvous> rendezvous_;
  std::unique_ptr<Comm> comm_;
  void* memory_ = nullptr;
  Tensor numbers_ /*(world) f64*/;
  int64_t texts_ = 0;
};

}  // namespace hgrn
