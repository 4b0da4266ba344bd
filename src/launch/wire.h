// What ranks and rendezvous say to each other over TCP: frames of type, size and payload, both
// numbers 32 bits little-endian. Nothing that comes in is believed: sizes are bounded before
// memory is taken, and a frame that does not parse ends the connection.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "core/check.h"

namespace hgrn::wire {

constexpr uint32_t kProtocol = 1;  // raised with every change of the frames
constexpr std::string_view kMagic = "hgrn-rendezvous";
constexpr size_t kHeader = 8;
constexpr size_t kMaxHello = 4096;             // a stranger may send so much
constexpr size_t kMaxFrame = size_t(1) << 20;  // a rank may send so much

enum class Type : uint32_t {
  hello = 0x68677201,  // to the server: who I am
  welcome,             // from it: all ranks are here
  refuse,              // from it: code, text
  set,                 // key, value
  get,                 // key; answered by `value` once it is set
  value,               // key, value
  ping,                // both ways
  bye,                 // code, text: I end, with this code
  lost,                // from it: code, text: the run is over
};

struct Hello {
  uint32_t protocol = kProtocol;
  std::string token;
  uint32_t rank = 0, world = 0;
  std::string hash, version, host;
  uint32_t pid = 0;
};

class Writer {
 public:
  Writer& number(uint32_t n) {
    for (int i = 0; i < 4; ++i) bytes_.push_back(char(n >> (8 * i) & 255));
    return *this;
  }
  Writer& text(std::string_view s) {
    number(uint32_t(s.size()));
    bytes_.append(s);
    return *this;
  }
  std::string frame(Type type) const {
    Writer head;
    head.number(uint32_t(type)).number(uint32_t(bytes_.size()));
    return head.bytes_ + bytes_;
  }

 private:
  std::string bytes_;
};

// Reads what Writer wrote; after a lack of bytes ok() is false and everything is empty.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : left_(bytes) {}
  uint32_t number() {
    if (left_.size() < 4) return lack();
    uint32_t n = 0;
    for (int i = 0; i < 4; ++i)
      n |= uint32_t(static_cast<unsigned char>(left_[size_t(i)])) << 8 * i;
    left_.remove_prefix(4);
    return n;
  }
  std::string text() {
    const size_t size = number();
    if (!ok_ || left_.size() < size) return lack(), std::string();
    std::string s(left_.substr(0, size));
    left_.remove_prefix(size);
    return s;
  }
  bool ok() const { return ok_; }
  bool done() const { return ok_ && left_.empty(); }

 private:
  uint32_t lack() {
    ok_ = false;
    left_ = {};
    return 0;
  }
  std::string_view left_;
  bool ok_ = true;
};

inline std::string hello_frame(const Hello& h) {
  return Writer()
      .text(kMagic)
      .number(h.protocol)
      .text(h.token)
      .number(h.rank)
      .number(h.world)
      .text(h.hash)
      .text(h.version)
      .text(h.host)
      .number(h.pid)
      .frame(Type::hello);
}

// False for anything that is not a hello. Of another protocol only `protocol` is filled in.
inline bool parse_hello(std::string_view payload, Hello& h) {
  Reader r(payload);
  if (r.text() != kMagic) return false;
  h.protocol = r.number();
  if (!r.ok()) return false;
  if (h.protocol != kProtocol) return true;
  h.token = r.text();
  h.rank = r.number();
  h.world = r.number();
  h.hash = r.text();
  h.version = r.text();
  h.host = r.text();
  h.pid = r.number();
  return r.done();
}

// Takes whole frames from the front of what came in.
struct Frame {
  Type type;
  std::string payload;
};
enum class Take { none, frame, bad };
inline Take take_frame(std::string& in, size_t max_payload, Frame& out) {
  if (in.size() < kHeader) return Take::none;
  Reader head(std::string_view(in).substr(0, kHeader));
  const auto type = Type(head.number());
  const size_t size = head.number();
  if (type < Type::hello || type > Type::lost || size > max_payload) return Take::bad;
  if (in.size() < kHeader + size) return Take::none;
  out = {type, in.substr(kHeader, size)};
  in.erase(0, kHeader + size);
  return Take::frame;
}

// The time it takes does not tell how much of the secret was right.
inline bool equal_secrets(std::string_view a, std::string_view b) {
  unsigned differ = a.size() != b.size();
  for (size_t i = 0; i < a.size(); ++i)
    differ |= unsigned(static_cast<unsigned char>(a[i]) ^
                       static_cast<unsigned char>(b.empty() ? '\0' : b[i % b.size()]));
  return differ == 0;
}

}  // namespace hgrn::wire
