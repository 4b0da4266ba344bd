// Fault injection for tests of crash safety. HGRN_FAULT=NAME kills the process (SIGKILL, so
// nothing is flushed or cleaned) when it passes the point NAME; HGRN_FAULT=NAME:3 at the third
// passage. Unset, a point costs one getenv(). docs/reliability.md lists the points.
#pragma once

namespace hgrn {

void fault_point(const char* name);

}  // namespace hgrn
