// Two "hosts" on one machine: network namespaces with a cable between them, a launcher in each, and
// the ranks' traffic through the address by which they reach rank 0.
#include "catch.h"
#include "launch/run_ranks.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

class TwoHosts {
 public:
  TwoHosts() {
    a_ = "hgrna" + std::to_string(::getpid());
    b_ = "hgrnb" + std::to_string(::getpid());
    const std::string cable = std::to_string(::getpid() % 100000);
    ok_ = sh("ip netns add " + a_) && sh("ip netns add " + b_) &&
          sh("ip link add va" + cable + " netns " + a_ + " type veth peer name vb" + cable +
             " netns " + b_) &&
          sh("ip -n " + a_ + " addr add 10.77.0.1/24 dev va" + cable) &&
          sh("ip -n " + b_ + " addr add 10.77.0.2/24 dev vb" + cable) &&
          sh("ip -n " + a_ + " link set va" + cable + " up") &&
          sh("ip -n " + b_ + " link set vb" + cable + " up") &&
          sh("ip -n " + a_ + " link set lo up") && sh("ip -n " + b_ + " link set lo up");
  }
  ~TwoHosts() {
    sh("ip netns del " + a_);
    sh("ip netns del " + b_);
  }
  bool ok() const { return ok_; }
  const std::string& name(int node) const { return node == 0 ? a_ : b_; }

 private:
  static bool sh(const std::string& command) {
    return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
  }
  std::string a_, b_;
  bool ok_ = false;
};

Process on_host(const RankRuns& r, const TwoHosts& hosts, int node, const std::string& out,
                const std::vector<std::string>& set, const std::string& token) {
  std::vector<std::string> words = {"netns",
                                    "exec",
                                    hosts.name(node),
                                    program(),
                                    "launch",
                                    "--nnodes",
                                    "2",
                                    "--node-rank",
                                    std::to_string(node),
                                    "--nproc-per-node",
                                    "2",
                                    "--master-addr",
                                    "10.77.0.1",
                                    "--master-port",
                                    "29611",
                                    "--"};
  for (const std::string& w : r.train_words(out, set)) words.push_back(w);
  return Process("ip", words, RankRuns::env({{"HGRN_JOB_TOKEN", token}}),
                 r.log("node" + std::to_string(node)));
}

}  // namespace

TEST_CASE("hosts: two machines train as one does; a lost machine is named", "[launch]") {
  NEEDS_GLOO();
  const TwoHosts hosts;
  if (!hosts.ok()) {
    WARN("skipped: no right to make network namespaces (root, iproute2)");
    return;
  }
  const RankRuns r;
  const std::vector<std::string> set = {"train.global_batch=4", "train.micro_batch=1"};
  CHECK(r.launch(4, "one", set).wait() == 0);
  {
    Process b = on_host(r, hosts, 1, "two", set, "t");
    Process a = on_host(r, hosts, 0, "two", set, "t");
    CHECK(a.wait() == 0);
    CHECK(b.wait() == 0);
    INFO(a.output() << b.output());
    CHECK(a.says("gloo, 4 ranks, rank 0 at 10.77.0.1"));
    CHECK(r.losses("two").size() == 12);
    CHECK(r.losses("two") == r.losses("one"));
    CHECK(r.file("two", "00000012") == r.file("one", "00000012"));
  }
  std::vector<std::string> forever = set;
  forever.push_back("train.steps=100000");
  Process b = on_host(r, hosts, 1, "lost", forever, "t");
  Process a = on_host(r, hosts, 0, "lost", forever, "t");
  REQUIRE(a.wait_for_text("step      4/"));
  b.signal(SIGKILL);  // `ip netns exec` becomes the launcher: its ranks go with it
  CHECK(a.wait(15) == 1);
  INFO(a.output());
  CHECK((a.says("rank 2 of 4 (") || a.says("rank 3 of 4 (")));
  CHECK(r.nobody_left("lost"));
}
