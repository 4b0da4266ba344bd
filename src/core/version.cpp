#include "core/version.h"

namespace hgrn {
const char* version() {
  return sizeof(HGRN_COMMIT) > 1 ? HGRN_VERSION " (" HGRN_COMMIT ")" : HGRN_VERSION;
}
}  // namespace hgrn
