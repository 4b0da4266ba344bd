#include "core/json_text.h"

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "core/check.h"

namespace hgrn {
namespace {
constexpr int kMaxDepth = 64;
}

nlohmann::ordered_json parse_json(std::string_view text, const std::string& where, bool comments) {
  using Json = nlohmann::ordered_json;
  std::vector<std::set<std::string>> keys;  // of the objects that are open now
  const auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
    // `depth` counts the arrays and objects around the event.
    check(depth < kMaxDepth || (event != Json::parse_event_t::object_start &&
                                event != Json::parse_event_t::array_start),
          Exit::data, "{}: JSON nested deeper than {} levels", where, int(kMaxDepth));
    if (event == Json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == Json::parse_event_t::key) {
      const std::string key = value.get<std::string>();
      check(keys.back().insert(key).second, Exit::data, "{}: key \"{}\" appears twice; remove one",
            where, key);
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch, /*allow_exceptions=*/true, comments);
  } catch (const Json::parse_error& e) {
    fail(Exit::data, "{}: not valid JSON at byte {}; correct it, or make or copy the file again",
         where, e.byte);
  } catch (const Json::exception& e) {  // a number out of range
    fail(Exit::data, "{}: not valid JSON: {}", where, e.what());
  }
}

}  // namespace hgrn
