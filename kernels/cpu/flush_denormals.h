// Denormal numbers count as zero on this thread while the object lives. Products of vanishing gates
// pass through them on their way to 0, and they slow the arithmetic of most processors down.
#pragma once
#ifdef __SSE__
#include <immintrin.h>
#endif

namespace hgrn::cpu {

class FlushDenormals {
 public:
#ifdef __SSE__
  FlushDenormals() : before_(_mm_getcsr()) {
    _mm_setcsr(before_ | 0x8040u);
  }  // FTZ and DAZ
  ~FlushDenormals() {
    _mm_setcsr(before_);
  }
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

#ifdef __SSE__
 private:
  unsigned before_;
#endif
};

}  // namespace hgrn::cpu
