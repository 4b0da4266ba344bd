// Whether there is code for Hopper: what needs sm_90a is compiled to nothing for older cards, and
// so are the waits of early launches (launch.cuh), also where a driver makes code for a Hopper of
// it.
#pragma once

#ifndef HGRN_SM90A
#define HGRN_SM90A 1  // CMake: 0 where HGRN_CUDA_ARCHS leaves 90a out
#endif

namespace hgrn {

constexpr bool hopper_code(int compute_major) {
  return HGRN_SM90A && compute_major == 9;
}

}  // namespace hgrn
