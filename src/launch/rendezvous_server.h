// The part of the rendezvous that rank 0 runs: it waits for all ranks, refuses those that do not
// belong together, keeps the values that they leave for each other, and watches them afterwards.
// One thread; nothing that a connection does or leaves out can hold it up.
#pragma once
#include <map>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "core/file.h"
#include "launch/rank_env.h"
#include "launch/wire.h"

namespace hgrn {

class RendezvousServer {
 public:
  // Listens on env.master_addr:master_port alone. Exit::failed where it cannot.
  RendezvousServer(const RankEnv& env, const std::string& hash, const std::string& version);
  ~RendezvousServer();  // what is still to be said is sent, for at most two seconds

 private:
  struct Peer {
    Fd socket;
    std::string in, out;
    int rank = -1;                  // until its hello was accepted
    std::string who;                // "rank 2 of 4 (host a, pid 7)"
    double since = 0, heard = 0;    // accepted; last bytes
    bool closing = false;           // once `out` is sent
    bool ended = false;             // it said bye
    std::set<std::string> waiting;  // keys it asked for
  };

  void run();
  void accept_some();
  void read_from(Peer& peer);
  void on_hello(Peer& peer, const wire::Frame& frame);
  void on_frame(Peer& peer, const wire::Frame& frame);
  void store(const std::string& key, std::string value);
  void refuse(Peer& peer, Exit code, const std::string& text);
  void refuse_all(Exit code, const std::string& text);
  void lost(Exit code, const std::string& text);
  void check_times();
  void drop_closed();
  std::string missing() const;

  const RankEnv env_;
  const std::string hash_, version_;
  Fd listener_, wake_read_, wake_write_;
  std::vector<Peer> peers_;
  std::map<std::string, std::string> values_;
  size_t value_bytes_ = 0;
  int present_ = 0;
  bool complete_ = false, over_ = false;
  std::string refusal_;  // the frame that all get, once some disagreed
  double started_ = 0, last_turn_ = 0, last_ping_ = 0;
  std::thread thread_;
};

// "1, 3-5 and 7"-like list of the numbers below n that are not in `there`, for messages.
std::string ranks_not_in(const std::set<int>& there, int n);

}  // namespace hgrn
