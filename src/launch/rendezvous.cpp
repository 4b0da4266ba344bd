#include "launch/rendezvous.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "launch/rendezvous_server.h"
#include "launch/sockets.h"
#include "launch/wire.h"

namespace hgrn {

using wire::Type;

Rendezvous::Rendezvous(RendezvousOptions options) : options_(std::move(options)) {
  const RankEnv& env = options_.env;
  if (env.rank == 0)
    server_ = std::make_unique<RendezvousServer>(env, options_.hash, options_.version);
  join();
  int ends[2];
  check(::pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0, "no pipe for the rendezvous");
  wake_read_ = Fd(ends[0]);
  wake_write_ = Fd(ends[1]);
  thread_ = std::thread([this] { listen(); });
}

Rendezvous::~Rendezvous() {
  failed(Error(Exit::ok, ""));
  thread_.join();
}

// Connects, again and again while rank 0 is not up, and waits for its welcome.
void Rendezvous::join() {
  const RankEnv& env = options_.env;
  const std::string where = fmt::format("{}:{}", env.master_addr, env.master_port);
  const auto check_stop = [&] {
    check(!options_.stopped || !options_.stopped(), Exit::stopped,
          "stopped by a signal before all ranks were there; run again to go on");
  };
  const std::string hello =
      wire::hello_frame({wire::kProtocol, env.token, uint32_t(env.rank), uint32_t(env.world),
                         options_.hash, options_.version, host_name(), uint32_t(::getpid())});
  const double connect_until = monotonic_s() + env.join_s;
  for (;;) {
    std::string why;
    while (!(socket_ = connect_to(env.master_addr, env.master_port, 2, why))) {
      check_stop();
      check(monotonic_s() < connect_until, Exit::failed,
            "rank {} of {} did not reach rank 0 at {} within {:g} s ({}); see rank 0's log, and "
            "check MASTER_ADDR and MASTER_PORT",
            env.rank, env.world, where, env.join_s, why);
      ::poll(nullptr, 0, 50);
    }
    std::string out = hello;
    in_.clear();
    const double until = monotonic_s() + env.join_s + 10;  // the server is to speak first
    bool open = true;
    while (open) {
      wire::Frame f;
      switch (wire::take_frame(in_, wire::kMaxFrame, f)) {
        case wire::Take::bad:
          fail(Exit::usage, "rank {} of {}: what listens on {} is no hgrn; choose another port",
               env.rank, env.world, where);
        case wire::Take::frame: {
          if (f.type == Type::welcome) {
            address_ = local_address(socket_);
            return;
          }
          if (f.type != Type::refuse) continue;
          wire::Reader r(f.payload);
          const auto code = Exit(r.number());
          fail(code, "rank {} of {}: {}", env.rank, env.world, r.text());
        }
        case wire::Take::none: break;
      }
      check_stop();
      check(monotonic_s() < until, Exit::failed,
            "rank {} of {}: {} took the connection and says nothing; is MASTER_PORT another "
            "program's?",
            env.rank, env.world, where);
      pollfd p = {socket_.get(), short(POLLIN | (out.empty() ? 0 : POLLOUT)), 0};
      ::poll(&p, 1, 50);
      open = send_some(socket_, out) && receive_some(socket_, in_);
    }
    // Closed without an answer: too many strangers, or rank 0 has died. Again.
    check(monotonic_s() < connect_until, Exit::failed,
          "rank {} of {}: rank 0 at {} closed the connection; see its log", env.rank, env.world,
          where);
    ::poll(nullptr, 0, 200);
  }
}

void Rendezvous::send(const std::string& frame) {
  {
    std::lock_guard lock(mutex_);
    out_ += frame;
  }
  [[maybe_unused]] const ssize_t n = ::write(wake_write_.get(), "x", 1);  // full: it is awake
}

void Rendezvous::set(const std::string& key, std::string_view value) {
  send(wire::Writer().text(key).text(value).frame(Type::set));
}

std::string Rendezvous::get(const std::string& key) {
  send(wire::Writer().text(key).frame(Type::get));
  std::unique_lock lock(mutex_);
  const auto there = [&] { return lost_ || over_ || values_.count(key) > 0; };
  const auto limit = std::chrono::duration<double>(options_.env.join_s);
  const bool came = news_.wait_for(lock, limit, there);
  if (lost_) throw Error(lost_code_, lost_text_);
  check(came && values_.count(key) > 0, Exit::failed,
        "rank {} of {}: no rank told \"{}\" within {:g} s", options_.env.rank, options_.env.world,
        key, options_.env.join_s);
  return values_[key];
}

void Rendezvous::on_lost(Exit code, const std::string& text) {
  std::lock_guard lock(mutex_);
  if (lost_ || over_ || ended_) return;
  lost_ = true;
  lost_at_ = monotonic_s();
  lost_code_ = code;
  lost_text_ = fmt::format("rank {} of {} ends: {}", options_.env.rank, options_.env.world, text);
  news_.notify_all();
}

void Rendezvous::throw_if_lost() {
  std::unique_lock lock(mutex_);
  news_.wait_for(lock, std::chrono::duration<double>(options_.patience_s), [&] { return lost_; });
  if (lost_) throw Error(lost_code_, lost_text_);
}

bool Rendezvous::lost() const {
  const std::lock_guard lock(mutex_);
  return lost_;
}

void Rendezvous::failed(const Error& e) {
  {
    std::lock_guard lock(mutex_);
    if (ended_) return;
    ended_ = true;
    out_ += wire::Writer().number(uint32_t(e.code())).text(e.what()).frame(Type::bye);
  }
  [[maybe_unused]] const ssize_t n = ::write(wake_write_.get(), "x", 1);
}

void Rendezvous::listen() {
  const double silence = options_.env.silence_s, period = std::min(1.0, silence / 5);
  double heard = monotonic_s(), turn = heard, pinged = 0;
  bool open = true;
  for (;;) {
    std::string out;
    bool ended = false, give_up = false;
    const double now = monotonic_s();
    if (now - turn > std::max(1.0, 2 * period)) heard = now;  // this process itself was stopped
    turn = now;
    {
      std::lock_guard lock(mutex_);
      if (open && now - pinged > period) out_ += wire::Writer().frame(Type::ping), pinged = now;
      out = std::move(out_);
      out_.clear();
      ended = ended_;
      give_up = lost_ && !ended_ && now - lost_at_ > options_.patience_s;
    }
    if (give_up && options_.give_up) options_.give_up(Error(lost_code_, lost_text_));
    while (open && !out.empty()) {
      open = send_some(socket_, out);
      pollfd p = {socket_.get(), POLLOUT, 0};
      if (open && !out.empty() && ::poll(&p, 1, int(silence * 1e3)) == 0) open = false;
    }
    if (ended) return;
    pollfd p[2] = {{open ? socket_.get() : -1, POLLIN, 0}, {wake_read_.get(), POLLIN, 0}};
    ::poll(p, 2, int(period * 500));
    char drained[64];
    while (::read(wake_read_.get(), drained, sizeof drained) > 0) {
    }
    if (open && p[0].revents != 0) {
      const size_t before = in_.size();
      open = receive_some(socket_, in_);
      if (in_.size() > before) heard = monotonic_s();
    }
    wire::Frame f;
    while (wire::take_frame(in_, wire::kMaxFrame, f) == wire::Take::frame) {
      wire::Reader r(f.payload);
      if (f.type == Type::value) {
        const std::string key = r.text(), value = r.text();
        std::lock_guard lock(mutex_);
        values_[key] = value;
        news_.notify_all();
      } else if (f.type == Type::lost) {
        const auto code = Exit(r.number());
        on_lost(code, r.text());
      } else if (f.type == Type::bye) {
        std::lock_guard lock(mutex_);
        over_ = true;
        news_.notify_all();
      }
    }
    const std::string rank0 = fmt::format("rank 0 of {} (at {}:{})", options_.env.world,
                                          options_.env.master_addr, options_.env.master_port);
    if (!open)
      on_lost(Exit::failed, rank0 +
                                " is gone without a word: it was killed or crashed; see its "
                                "log");
    else if (monotonic_s() - heard > silence)
      on_lost(Exit::failed, fmt::format("{} has said nothing for {:g} s: it hangs, or its machine "
                                        "or network does",
                                        rank0, silence));
  }
}

}  // namespace hgrn
