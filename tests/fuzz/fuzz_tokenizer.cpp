#include "tokenizer_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  hgrn::fuzz::tokenizer(data, size);
  return 0;
}
