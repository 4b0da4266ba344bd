#include "tokenizer_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  hgrn::fuzz::shard_json(data, size);
  return 0;
}
