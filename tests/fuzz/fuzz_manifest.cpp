#include "targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  hgrn::fuzz::manifest(data, size);
  return 0;
}
