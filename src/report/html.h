// The report as one HTML file: tables and samples as they are, curves as data that the page's own
// script draws as SVG. Nothing is loaded from anywhere.
#pragma once
#include <string>
#include <vector>

#include "report/run_data.h"

namespace hgrn {

std::string report_html(const std::vector<RunData>& runs);

extern const char* const kPageStyle;   // page_style.cpp
extern const char* const kPageScript;  // page_script.cpp

}  // namespace hgrn
