// Fault injection for tests of crash safety. HGRN_FAULT holds a comma-separated list:
//   NAME      kills the process (SIGKILL: nothing is flushed or cleaned) as it passes point NAME
//   NAME:3    at the third passage
//   +SWITCH   turns on a degraded path, e.g. +no-exchange for a file system without it
// Unset, a point costs one getenv(). docs/reliability.md lists the names.
#pragma once

namespace hgrn {

void fault_point(const char* name);
bool fault_switch(const char* name);

}  // namespace hgrn
