// Times of the CUDA HGRU2 kernels, printed: hgru2_check's words of the same names.
#pragma once

namespace hgrn::hgru2_times {

void time();     // the shapes of the models, and few long sequences
void compare();  // the kernels that HGRN_HGRU2_SM90 chooses between, in turn
void profile();  // one launch of each kernel, for a profiler

}  // namespace hgrn::hgru2_times
