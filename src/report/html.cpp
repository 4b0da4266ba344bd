#include "report/html.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>

#include "core/version.h"
#include "report/curves.h"
#include "report/tables.h"

namespace hgrn {
namespace {

constexpr size_t kPointsOfRun = 600, kPointsOfAll = 24000;  // a few MB of text at most
constexpr size_t kBadPoints = 200;                          // losses that are not finite, shown

std::string escaped(std::string_view text) {
  std::string out;
  for (char c : text) switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      default: out.push_back(c);
    }
  return out;
}

std::string plus_minus(std::string text) {
  if (const size_t at = text.find(" +- "); at != std::string::npos) text.replace(at, 4, " ± ");
  return text;
}

// A JSON text that may stand within a script element.
std::string in_quotes(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    const unsigned char u = static_cast<unsigned char>(c);
    if (u < 0x20 || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&')
      out += fmt::format("\\u{:04x}", u);
    else
      out.push_back(c);
  }
  return out + "\"";
}

std::string array(const std::vector<double>& values, int digits = 6) {
  std::string out = "[";
  for (const double v : values) {
    if (out.size() > 1) out += ",";
    out += std::isfinite(v) ? fmt::format("{:.{}g}", v, digits) : "null";
  }
  return out + "]";
}

std::string grouped_json(const std::vector<double>& values, const std::vector<size_t>& ends) {
  const Grouped g = grouped(values, ends);
  if (std::all_of(g.mean.begin(), g.mean.end(), [](double v) { return std::isnan(v); }))
    return "null";
  if (ends.size() == values.size()) return fmt::format("{{\"mean\":{}}}", array(g.mean));
  return fmt::format("{{\"mean\":{},\"least\":{},\"largest\":{}}}", array(g.mean), array(g.least),
                     array(g.largest));
}

std::string x_json(const std::vector<double>& step, const std::vector<double>& tokens,
                   const std::vector<double>& time) {
  return fmt::format("{{\"steps\":{},\"tokens\":{},\"time\":{}}}", array(step, 10), array(tokens),
                     array(time));
}

std::string run_json(const RunData& r, size_t points) {
  const StepColumns& s = r.steps;
  const std::vector<size_t> ends = group_ends(s.size(), points);
  std::vector<size_t> bad;
  for (size_t i = 0; i < s.size() && bad.size() < kBadPoints; ++i)
    if (!std::isfinite(s.loss[i])) bad.push_back(i);
  const std::vector<size_t> valid = group_ends(r.valid.size(), points);
  std::string out =
      fmt::format("{{\"name\":{},\"x\":{},\"bad\":{},\"charts\":{{", in_quotes(r.name),
                  x_json(at_ends(s.step, ends), at_ends(s.tokens, ends), at_ends(s.time_s, ends)),
                  x_json(at_ends(s.step, bad), at_ends(s.tokens, bad), at_ends(s.time_s, bad)));
  const std::pair<const char*, const std::vector<double>*> columns[] = {
      {"loss", &s.loss}, {"grad_norm", &s.grad_norm},       {"lr", &s.lr},
      {"mfu", &s.mfu},   {"tokens_per_s", &s.tokens_per_s},
  };
  for (const auto& [name, values] : columns)
    out += fmt::format("\"{}\":{},", name, grouped_json(*values, ends));
  out.back() = '}';
  out += fmt::format(
      ",\"valid\":{{\"x\":{},\"y\":{}}},\"layers\":{{\"step\":{},\"gate\":{},"
      "\"norm\":{}}}}}",
      x_json(at_ends(r.valid.step, valid), at_ends(r.valid.tokens, valid),
             at_ends(r.valid.time_s, valid)),
      grouped_json(r.valid.loss, valid), r.layers.step, array(r.layers.forget_gate),
      array(r.layers.grad_norm));
  return out;
}

// Runs' names in tables carry the colour of their curves.
std::string run_label(const std::vector<RunData>& runs, const std::string& text) {
  for (size_t i = 0; i < runs.size(); ++i)
    if (runs[i].name == text)
      return fmt::format("<i class=\"key\" data-run=\"{}\"></i>{}", i, escaped(text));
  return escaped(text);
}

std::string table_html(const Table& t, const std::vector<RunData>& runs) {
  if (t.rows.empty() && t.note.empty()) return {};
  std::string out = fmt::format("<section><h2>{}</h2>\n", escaped(t.title));
  if (!t.rows.empty()) {
    out += fmt::format("<div class=\"scroll\"><table class=\"{}\">\n<thead><tr>",
                       t.numbers ? "numbers" : "texts");
    for (const std::string& c : t.columns)
      out += fmt::format("<th scope=\"col\">{}</th>", run_label(runs, c));
    out += "</tr></thead>\n<tbody>\n";
    for (size_t r = 0; r < t.rows.size(); ++r) {
      out += fmt::format("<tr><th scope=\"row\">{}</th>", run_label(runs, t.rows[r][0]));
      for (size_t c = 1; c < t.rows[r].size(); ++c) {
        const bool best = r < t.best.size() && t.best[r] == int(c);
        out += fmt::format("<td{}>{}</td>", best ? " class=\"best\"" : "",
                           plus_minus(escaped(t.rows[r][c])));
      }
      out += "</tr>\n";
    }
    out += "</tbody></table></div>\n";
  }
  if (!t.note.empty()) {
    const std::string note = t.note.rfind("+- ", 0) == 0 ? "±" + t.note.substr(2) : t.note;
    out += fmt::format("<p class=\"note\">{}</p>\n", escaped(note));
  }
  return out + "</section>\n";
}

std::string samples_html(const std::vector<RunData>& runs) {
  std::string out;
  for (const RunData& r : runs) {
    if (r.samples.empty()) continue;
    out += fmt::format("<h3>{}</h3>\n", run_label(runs, r.name));
    for (size_t i = r.samples.size(); i > 0; --i) {  // the newest first, and open
      const SampleText& s = r.samples[i - 1];
      out += fmt::format("<details{}><summary>step {}</summary><pre><b>{}</b>{}</pre></details>\n",
                         i == r.samples.size() ? " open" : "", s.step, escaped(s.prompt),
                         escaped(s.text));
    }
  }
  return out.empty() ? out : "<section><h2>Samples</h2>\n" + out + "</section>\n";
}

std::string configs_html(const std::vector<RunData>& runs) {
  std::string out;
  for (const RunData& r : runs) {
    if (r.config.empty()) continue;
    out +=
        fmt::format("<details><summary>{}</summary><div class=\"scroll\"><table class=\"texts\">",
                    run_label(runs, r.name));
    for (const auto& [key, value] : r.config)
      out += fmt::format("<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n", escaped(key),
                         escaped(value));
    out += "</table></div></details>\n";
  }
  return out.empty() ? out : "<section><h2>Configs</h2>\n" + out + "</section>\n";
}

std::string notes_html(const std::vector<RunData>& runs) {
  std::string out;
  for (const RunData& r : runs)
    for (const std::string& note : r.notes)
      out += fmt::format("<li>{}: {}</li>\n", run_label(runs, r.name), escaped(note));
  return out.empty() ? out : "<section><h2>Notes</h2>\n<ul>\n" + out + "</ul></section>\n";
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  localtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M", &parts);
  return text;
}

constexpr const char* kControls = R"html(<div id="controls" hidden>
<div class="choice" role="group" aria-label="horizontal axis">
<button data-x="steps" aria-pressed="true">steps</button><button data-x="tokens">tokens</button><button data-x="time">time</button></div>
<label>smoothing <input id="smooth" type="range" min="0" max="0.99" step="0.01" value="0.6" autocomplete="off"></label>
<label><input id="full" type="checkbox" autocomplete="off"> full range</label>
<div id="legend"></div>
</div>
<div id="charts"><noscript><p>The curves need JavaScript; the tables below do not.</p></noscript></div>
)html";

}  // namespace

std::string report_html(const std::vector<RunData>& runs) {
  const size_t points =
      std::clamp<size_t>(kPointsOfAll / std::max<size_t>(1, runs.size()), 100, kPointsOfRun);
  std::string data;
  for (const RunData& r : runs) data += (data.empty() ? "" : ",\n") + run_json(r, points);
  const std::string title = runs.size() == 1 ? runs[0].name : fmt::format("{} runs", runs.size());
  std::string out = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<meta name=\"color-scheme\" content=\"light dark\">\n<title>{0} - hgrn report</title>\n"
      "<link rel=\"icon\" "
      "href=\"data:,\">\n<style>{1}</style>\n</head>\n<body>\n<header><h1>{0}</h1>"
      "<p class=\"note\">hgrn {2}, {3}</p></header>\n<main>\n",
      escaped(title), kPageStyle, escaped(version()), today());
  out += table_html(summary_table(runs), runs);
  out += "<section>\n<h2>Curves</h2>\n";
  out += kControls;
  out += "</section>\n";
  if (const Table t = evaluation_table(runs); !t.rows.empty()) out += table_html(t, runs);
  if (runs.size() > 1) out += table_html(config_differences(runs), runs);
  out += samples_html(runs) + configs_html(runs) + notes_html(runs);
  out += fmt::format(
      "</main>\n<script type=\"application/json\" id=\"data\">[{}]</script>\n<script>{}</script>\n"
      "</body>\n</html>\n",
      data, kPageScript);
  return out;
}

}  // namespace hgrn
