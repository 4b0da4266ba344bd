// split_gemm.h on tiles in software, for x86-64-v4: what AMX does, on processors without it.
#pragma once
#include "cpu/narrow_gemm.h"

namespace hgrn::cpu::isa_emulated {
NarrowGemm narrow_gemm();
// The three bf16 of x as floats.
void split(float x, float* parts);
}  // namespace hgrn::cpu::isa_emulated
