// How the ranks of a run find each other, and learn that one is lost. Rank 0 listens on
// MASTER_ADDR:MASTER_PORT (rendezvous_server.h); every rank, rank 0 too, keeps one connection to
// it. It carries no gradients: those go through Comm. Frames: wire.h.
#pragma once
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "core/check.h"
#include "core/file.h"
#include "launch/rank_env.h"
#include "ops/comm.h"

namespace hgrn {

class RendezvousServer;

struct RendezvousOptions {
  RankEnv env;
  std::string hash;               // of all that must agree: config, flags, device
  std::string version;            // of the program
  std::function<bool()> stopped;  // asked while waiting for the others; true: give up
  // Called on another thread when the run is lost and this rank has not ended `patience_s` later,
  // since it hangs in a collective: it must end the process.
  std::function<void(const Error&)> give_up;
  double patience_s = 2;
};

class Rendezvous final : public KeyValueStore {
 public:
  // Returns once all ranks are there and agree. Exit::usage if they do not, Exit::failed naming
  // the missing ones after env.join_s, Exit::stopped if `stopped` said so.
  explicit Rendezvous(RendezvousOptions options);
  ~Rendezvous() override;

  void set(const std::string& key, std::string_view value) override;
  std::string get(const std::string& key) override;  // throws if the run is lost meanwhile

  // The address by which this machine reaches rank 0's: the others reach this one by it.
  const std::string& address() const { return address_; }

  // After a failed collective: waits up to patience_s for the news of who is lost and throws it
  // with the code that the run ends with; returns where nothing is known.
  void throw_if_lost();
  // True once the run is known to be lost. Any thread may ask.
  bool lost() const;
  // This rank ends with an error, which the others then name. Without it, it ends well.
  void failed(const Error& e);

 private:
  void join();
  void listen();  // the thread
  void on_lost(Exit code, const std::string& text);
  void send(const std::string& frame);

  const RendezvousOptions options_;
  std::unique_ptr<RendezvousServer> server_;  // rank 0
  std::string address_, in_;
  Fd socket_, wake_read_, wake_write_;

  mutable std::mutex mutex_;  // of all below
  std::condition_variable news_;
  std::string out_;
  std::map<std::string, std::string> values_;
  bool lost_ = false, over_ = false, ended_ = false;  // run lost; server ended well; we said bye
  double lost_at_ = 0;
  Exit lost_code_ = Exit::failed;
  std::string lost_text_;
  std::thread thread_;
};

}  // namespace hgrn
