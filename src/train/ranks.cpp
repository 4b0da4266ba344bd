#include "train/ranks.h"

#include <unistd.h>

#include <chrono>
#include <set>
#include <thread>

#include "core/file.h"
#include "core/log.h"
#include "core/version.h"
#include "launch/rendezvous_server.h"

namespace hgrn {

Ranks::Ranks(Device device, Ops& ops, const Options& o)
    : env_(o.env), gpu_(device == Device::cuda), ops_(ops) {
  CommOptions comm;
  comm.rank = env_.rank;
  comm.world = env_.world;
  comm.one_machine = env_.local_world == env_.world;
  if (!alone()) {
    RendezvousOptions r;
    r.env = env_;
    r.hash = hex16(xxh3(o.agreed.data(), o.agreed.size()));
    r.version = version();
    r.stopped = o.stopped;
    r.give_up = o.give_up;
    rendezvous_ = std::make_unique<Rendezvous>(std::move(r));
    comm.store = rendezvous_.get();
    comm.address = rendezvous_->address();
    comm.timeout_s = env_.collective_s;
    comm.give_up = o.give_up;
    comm.lost = [this] { return rendezvous_->lost(); };
    comm.explain = [this] {
      rendezvous_->throw_if_lost();
      return std::string();
    };
  }
  memory_ = ops.alloc(size_t(env_.world) * sizeof(double), "agreements");
  numbers_ = Tensor(memory_, DType::f64, {env_.world});
  try {
    comm_ = open_comm(device, ops, comm);
  } catch (const Error& e) {
    ops_.free(memory_);
    throw failed(e);
  }
  if (!alone()) log_info("{}, rank 0 at {}", comm_->describe(), rendezvous_->address());
}

Ranks::~Ranks() {
  if (close()) ops_.free(memory_);
}

bool Ranks::close() {
  return !comm_ || comm_->close();
}

Ranks::Memory Ranks::alloc_shared(size_t bytes, size_t reduced, const std::string& name) {
  void* const memory = comm_->alloc_shared(bytes, reduced);
  bool all = true;
  for (double got : gather(memory ? 1 : 0)) all = all && got != 0;
  if (all) {
    log_info("gradients and weights travel by copy engines");
    return {memory, [this](void* p) { comm_->free_shared(p); }};
  }
  if (memory) comm_->free_shared(memory);
  return {ops_.alloc(bytes, name), [this](void* p) { ops_.free(p); }};
}

std::vector<double> Ranks::gather(double mine) {
  std::vector<double> all(size_t(env_.world), 0.0);
  all[size_t(env_.rank)] = mine;
  if (alone()) return all;
  ops_.upload(numbers_, all.data());
  comm_->wait(comm_->all_gather(numbers_));
  ops_.download(all.data(), numbers_);
  comm_->throw_if_failed();
  return all;
}

std::string Ranks::from_first(const std::string& text) {
  if (alone()) return text;
  const std::string key = fmt::format("text/{}", texts_++);
  if (first()) {
    rendezvous_->set(key, text);
    return text;
  }
  return rendezvous_->get(key);
}

std::string Ranks::missing_ranks(const std::vector<double>& ok) const {
  std::set<int> well;
  for (size_t r = 0; r < ok.size(); ++r)
    if (ok[r] != 0) well.insert(int(r));
  return ranks_not_in(well, env_.world);
}

void Ranks::check_shared_folder(const std::string& folder) {
  if (alone()) return;
  const std::string name = from_first(fmt::format(
      ".ranks-{}-{}", ::getpid(),
      std::chrono::system_clock::now().time_since_epoch() / std::chrono::microseconds(1)));
  const std::string path = folder + "/" + name;
  if (first()) write_file_atomic(path, "which ranks see this?\n");
  barrier();
  bool seen = exists(path);
  // A network file system may show a new file some seconds later.
  for (int i = 0; i < 50 && !seen; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    seen = exists(path);
  }
  const std::vector<double> all = gather(seen ? 1 : 0);
  if (first()) remove_tree(path);
  const std::string blind = missing_ranks(all);
  check(blind.empty(), Exit::data,
        "{}: rank 0 wrote a file there that rank(s) {} of {} do not see; --out must be one folder "
        "on a file system that all ranks share",
        folder, blind, env_.world);
}

void Ranks::check_equal(const std::string& text, const std::string& what) {
  if (alone()) return;
  const std::string differ = missing_ranks(gather(from_first(text) == text ? 1 : 0));
  check(differ.empty(), Exit::data, "rank(s) {} of {} have other {} than rank 0", differ,
        env_.world, what);
}

Error Ranks::failed(const Error& e) {
  if (alone()) return e;
  const std::string name = fmt::format("rank {} of {}", env_.rank, env_.world);
  std::string text = e.what();
  // A peer's death may show as an error of the device, and before its connection ends.
  if (e.code() == Exit::failed && (gpu_ || rendezvous_->lost())) {
    try {
      rendezvous_->throw_if_lost();
    } catch (const Error& news) {
      if (text != news.what()) text += fmt::format(" ({})", news.what());
    }
  }
  rendezvous_->failed(e);
  const Error last(e.code(), text.find(name) != std::string::npos ? text : name + ": " + text);
  if (comm_) comm_->last_words(last);
  return last;
}

}  // namespace hgrn
