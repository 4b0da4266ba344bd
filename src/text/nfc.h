// Unicode Normalization Form C, with utf8proc, as Hugging Face tokenizers has it: characters that
// its older Unicode does not know (unicode_supplement.h) stay as they are and where they are.
#pragma once
#include <string>
#include <string_view>

namespace hgrn {

// `text` (well-formed UTF-8) in NFC: the same view where it is so already, else one of `buffer`.
// Characters that are plainly in NFC, such as ASCII, cost next to nothing.
std::string_view to_nfc(std::string_view text, std::string& buffer);

}  // namespace hgrn
