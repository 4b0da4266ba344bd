// The bytes of TensorBoard's event files, as far as they are needed: TFRecord frames around
// protocol buffers. Sources: TensorFlow's record_writer.h and its event.proto, summary.proto and
// tensor.proto; the wire format of Protocol Buffers.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace hgrn {

uint32_t crc32c(std::string_view bytes);         // Castagnoli, as in RFC 3720
uint32_t masked_crc32c(std::string_view bytes);  // TFRecord's: a CRC of bytes that hold CRCs

// u64 length, u32 masked crc of the length, the bytes, u32 masked crc of the bytes
std::string tf_record(std::string_view bytes);

// One protocol buffer message, field after field.
class ProtoMessage {
 public:
  ProtoMessage& integer(int field, int64_t v);
  ProtoMessage& real32(int field, float v);
  ProtoMessage& real64(int field, double v);
  ProtoMessage& bytes(int field, std::string_view v);  // strings, bytes and messages
  const std::string& str() const { return bytes_; }

 private:
  void varint(uint64_t v);
  std::string bytes_;
};

// Values of one event: a Summary message.
class SummaryBuilder {
 public:
  SummaryBuilder& scalar(std::string_view tag, double v);
  SummaryBuilder& text(std::string_view tag, std::string_view markdown);
  bool empty() const { return summary_.str().empty(); }
  const std::string& str() const { return summary_.str(); }

 private:
  ProtoMessage summary_;
};

// Whole Event messages; `seconds` is Unix time.
std::string version_event(double seconds);  // must be the first of a file
std::string summary_event(double seconds, int64_t step, const SummaryBuilder& values);
// A run (re)started: readers drop what they have from `step` on.
std::string restart_event(double seconds, int64_t step);

}  // namespace hgrn
