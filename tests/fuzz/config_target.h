// What the config fuzzer feeds; the test that replays its corpus shares it. The input is a config
// file, and behind each NUL byte one KEY=VALUE override. It may be refused with Exit::usage;
// anything else that is thrown, and any broken invariant, is a finding.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/check.h"
#include "model/config.h"

namespace hgrn::fuzz {

inline void config(const uint8_t* data, size_t size) {
  const auto require = [](bool ok) {
    if (!ok) std::abort();
  };
  std::vector<std::string> parts(1);
  for (size_t i = 0; i < size; ++i) {
    if (data[i] == 0)
      parts.emplace_back();
    else
      parts.back().push_back(char(data[i]));
  }
  const std::string text = parts.front();
  parts.erase(parts.begin());
  try {
    const Config c = parse_config(text, "fuzz", parts);
    const std::string resolved = config_to_json(c);
    require(config_to_json(parse_config(resolved, "resolved")) == resolved);
    require(forbidden_changes(resolved, resolved).empty());
    for (int64_t ranks : {1, 2, 3072}) check_batch(c.train, ranks);
  } catch (const Error& e) {
    require(e.code() == Exit::usage);
  }
}

}  // namespace hgrn::fuzz
