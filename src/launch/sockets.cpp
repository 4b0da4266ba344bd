#include "launch/sockets.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>

#include "core/check.h"

namespace hgrn {
namespace {

using Addresses = std::unique_ptr<addrinfo, void (*)(addrinfo*)>;

Addresses resolve_name(const std::string& address, int port, bool passive, std::string& why) {
  addrinfo hints = {}, *list = nullptr;
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = passive ? AI_PASSIVE : 0;
  const int e = getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &list);
  if (e != 0) why = fmt::format("{}: {}", address, gai_strerror(e));
  return {e == 0 ? list : nullptr, [](addrinfo* p) {
            if (p) freeaddrinfo(p);
          }};
}

Fd open_socket(const addrinfo& a) {
  return Fd(::socket(a.ai_family, a.ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, a.ai_protocol));
}

// The result of a non-blocking connect, as an errno.
int finish_connect(const Fd& s, double timeout_s) {
  pollfd p = {s.get(), POLLOUT, 0};
  const int n = ::poll(&p, 1, int(timeout_s * 1e3));
  if (n == 0) return ETIMEDOUT;
  if (n < 0) return errno;
  int error = 0;
  socklen_t size = sizeof error;
  if (::getsockopt(s.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) return errno;
  return error;
}

bool connected_to_itself(const Fd& s) {  // a free local port may answer its own call
  sockaddr_storage a = {}, b = {};
  socklen_t na = sizeof a, nb = sizeof b;
  return ::getsockname(s.get(), reinterpret_cast<sockaddr*>(&a), &na) == 0 &&
         ::getpeername(s.get(), reinterpret_cast<sockaddr*>(&b), &nb) == 0 && na == nb &&
         std::memcmp(&a, &b, na) == 0;
}

}  // namespace

Fd listen_on(const std::string& address, int port) {
  std::string why;
  const Addresses list = resolve_name(address, port, /*passive=*/true, why);
  for (const addrinfo* a = list.get(); a; a = a->ai_next) {
    Fd s = open_socket(*a);
    if (!s) continue;
    const int on = 1;
    ::setsockopt(s.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (::bind(s.get(), a->ai_addr, a->ai_addrlen) == 0 && ::listen(s.get(), 1024) == 0) return s;
    const char* mend = errno == EADDRINUSE ? "the port is in use: choose another MASTER_PORT"
                       : errno == EADDRNOTAVAIL
                           ? "MASTER_ADDR must be an address of the machine of rank 0"
                           : "choose another MASTER_ADDR or MASTER_PORT";
    why = fmt::format("{}; {}", std::strerror(errno), mend);
  }
  fail(Exit::failed, "rank 0 cannot listen on {}:{}: {}", address, port, why);
}

int port_of(const Fd& socket) {
  sockaddr_storage a = {};
  socklen_t n = sizeof a;
  check(::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&a), &n) == 0, "getsockname: {}",
        std::strerror(errno));
  return ntohs(a.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(a).sin6_port
                                       : reinterpret_cast<sockaddr_in&>(a).sin_port);
}

Fd connect_to(const std::string& address, int port, double timeout_s, std::string& why) {
  const Addresses list = resolve_name(address, port, /*passive=*/false, why);
  for (const addrinfo* a = list.get(); a; a = a->ai_next) {
    Fd s = open_socket(*a);
    if (!s) continue;
    int error = ::connect(s.get(), a->ai_addr, a->ai_addrlen) == 0 ? 0 : errno;
    if (error == EINPROGRESS) error = finish_connect(s, timeout_s);
    if (error == 0 && !connected_to_itself(s)) {
      const int on = 1;
      ::setsockopt(s.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      ::setsockopt(s.get(), SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
      return s;
    }
    why = error ? std::strerror(error) : "nobody listens";
  }
  return {};
}

std::string local_address(const Fd& socket) {
  sockaddr_storage a = {};
  socklen_t n = sizeof a;
  char text[NI_MAXHOST] = "";
  check(::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&a), &n) == 0 &&
            ::getnameinfo(reinterpret_cast<sockaddr*>(&a), n, text, sizeof text, nullptr, 0,
                          NI_NUMERICHOST) == 0,
        "cannot tell the local address of a connection");
  return text;
}

bool receive_some(const Fd& socket, std::string& in) {
  char chunk[16384];
  const ssize_t n = ::recv(socket.get(), chunk, sizeof chunk, MSG_DONTWAIT);
  if (n > 0) in.append(chunk, size_t(n));
  return n > 0 || (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR));
}

bool send_some(const Fd& socket, std::string& out) {
  while (!out.empty()) {
    const ssize_t n = ::send(socket.get(), out.data(), out.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
    out.erase(0, size_t(n));
  }
  return true;
}

std::string host_name() {
  char name[256] = "";
  ::gethostname(name, sizeof name - 1);
  return name;
}

double monotonic_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace hgrn
