// Unicode Normalization Form C, with utf8proc, as Hugging Face tokenizers has it: characters that
// its older Unicode does not know (unicode_supplement.h) stay as they are and where they are.
#pragma once
#include <string>
#include <string_view>

namespace hgrn {

// `text` (well-formed UTF-8) in NFC. Where it is plain to see that it is in NFC already, it is
// returned as it is; else it is written to `buffer`, which the result then refers to.
std::string_view to_nfc(std::string_view text, std::string& buffer);

}  // namespace hgrn
