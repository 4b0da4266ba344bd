// Byte-level BPE: what a definition read from files makes of a text.
//
//   bytes -> well-formed stretches -> added tokens -> NFC -> added tokens that are normalised
//         -> words (words.h) -> tokens (bpe.h)
//
// A byte that belongs to no well-formed UTF-8 character is the token of that byte; no word and no
// added token reaches across it. (A vocabulary may lack tokens for bytes that UTF-8 never has;
// GPT-NeoX's does. They become U+FFFD.) decode(encode(x)) == x for any bytes x, but for these and
// where the definition itself changes text: NFC, and the whitespace that lstrip and rstrip take.
#pragma once
#include <memory>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"
#include "text/tokenizer_file.h"

namespace hgrn {

// Exit::data where the definition contradicts itself: ids twice or with holes, merges of tokens
// that are not there, bytes without a token, no end-of-text.
std::unique_ptr<Tokenizer> make_bpe_tokenizer(TokenizerDefinition definition,
                                              std::vector<TokenizerFile> files,
                                              SpecialTokens special);

}  // namespace hgrn
