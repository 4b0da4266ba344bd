// hgrn report and hgrn compare: runs as a page and as text.
#include <cstdlib>

#include <unistd.h>

#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "core/file.h"
#include "core/terminal.h"
#include "report/compare.h"
#include "report/html.h"

namespace hgrn {
namespace {

struct ReportArgs {
  std::vector<std::string> runs, evals;
  std::string out;
};

void add_runs(CLI::App* app, ReportArgs& a) {
  app->add_option("runs", a.runs, "run folders, or their metrics.jsonl")->required();
  app->add_option("--eval", a.evals,
                  "result of hgrn eval --json that does not lie in its run folder; repeatable")
      ->allow_extra_args(false)
      ->take_all();
}

std::string default_out(const ReportArgs& a) {
  return a.runs.size() == 1 && is_folder(a.runs[0]) ? a.runs[0] + "/report.html" : "report.html";
}

}  // namespace

Command report_command(CLI::App& root) {
  auto a = std::make_shared<ReportArgs>();
  CLI::App* app =
      root.add_subcommand("report", "Curves, tables and samples of runs as one HTML file");
  app->footer("Example:\n  hgrn report runs/first runs/second --out report.html");
  add_runs(app, *a);
  app->add_option("--out", a->out, "HTML file (default: report.html, of one run in its folder)");
  return {app, [a] {
            const std::string out = a->out.empty() ? default_out(*a) : a->out;
            const std::string page = report_html(read_runs(a->runs, a->evals));
            write_file_atomic(out, page);
            print(fmt::format("{} ({} bytes)\n", out, page.size()));
            return Exit::ok;
          }};
}

Command compare_command(CLI::App& root) {
  auto a = std::make_shared<ReportArgs>();
  CLI::App* app = root.add_subcommand("compare", "The same side by side on the terminal");
  app->footer("Example:\n  hgrn compare runs/first runs/second");
  add_runs(app, *a);
  return {app, [a] {
            const bool terminal = ::isatty(STDOUT_FILENO) == 1;
            TextStyle style;
            // A file or a pipe has no width.
            style.columns = terminal ? terminal_size(STDOUT_FILENO).columns : 1 << 20;
            const char* no_colour = std::getenv("NO_COLOR");
            style.colour = terminal && !(no_colour && *no_colour);
            style.utf8 = terminal_utf8();
            print(compare_text(read_runs(a->runs, a->evals), style));
            return Exit::ok;
          }};
}

}  // namespace hgrn
