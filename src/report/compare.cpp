#include "report/compare.h"

#include <algorithm>

#include "core/terminal.h"
#include "monitor/live_view.h"
#include "report/tables.h"

namespace hgrn {
namespace {

constexpr int kWidestCell = 52;
constexpr int kCurveColumns = 16;

std::string padded(const std::string& text, int width, bool right) {
  const std::string space(size_t(std::max(0, width - display_width(text))), ' ');
  return right ? space + text : text + space;
}

std::string cell(const std::string& text, const TextStyle& style) {
  if (display_width(text) <= kWidestCell) return text;
  return style.utf8 ? cut_to(text, kWidestCell - 1) + "…" : cut_to(text, kWidestCell - 2) + "..";
}

// Columns behind the first, as many at a time as fit.
std::string table_text(const Table& t, const TextStyle& style) {
  std::string out = t.title + "\n";
  if (!t.rows.empty()) {
    std::vector<int> widths;
    for (size_t c = 0; c < t.columns.size(); ++c) {
      int width = display_width(cell(t.columns[c], style));
      for (const auto& row : t.rows) width = std::max(width, display_width(cell(row[c], style)));
      widths.push_back(width);
    }
    for (size_t first = 1; first < t.columns.size();) {
      size_t last = first;
      for (int used = 2 + widths[0]; last < t.columns.size(); ++last) {
        used += 2 + widths[last];
        if (used > style.columns && last > first) break;
      }
      const auto line = [&](const std::vector<std::string>& texts, int best) {
        std::string one = "  " + padded(cell(texts[0], style), widths[0], false);
        for (size_t c = first; c < last; ++c) {
          std::string text = padded(cell(texts[c], style), widths[c], t.numbers);
          if (style.colour && int(c) == best) text = "\x1b[1m" + text + "\x1b[0m";
          one += "  " + text;
        }
        while (one.back() == ' ') one.pop_back();
        out += one + "\n";
      };
      line(t.columns, -1);
      for (size_t r = 0; r < t.rows.size(); ++r)
        line(t.rows[r], r < t.best.size() ? t.best[r] : -1);
      if (last < t.columns.size()) out += "\n";
      first = last;
    }
  }
  if (!t.note.empty()) out += "  " + t.note + "\n";
  return out + "\n";
}

// A row a run becomes a column a run: runs stand side by side in every table.
Table turned(const Table& t, const std::vector<RunData>& runs, const TextStyle& style) {
  Table out{.title = t.title, .note = t.note, .columns = {t.columns[0]}, .rows = {}};
  for (const auto& row : t.rows) out.columns.push_back(row[0]);
  for (size_t c = 1; c < t.columns.size(); ++c) {
    std::vector<std::string> row = {t.columns[c]};
    for (const auto& from : t.rows) row.push_back(from[c]);
    out.rows.push_back(row);
  }
  std::vector<std::string> curves = {"loss, later half"};
  for (const RunData& r : runs) {
    Curve curve;
    for (double loss : r.steps.loss) curve.add(loss);
    curves.push_back(sparkline(curve.levels(kCurveColumns), style.utf8));
  }
  out.rows.push_back(curves);
  return out;
}

}  // namespace

std::string compare_text(const std::vector<RunData>& runs, const TextStyle& style) {
  std::string out = table_text(turned(summary_table(runs), runs, style), style);
  if (const Table t = loss_table(runs, 8); !t.rows.empty()) out += table_text(t, style);
  if (const Table t = evaluation_table(runs); !t.rows.empty()) out += table_text(t, style);
  if (const Table t = config_differences(runs); !t.rows.empty() || !t.note.empty())
    out += table_text(t, style);
  for (const RunData& r : runs)
    for (const std::string& note : r.notes) out += r.name + ": " + note + "\n";
  while (out.ends_with("\n\n")) out.pop_back();
  return out;
}

}  // namespace hgrn
