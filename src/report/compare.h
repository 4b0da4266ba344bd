// Runs side by side as text.
#pragma once
#include <string>
#include <vector>

#include "report/run_data.h"

namespace hgrn {

struct TextStyle {
  int columns = 80;     // runs that do not fit beside each other come in blocks
  bool colour = false;  // the best number of a row in bold
  bool utf8 = true;
};

std::string compare_text(const std::vector<RunData>& runs, const TextStyle& style);

}  // namespace hgrn
