// The tables that `hgrn report` and `hgrn compare` share.
#pragma once
#include <string>
#include <vector>

#include "report/run_data.h"

namespace hgrn {

struct Table {
  std::string title, note;           // note: a sentence, may be empty
  std::vector<std::string> columns;  // headings
  std::vector<std::vector<std::string>> rows;
  bool numbers = true;         // columns from the second on are numbers
  std::vector<int> best = {};  // of each row, the column whose number is best; -1: none
};

Table summary_table(const std::vector<RunData>& runs);         // a row a run
Table config_differences(const std::vector<RunData>& runs);    // a row a key, a column a run
Table evaluation_table(const std::vector<RunData>& runs);      // a row a metric, a column a run
Table loss_table(const std::vector<RunData>& runs, int rows);  // loss at equal steps

std::string short_real(double v, int digits = 4);  // "-" where it is not finite

}  // namespace hgrn
