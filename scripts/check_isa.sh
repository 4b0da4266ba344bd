#!/bin/sh
# Object files built for newer processors must not offer the linker inline code that the rest of the
# program could be given: every weak symbol lies in their own namespace (kernels/cpu/isa.h). A pointer
# to the unwinder is no code.
#   scripts/check_isa.sh NAMESPACE OBJECT...
set -eu
name=$1
shift
[ $# -gt 0 ] || { echo "check_isa: no object files were given" >&2; exit 2; }
for object; do [ -f "$object" ] || { echo "check_isa: $object is not there; build first" >&2; exit 2; }; done
others=$(nm -C --defined-only "$@" | grep -E ' [WVu] ' | grep -v -e "hgrn::cpu::$name::" -e ' V DW\.ref\.' || true)
if [ -n "$others" ]; then
  echo "check_isa: outside hgrn::cpu::$name; put it in inline namespace HGRN_ISA or call it elsewhere:" >&2
  echo "$others" >&2
  exit 1
fi
