// JSON files of unknown origin: the strict reading that every reader of small JSON files shares.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace hgrn {

// Keys keep their order. A syntax error, a duplicate key, or nesting beyond 64 levels is Exit::data
// with `where` (the file) and the byte offset.
nlohmann::ordered_json parse_json(std::string_view text, const std::string& where,
                                  bool comments = false);

}  // namespace hgrn
