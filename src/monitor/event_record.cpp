#include "monitor/event_record.h"

#include <array>
#include <cstring>

namespace hgrn {
namespace {

std::array<uint32_t, 256> crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int k = 0; k < 8; ++k) c = c & 1 ? 0x82F63B78u ^ (c >> 1) : c >> 1;
    table[i] = c;
  }
  return table;
}

template <class T>
void put(std::string& out, T v) {  // little-endian, as every machine that this runs on
  char raw[sizeof v];
  std::memcpy(raw, &v, sizeof v);
  out.append(raw, sizeof v);
}

// Wire types.
constexpr int kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5;

// Field numbers of event.proto, summary.proto, tensor.proto.
namespace event {
constexpr int wall_time = 1, step = 2, file_version = 3, summary = 5, session_log = 7;
}
namespace session_log {
constexpr int status = 1, START = 1;
}
namespace summary {
constexpr int value = 1;
}
namespace value {
constexpr int tag = 1, simple_value = 2, tensor = 8, metadata = 9;
}
namespace metadata {
constexpr int plugin_data = 1, plugin_name = 1;
}
namespace tensor {
constexpr int dtype = 1, shape = 2, string_val = 8, DT_STRING = 7;
}
namespace shape {
constexpr int dim = 2, size = 1;
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  static const std::array<uint32_t, 256> table = crc_table();
  uint32_t c = ~0u;
  for (unsigned char b : bytes) c = table[(c ^ b) & 0xff] ^ (c >> 8);
  return ~c;
}

uint32_t masked_crc32c(std::string_view bytes) {
  const uint32_t c = crc32c(bytes);
  return ((c >> 15) | (c << 17)) + 0xa282ead8u;
}

std::string tf_record(std::string_view bytes) {
  std::string out;
  put(out, uint64_t(bytes.size()));
  put(out, masked_crc32c(out));
  out.append(bytes);
  put(out, masked_crc32c(bytes));
  return out;
}

void ProtoMessage::varint(uint64_t v) {
  while (v >= 0x80) {
    bytes_.push_back(char(v | 0x80));
    v >>= 7;
  }
  bytes_.push_back(char(v));
}

ProtoMessage& ProtoMessage::integer(int field, int64_t v) {
  varint(uint64_t(field) << 3 | kVarint);
  varint(uint64_t(v));
  return *this;
}

ProtoMessage& ProtoMessage::real32(int field, float v) {
  varint(uint64_t(field) << 3 | kFixed32);
  put(bytes_, v);
  return *this;
}

ProtoMessage& ProtoMessage::real64(int field, double v) {
  varint(uint64_t(field) << 3 | kFixed64);
  put(bytes_, v);
  return *this;
}

ProtoMessage& ProtoMessage::bytes(int field, std::string_view v) {
  varint(uint64_t(field) << 3 | kBytes);
  varint(v.size());
  bytes_.append(v);
  return *this;
}

SummaryBuilder& SummaryBuilder::scalar(std::string_view tag, double v) {
  ProtoMessage one;
  one.bytes(value::tag, tag).real32(value::simple_value, float(v));
  summary_.bytes(summary::value, one.str());
  return *this;
}

SummaryBuilder& SummaryBuilder::text(std::string_view tag, std::string_view markdown) {
  const ProtoMessage dim = ProtoMessage().integer(shape::size, 1);
  ProtoMessage tensor_proto, plugin, meta, one;
  tensor_proto.integer(tensor::dtype, tensor::DT_STRING)
      .bytes(tensor::shape, ProtoMessage().bytes(shape::dim, dim.str()).str())
      .bytes(tensor::string_val, markdown);
  plugin.bytes(metadata::plugin_name, "text");
  meta.bytes(metadata::plugin_data, plugin.str());
  one.bytes(value::tag, tag)
      .bytes(value::tensor, tensor_proto.str())
      .bytes(value::metadata, meta.str());
  summary_.bytes(summary::value, one.str());
  return *this;
}

std::string version_event(double seconds) {
  return ProtoMessage()
      .real64(event::wall_time, seconds)
      .bytes(event::file_version, "brain.Event:2")
      .str();
}

std::string summary_event(double seconds, int64_t step, const SummaryBuilder& values) {
  return ProtoMessage()
      .real64(event::wall_time, seconds)
      .integer(event::step, step)
      .bytes(event::summary, values.str())
      .str();
}

std::string restart_event(double seconds, int64_t step) {
  return ProtoMessage()
      .real64(event::wall_time, seconds)
      .integer(event::step, step)
      .bytes(event::session_log,
             ProtoMessage().integer(session_log::status, session_log::START).str())
      .str();
}

}  // namespace hgrn
