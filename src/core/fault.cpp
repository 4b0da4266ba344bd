#include "core/fault.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <string_view>

namespace hgrn {
namespace {

// Calls f with each entry of the list until it returns true.
template <class F>
bool any_entry(F&& f) {
  const char* env = std::getenv("HGRN_FAULT");
  if (!env || !*env) return false;
  std::string_view list(env);
  while (!list.empty()) {
    const size_t comma = std::min(list.find(','), list.size());
    if (f(list.substr(0, comma))) return true;
    list.remove_prefix(std::min(comma + 1, list.size()));
  }
  return false;
}

long passages(const char* name) {
  static std::mutex mutex;
  static std::map<std::string, long> counts;
  const std::lock_guard<std::mutex> lock(mutex);
  return ++counts[name];
}

}  // namespace

void fault_point(const char* name) {
  const bool hit = any_entry([&](std::string_view entry) {
    const size_t colon = entry.find(':');
    if (entry.substr(0, colon) != name) return false;
    const long wanted =
        colon == std::string_view::npos
            ? 1
            : std::strtol(std::string(entry.substr(colon + 1)).c_str(), nullptr, 10);
    return passages(name) >= wanted;
  });
  if (!hit) return;
  ::kill(::getpid(), SIGKILL);
  ::_exit(137);  // not reached: SIGKILL cannot be blocked
}

bool fault_switch(const char* name) {
  return any_entry([&](std::string_view entry) {
    return entry.size() > 1 && entry[0] == '+' && entry.substr(1) == name;
  });
}

}  // namespace hgrn
