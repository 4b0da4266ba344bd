// The token-shard format, for its reader and its writer. Little-endian:
//   header  256 x int32   [0] magic  [1] version  [2],[3] token count, one 64-bit number  rest 0
//   tokens  count x uint16 (narrow) or count x uint32 (wide, vocabularies above 65,536)
// It is llm.c's format; that program leaves word 3 zero, so its files read the same.
#pragma once
#include <cstdint>

namespace hgrn::shard_format {

constexpr int kHeaderWords = 256;
constexpr int64_t kHeaderBytes = 4 * kHeaderWords;
constexpr int32_t kNarrowMagic = 20240520, kNarrowVersion = 1;
constexpr int32_t kWideMagic = 20240801, kWideVersion = 7;
constexpr int64_t kNarrowVocab = 65536;  // the largest vocabulary that uint16 tokens hold

constexpr int64_t token_bytes(bool wide) {
  return wide ? 4 : 2;
}

}  // namespace hgrn::shard_format
