// A file that is compiled more than once, for processors of different ages, keeps what it defines
// in an inline namespace of the instruction set: otherwise the linker would keep one of several
// equal names for all, and an older processor might be given a newer one's code.
#pragma once
#ifndef HGRN_ISA
#define HGRN_ISA isa_default  // what HGRN_MARCH says
#endif
namespace hgrn::cpu {
inline namespace HGRN_ISA {}
}  // namespace hgrn::cpu
