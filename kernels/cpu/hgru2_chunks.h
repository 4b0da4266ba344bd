// One head of one row of HGRU2 in chunks, both directions: what hgru2_chunked.cpp hands to the
// build of hgru2_chunks.cpp for the processor it runs on. Plain pointers, so that a build for newer
// processors shares no inline code with the rest (isa.h).
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "ops/act.h"

namespace hgrn::cpu {

constexpr int64_t kHgru2Chunk = 16;               // tokens of a chunk
constexpr int64_t kHgru2Block = 4 * kHgru2Chunk;  // tokens between saved states

struct Hgru2Head {
  int64_t T, D, n;
  Act output_act, input_act;
  float query_scale;
  const float* x;        // (T,3D) from the head's first channel on
  const float* bound;    // (n)
  const uint8_t* reset;  // (T) or null
  float* saved;          // states (blocks, then saved_step floats on); null: not wanted
  int64_t saved_step;
  float *y, *hT;          // forward: (T,D), (n,n) or null
  const float* h0;        // forward: (n,n) or null
  const float *dy, *dhT;  // backward: (T,D), (n,n) or null
  float *dx, *dh0;        // backward: (T,3D), (n,n) or null
  double* dbound;         // backward: (n), added to
};

struct Hgru2Chunks {
  int64_t (*forward_floats)(int64_t n);  // workspace of a call, aligned to 64 bytes
  int64_t (*backward_floats)(int64_t n);
  void (*forward)(const Hgru2Head& head, float* work);
  void (*backward)(const Hgru2Head& head, float* work);
};

namespace isa_default {
Hgru2Chunks hgru2_chunks();  // for the processors that HGRN_MARCH names
}
namespace isa_v4 {
Hgru2Chunks hgru2_chunks();  // for x86-64-v4 (AVX-512); only where HGRN_CPU_V4 is set
}

}  // namespace hgrn::cpu
