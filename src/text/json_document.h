// One line of a JSON-lines file of documents.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace hgrn {

// The text under `key` of the object that `line` is. Exit::data naming file, line and the mend
// where it is no object, is damaged or not UTF-8, or lacks the key, has it twice or not as a text.
std::string json_document(std::string_view line, const std::string& key, const std::string& file,
                          int64_t line_number);

}  // namespace hgrn
