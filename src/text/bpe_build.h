// A tokenizer's definition, checked and brought into the form that encoding needs.
#pragma once
#include <string>
#include <vector>

#include "text/bpe.h"
#include "text/tokenizer_file.h"

namespace hgrn {

struct BuiltBpe {
  Bpe bpe;
  std::vector<std::string> bytes;  // of every id, added tokens included
  int32_t byte_ids[256];           // -1: the byte has no token; only for bytes that UTF-8 never has
  int32_t eos;
  std::string eos_content;
};

BuiltBpe build_bpe(const TokenizerDefinition& definition);

}  // namespace hgrn
