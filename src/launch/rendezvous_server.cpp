#include "launch/rendezvous_server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

#include "core/check.h"
#include "core/log.h"
#include "launch/sockets.h"

namespace hgrn {
namespace {

using wire::Type;
constexpr double kHelloSeconds = 5;              // a stranger's time to say who it is
constexpr size_t kMaxStrangers = 64;             // at a time
constexpr size_t kMaxValues = size_t(64) << 20;  // bytes in all
constexpr double kFlushSeconds = 2;

std::string ending(Type type, Exit code, const std::string& text) {
  return wire::Writer().number(uint32_t(code)).text(text).frame(type);
}

}  // namespace

std::string ranks_not_in(const std::set<int>& there, int n) {
  std::string text;
  for (int r = 0; r < n; ++r) {
    if (there.count(r)) continue;
    int last = r;
    while (last + 1 < n && !there.count(last + 1)) ++last;
    text += (text.empty() ? "" : ", ") +
            (last > r + 1 ? fmt::format("{}-{}", r, last) : std::to_string(r));
    if (last > r + 1) r = last;
  }
  return text;
}

RendezvousServer::RendezvousServer(const RankEnv& env, const std::string& hash,
                                   const std::string& version)
    : env_(env), hash_(hash), version_(version) {
  listener_ = listen_on(env.master_addr, env.master_port);
  int ends[2];
  check(::pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0, "no pipe for the rendezvous");
  wake_read_ = Fd(ends[0]);
  wake_write_ = Fd(ends[1]);
  started_ = last_turn_ = monotonic_s();
  thread_ = std::thread([this] { run(); });
}

RendezvousServer::~RendezvousServer() {
  wake_write_.reset();
  thread_.join();
}

std::string RendezvousServer::missing() const {
  std::set<int> there;
  for (const Peer& p : peers_)
    if (p.rank >= 0) there.insert(p.rank);
  return ranks_not_in(there, env_.world);
}

void RendezvousServer::run() {
  double stop_at = 0;  // once the owner has asked to end
  for (;;) {
    std::vector<pollfd> polled = {{stop_at > 0 ? -1 : wake_read_.get(), POLLIN, 0},
                                  {listener_ ? listener_.get() : -1, POLLIN, 0}};
    for (const Peer& p : peers_)
      polled.push_back({p.socket.get(), short(POLLIN | (p.out.empty() ? 0 : POLLOUT)), 0});
    ::poll(polled.data(), polled.size(), 50);
    const size_t known = peers_.size();
    for (size_t i = 0; i < known; ++i) {
      if (polled[i + 2].revents != 0) read_from(peers_[i]);
      if (!send_some(peers_[i].socket, peers_[i].out)) peers_[i].out.clear();
    }
    if (polled[1].revents != 0) accept_some();
    check_times();
    drop_closed();
    if (polled[0].revents != 0) {
      stop_at = monotonic_s() + kFlushSeconds;
      listener_.reset();
      for (Peer& p : peers_) p.out += ending(Type::bye, Exit::ok, "");
    }
    const bool sent =
        std::all_of(peers_.begin(), peers_.end(), [](const Peer& p) { return p.out.empty(); });
    if (stop_at > 0 && (sent || monotonic_s() > stop_at)) return;
  }
}

void RendezvousServer::accept_some() {
  const size_t strangers =
      size_t(std::count_if(peers_.begin(), peers_.end(), [](const Peer& p) { return p.rank < 0; }));
  for (size_t n = strangers; n < kMaxStrangers; ++n) {
    Fd s(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!s) return;
    Peer& p = peers_.emplace_back();
    p.socket = std::move(s);
    p.since = p.heard = monotonic_s();
  }
}

void RendezvousServer::read_from(Peer& peer) {
  if (peer.closing) {
    std::string ignored;
    if (!receive_some(peer.socket, ignored)) peer.out.clear();
    return;
  }
  const size_t before = peer.in.size();
  const bool open = receive_some(peer.socket, peer.in);
  if (peer.in.size() > before) peer.heard = monotonic_s();
  wire::Frame frame;
  while (!peer.closing) {
    const size_t limit = peer.rank < 0 ? wire::kMaxHello : wire::kMaxFrame;
    const wire::Take taken = wire::take_frame(peer.in, limit, frame);
    if (taken == wire::Take::none) break;
    if (taken == wire::Take::bad || (peer.rank < 0) != (frame.type == Type::hello)) {
      peer.closing = true;  // not one of ours; it gets no answer
    } else if (peer.rank < 0) {
      on_hello(peer, frame);
    } else {
      on_frame(peer, frame);
    }
  }
  if (open || peer.closing) return;
  peer.closing = true;
  peer.out.clear();
  if (peer.rank < 0 || peer.ended || over_) return;
  if (complete_) {
    lost(Exit::failed,
         fmt::format("{} is gone without a word: it was killed or crashed; see its log", peer.who));
  } else {  // it may come again
    --present_;
    peer.rank = -1;
  }
}

void RendezvousServer::on_hello(Peer& peer, const wire::Frame& frame) {
  wire::Hello h;
  if (!parse_hello(frame.payload, h)) {
    peer.closing = true;
    return;
  }
  if (h.protocol != wire::kProtocol)
    return refuse(
        peer, Exit::usage,
        fmt::format("rank 0 speaks version {} of the rendezvous and this rank {}; run the "
                    "same hgrn on all machines",
                    wire::kProtocol, h.protocol));
  if (!wire::equal_secrets(h.token, env_.token))
    return refuse(peer, Exit::usage,
                  "HGRN_JOB_TOKEN differs from that of rank 0; is this another job's MASTER_PORT?");
  if (!refusal_.empty()) {
    peer.out += refusal_;
    peer.closing = true;
    return;
  }
  peer.who = fmt::format("rank {} of {} (host {}, pid {})", h.rank, h.world, h.host, h.pid);
  if (int64_t(h.world) != env_.world || h.rank >= h.world)
    return refuse_all(Exit::usage, fmt::format("{} came, but rank 0 counts {} ranks; start all "
                                               "with one world size",
                                               peer.who, env_.world));
  if (h.version != version_)
    return refuse_all(Exit::usage, fmt::format("{} runs hgrn {}, rank 0 {}; run the same on all",
                                               peer.who, h.version, version_));
  if (h.hash != hash_)
    return refuse_all(Exit::usage,
                      fmt::format("{} has another config or other flags than rank 0; start all "
                                  "ranks with the same --config, --set, --device, --steps, "
                                  "--resume, --init-from and HGRN_RUN_AHEAD",
                                  peer.who));
  for (const Peer& other : peers_)
    if (other.rank == int(h.rank))
      return refuse(peer, Exit::usage,
                    fmt::format("{} is here already; each rank may come once", other.who));
  peer.rank = int(h.rank);
  if (++present_ < env_.world) return;
  complete_ = true;
  listener_.reset();  // nobody else is expected
  for (Peer& p : peers_) {
    if (p.rank >= 0)
      p.out += wire::Writer().frame(Type::welcome);
    else
      p.closing = true;
    p.heard = monotonic_s();
  }
}

void RendezvousServer::on_frame(Peer& peer, const wire::Frame& frame) {
  wire::Reader r(frame.payload);
  if (frame.type == Type::set) {
    const std::string key = r.text();
    std::string value = r.text();
    if (r.done()) store(key, std::move(value));
  } else if (frame.type == Type::get) {
    const std::string key = r.text();
    if (const auto found = values_.find(key); found != values_.end())
      peer.out += wire::Writer().text(key).text(found->second).frame(Type::value);
    else
      peer.waiting.insert(key);
  } else if (frame.type == Type::bye) {
    const auto code = Exit(r.number());
    const std::string text = r.text();
    peer.ended = true;
    if (code != Exit::ok && code != Exit::stopped)
      lost(code, fmt::format("{} failed: {}", peer.who, text));
  }
}

void RendezvousServer::store(const std::string& key, std::string value) {
  value_bytes_ += key.size() + value.size();
  if (value_bytes_ > kMaxValues) return lost(Exit::failed, "the rendezvous store is full");
  for (Peer& p : peers_)
    if (p.waiting.erase(key)) p.out += wire::Writer().text(key).text(value).frame(Type::value);
  values_[key] = std::move(value);
}

void RendezvousServer::refuse(Peer& peer, Exit code, const std::string& text) {
  peer.out += ending(Type::refuse, code, text);
  peer.closing = true;
}

void RendezvousServer::refuse_all(Exit code, const std::string& text) {
  over_ = true;
  refusal_ = ending(Type::refuse, code, text);  // for those that come later too
  for (Peer& p : peers_) {
    const bool ours = p.rank >= 0 || !p.who.empty();
    if (ours && !p.closing) refuse(p, code, text);
    p.closing = true;
  }
}

void RendezvousServer::lost(Exit code, const std::string& text) {
  if (over_) return;  // the first loss explains the others
  over_ = true;
  for (Peer& p : peers_)
    if (p.rank >= 0 && !p.ended) p.out += ending(Type::lost, code, text);
}

void RendezvousServer::check_times() {
  const double now = monotonic_s();
  const double period = std::min(1.0, env_.silence_s / 5);
  if (now - last_turn_ > std::max(1.0, 2 * period))  // this process itself was stopped
    for (Peer& p : peers_) p.heard = now;
  last_turn_ = now;
  for (Peer& p : peers_)
    if (p.rank < 0 && now - p.since > kHelloSeconds) p.closing = true, p.out.clear();
  if (!complete_ && !over_ && now - started_ > env_.join_s)
    return refuse_all(
        Exit::failed,
        fmt::format("only {} of {} ranks came to {}:{} within {:g} s; missing: {}. See their logs, "
                    "or raise HGRN_JOIN_TIMEOUT",
                    present_, env_.world, env_.master_addr, env_.master_port, env_.join_s,
                    missing()));
  if (now - last_ping_ < period) return;
  last_ping_ = now;
  for (Peer& p : peers_) {
    if (p.rank < 0 || p.ended || p.closing) continue;
    if (p.out.size() < wire::kMaxFrame) p.out += wire::Writer().frame(Type::ping);
    if (complete_ && !over_ && now - p.heard > env_.silence_s)
      lost(Exit::failed, fmt::format("{} has said nothing for {:g} s: it hangs, or its machine or "
                                     "network does",
                                     p.who, env_.silence_s));
  }
}

void RendezvousServer::drop_closed() {
  std::erase_if(peers_, [](const Peer& p) { return p.closing && p.out.empty(); });
}

}  // namespace hgrn
