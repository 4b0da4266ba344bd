// How ranks find each other: agreement, the missing named, strangers and slow ones kept out, the
// lost noticed. Threads of one process stand for the ranks.
#include "launch/rendezvous.h"

#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "catch.h"
#include "launch/process.h"
#include "launch/rendezvous_server.h"
#include "launch/sockets.h"
#include "launch/wire.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

struct Meeting {
  int port = free_port();
  double join_s = 20, silence_s = 20;
  std::string token = "secret";

  RendezvousOptions options(int rank, int world) const {
    RendezvousOptions o;
    o.env.rank = rank;
    o.env.world = world;
    o.env.master_addr = "127.0.0.1";
    o.env.master_port = port;
    o.env.token = token;
    o.env.join_s = join_s;
    o.env.silence_s = silence_s;
    o.hash = "h";
    o.version = "v";
    o.patience_s = 10;
    return o;
  }
};

// Runs f(rank) for each rank at once; what each threw.
std::vector<Thrown> at_once(int ranks, const std::function<void(int)>& f) {
  std::vector<Thrown> thrown(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r)
    threads.emplace_back([&, r] { thrown[size_t(r)] = thrown_by([&] { f(r); }); });
  for (std::thread& t : threads) t.join();
  return thrown;
}

// CHECK is for one thread alone; what fails here ends the thread and is found in its Thrown.
void must(bool ok, const char* what) {
  hgrn::check(ok, "{}", what);
}

std::string read_all(const Fd& s, double seconds) {  // until the other end closes
  std::string in;
  eventually(seconds, [&] { return !receive_some(s, in); });
  return in;
}

}  // namespace

TEST_CASE("rendezvous: ranks meet in any order and share values", "[launch]") {
  const Meeting m;
  std::atomic<int> done{0};
  const auto thrown = at_once(4, [&](int rank) {
    sleep_ms(rank == 0 ? 300 : 20 * rank);  // rank 0 is late: the others come again
    Rendezvous r(m.options(rank, 4));
    must(r.address() == "127.0.0.1", "address");
    r.set("from/" + std::to_string(rank), std::string("value\0with zero", 15) + char('0' + rank));
    for (int other = 0; other < 4; ++other)
      must(r.get("from/" + std::to_string(other)) ==
               std::string("value\0with zero", 15) + char('0' + other),
           "value");
    ++done;
    while (done < 4) sleep_ms(1);
  });
  for (const Thrown& t : thrown) {
    INFO(t.text);
    CHECK(t.code == Exit::ok);
  }
}

TEST_CASE("rendezvous: ranks that do not come are named", "[launch]") {
  Meeting m;
  m.join_s = 0.5;
  const auto thrown = at_once(2, [&](int i) { Rendezvous r(m.options(i * 2, 6)); });
  for (const Thrown& t : thrown) {
    INFO(t.text);
    CHECK(t.code == Exit::failed);
    CHECK(t.has("missing: 1, 3-5"));
  }
  const Thrown alone = thrown_by([&] { Rendezvous r(m.options(1, 2)); });  // nobody listens
  CHECK(alone.code == Exit::failed);
  CHECK(alone.has("did not reach rank 0"));
}

TEST_CASE("rendezvous: ranks that disagree do not start, and all say why", "[launch]") {
  struct Case {
    std::function<void(RendezvousOptions&)> change;
    const char* part;
  };
  for (const Case& c :
       {Case{[](RendezvousOptions& o) { o.hash = "other"; }, "another config"},
        Case{[](RendezvousOptions& o) { o.version = "0.0"; }, "runs hgrn 0.0"},
        Case{[](RendezvousOptions& o) { o.env.world = 3; }, "rank 0 counts 2 ranks"}}) {
    const Meeting m;
    const auto thrown = at_once(2, [&](int rank) {
      RendezvousOptions o = m.options(rank, 2);
      if (rank == 1) c.change(o);
      Rendezvous r(o);
    });
    for (const Thrown& t : thrown) {
      INFO(t.text);
      CHECK(t.code == Exit::usage);
      CHECK(t.has(c.part));
      CHECK(t.has("rank 1 of"));
    }
  }
}

TEST_CASE("rendezvous: a rank that speaks another version of the protocol is told so", "[launch]") {
  Meeting m;
  m.join_s = 2;
  Thrown of_rank0;
  std::thread rank0([&] { of_rank0 = thrown_by([&] { Rendezvous r(m.options(0, 2)); }); });
  std::string why, in;
  Fd s;
  CHECK(eventually(5, [&] { return bool(s = connect_to("127.0.0.1", m.port, 1, why)); }));
  std::string out =  // what follows the version may have any form
      wire::Writer()
          .text(wire::kMagic)
          .number(wire::kProtocol + 1)
          .text("?")
          .frame(wire::Type::hello);
  send_some(s, out);
  in = read_all(s, 3);
  rank0.join();
  wire::Frame f;
  REQUIRE(wire::take_frame(in, wire::kMaxFrame, f) == wire::Take::frame);
  CHECK(f.type == wire::Type::refuse);
  wire::Reader r(f.payload);
  CHECK(Exit(r.number()) == Exit::usage);
  CHECK(r.text() == fmt::format("rank 0 speaks version {} of the rendezvous and this rank {}; run "
                                "the same hgrn on all machines",
                                wire::kProtocol, wire::kProtocol + 1));
  CHECK(of_rank0.has("missing: 1"));  // it stays outside, the run does not end for it
}

TEST_CASE("rendezvous: a wrong secret and a second rank 1 are refused, the run goes on",
          "[launch]") {
  const Meeting m;
  std::atomic<int> refused{0}, done{0};
  std::atomic<bool> first{false};
  const auto thrown = at_once(4, [&](int i) {
    if (i == 2) {  // another secret
      RendezvousOptions o = m.options(1, 3);
      o.env.token = "secreT";
      sleep_ms(100);
      const Thrown t = thrown_by([&] { Rendezvous r(o); });
      must(t.code == Exit::usage && t.has("HGRN_JOB_TOKEN"), "another secret");
      ++refused;
    } else if (i == 3) {  // rank 1 once more
      while (!first) sleep_ms(1);
      sleep_ms(300);
      const Thrown t = thrown_by([&] { Rendezvous r(m.options(1, 3)); });
      must(t.code == Exit::usage && t.has("is here already"), "rank 1 twice");
      ++refused;
      Rendezvous r(m.options(2, 3));
      ++done;
      while (done < 3) sleep_ms(1);
    } else {
      if (i == 1) first = true;
      Rendezvous r(m.options(i, 3));
      must(refused == 2, "complete too early");
      ++done;
      while (done < 3) sleep_ms(1);
    }
  });
  for (const Thrown& t : thrown) {
    INFO(t.text);
    CHECK(t.code == Exit::ok);
  }
}

TEST_CASE("rendezvous: garbage, slow and silent strangers are shut out", "[launch]") {
  const Meeting m;
  Thrown of_rank0;
  std::thread rank0([&] {
    of_rank0 = thrown_by([&] {
      Rendezvous r(m.options(0, 2));
      r.get("end");
    });
  });
  std::string why;
  Fd probe;
  REQUIRE(eventually(5, [&] { return bool(probe = connect_to("127.0.0.1", m.port, 1, why)); }));
  std::vector<Fd> silent;  // more than are let in at a time
  for (int i = 0; i < 80; ++i) silent.push_back(connect_to("127.0.0.1", m.port, 1, why));
  silent.clear();

  const std::string valid = wire::hello_frame({1, "secret", 1, 2, "h", "v", "host", 1});
  std::vector<std::string> bad = {
      "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
      std::string(100, '\xff'),
      wire::Writer().number(1).frame(wire::Type::hello),
      wire::Writer().text("key").text("value").frame(wire::Type::set),  // before any hello
      wire::Writer().text(std::string(5000, 'x')).frame(wire::Type::hello),
      wire::Writer().text(wire::kMagic).number(1).number(0xffffffff).frame(wire::Type::hello),
  };
  for (const std::string& bytes : bad) {
    Fd s = connect_to("127.0.0.1", m.port, 1, why);
    REQUIRE(bool(s));
    std::string out = bytes;
    send_some(s, out);
    CHECK(read_all(s, 3).empty());  // closed without a word
    CHECK_FALSE([&] {
      std::string in;
      return receive_some(s, in);
    }());
  }
  // One that sends a byte now and then is out after five seconds, and holds nobody up meanwhile.
  Fd slow = connect_to("127.0.0.1", m.port, 1, why);
  const double began = monotonic_s();
  bool out_after = false;
  for (size_t i = 0; i < 100 && !out_after; ++i) {
    std::string byte = valid.substr(std::min(i, valid.size() - 2), 1), in;
    out_after = !send_some(slow, byte) || !receive_some(slow, in);
    sleep_ms(100);
  }
  CHECK(out_after);
  CHECK(monotonic_s() - began < 8);

  const Thrown t = thrown_by([&] {
    Rendezvous r(m.options(1, 2));
    r.set("end", "");
    r.get("end");
  });
  INFO(t.text);
  CHECK(t.code == Exit::ok);
  rank0.join();
  INFO(of_rank0.text);
  CHECK(of_rank0.code == Exit::ok);
}

TEST_CASE("rendezvous: it listens on MASTER_ADDR alone, and says when it cannot", "[launch]") {
  const Meeting m;
  const Fd busy = listen_on("127.0.0.1", m.port);
  const Thrown t = thrown_by([&] { Rendezvous r(m.options(0, 2)); });
  CHECK(t.code == Exit::failed);
  CHECK(t.has("in use"));
  RendezvousOptions o = m.options(0, 2);
  o.env.master_addr = "192.0.2.1";  // nobody's
  const Thrown far = thrown_by([&] { Rendezvous r(o); });
  CHECK(far.code == Exit::failed);
  CHECK(far.has("MASTER_ADDR must be an address of the machine of rank 0"));
  // 127.0.0.2 is this machine too, but not the address that was named.
  const Fd only = listen_on("127.0.0.1", 0);
  std::string why;
  CHECK_FALSE(bool(connect_to("127.0.0.2", port_of(only), 1, why)));
}

TEST_CASE("rendezvous: another program on the port is told apart", "[launch]") {
  Meeting m;
  const Fd other = listen_on("127.0.0.1", m.port);
  std::thread answer([&] {
    Fd s;
    eventually(5, [&] {
      s = Fd(::accept(other.get(), nullptr, nullptr));
      return bool(s);
    });
    std::string out = "SSH-2.0-OpenSSH_9.2p1\r\n";
    send_some(s, out);
    sleep_ms(200);
  });
  const Thrown t = thrown_by([&] { Rendezvous r(m.options(1, 2)); });
  answer.join();
  CHECK(t.code == Exit::usage);
  CHECK(t.has("is no hgrn"));
}

TEST_CASE("rendezvous: the error of one rank ends the others with its code", "[launch]") {
  const Meeting m;
  const auto thrown = at_once(3, [&](int rank) {
    Rendezvous r(m.options(rank, 3));
    if (rank == 1) {
      r.failed(Error(Exit::data, "x.bin: damaged"));
      fail(Exit::data, "x.bin: damaged");
    }
    r.throw_if_lost();
    if (rank == 2) r.get("never");
  });
  for (const Thrown& t : thrown) {
    INFO(t.text);
    CHECK(t.code == Exit::data);
    CHECK(t.has("x.bin: damaged"));
  }
  CHECK(thrown[0].has("rank 1 of 3"));
}

TEST_CASE("rendezvous: a stop while waiting ends with 75", "[launch]") {
  const Meeting m;
  RendezvousOptions o = m.options(1, 2);
  const double began = monotonic_s();
  o.stopped = [&] { return monotonic_s() - began > 0.2; };
  CHECK(thrown_by([&] { Rendezvous r(o); }).code == Exit::stopped);
  CHECK(monotonic_s() - began < 3);
}

TEST_CASE("rendezvous: the list of missing ranks", "[launch]") {
  CHECK(ranks_not_in({}, 3) == "0-2");
  CHECK(ranks_not_in({0, 1, 2}, 3).empty());
  CHECK(ranks_not_in({1}, 3) == "0, 2");
  CHECK(ranks_not_in({0, 3}, 8) == "1, 2, 4-7");
}

TEST_CASE("rendezvous: secrets compare whole", "[launch]") {
  CHECK(wire::equal_secrets("", ""));
  CHECK(wire::equal_secrets("abc", "abc"));
  for (const char* other : {"", "a", "abd", "abcabc", "ab", "xbc"}) {
    CHECK_FALSE(wire::equal_secrets("abc", other));
    CHECK_FALSE(wire::equal_secrets(other, "abc"));
  }
}
