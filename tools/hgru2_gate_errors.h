// How far the queries' and values' gates of the CUDA kernels are from their functions:
// hgru2_check's word `gates`.
#pragma once

namespace hgrn::hgru2_cases {

// Every bf16 up to 80 in size through query_gate() (hgru2_gates.cuh), against double; prints the
// largest errors. Returns how many of the bars are missed: a sigmoid and its derivative are right
// to 2^-12, which is what PTX promises of tanh.approx, a silu and its derivative to 2^-12
// (1 + |x|).
int gate_errors();

}  // namespace hgrn::hgru2_cases
