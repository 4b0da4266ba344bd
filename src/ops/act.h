// Activations, in a header of their own: kernels that are built once more for newer processors
// (kernels/cpu/isa.h) include nothing that brings inline code with it.
#pragma once

namespace hgrn {

enum class Act { identity, silu, sigmoid };

}  // namespace hgrn
