// Which engine serves a device, the Comm of one rank, and the answers of builds without an engine.
#include "ops/comm.h"

namespace hgrn {
namespace {

class OneRank final : public Comm {
 public:
  OneRank() : Comm(0, 1) {}
  std::string describe() const override { return "one rank"; }
  Ticket all_reduce(Tensor) override { return 0; }
  Ticket reduce_scatter(Tensor) override { return 0; }
  Ticket all_gather(Tensor) override { return 0; }
  Ticket broadcast(Tensor, int) override { return 0; }
  void wait(Ticket) override {}
  void barrier() override {}
};

}  // namespace

std::unique_ptr<Comm> open_comm(Device device, Ops& ops, const CommOptions& options) {
  check(device != Device::automatic, "open_comm needs a device");
  check(0 <= options.rank && options.rank < options.world, "rank {} of {}", options.rank,
        options.world);
  if (options.world == 1) return std::make_unique<OneRank>();
  check(options.store != nullptr, "{} ranks need a store to find each other", options.world);
  return device == Device::cuda ? make_nccl_comm(ops, options) : make_gloo_comm(options);
}

#ifndef HGRN_WITH_GLOO
bool gloo_built() {
  return false;
}
std::unique_ptr<Comm> make_gloo_comm(const CommOptions&) {
  fail(Exit::usage,
       "several ranks on CPUs need Gloo, and this hgrn was built without it; install libgloo-dev "
       "and build with -DHGRN_GLOO=ON, or start one rank");
}
#endif

#ifndef HGRN_WITH_NCCL
bool nccl_built() {
  return false;
}
std::unique_ptr<Comm> make_nccl_comm(Ops&, const CommOptions&) {
  fail(Exit::usage,
       "several ranks on GPUs need NCCL, and this hgrn was built without it; install libnccl-dev "
       "and build again, or start one rank");
}
#endif

}  // namespace hgrn
