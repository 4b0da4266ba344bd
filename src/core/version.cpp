#include "core/version.h"

namespace hgrn {
const char* version() {
  return HGRN_VERSION " (" HGRN_COMMIT ")";
}
}  // namespace hgrn
