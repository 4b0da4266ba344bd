// Runs as tables and as a page: what is read from odd files, what is shown, and that it stands
// alone.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <sstream>

#include "catch.h"
#include "core/terminal.h"
#include "report/compare.h"
#include "report/curves.h"
#include "report/html.h"
#include "report/tables.h"
#include "temp_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::string step_line(int64_t step, double loss) {
  nlohmann::ordered_json j;
  j["step"] = step;
  j["tokens"] = step * 100;
  j["loss"] = std::isfinite(loss) ? nlohmann::ordered_json(loss) : nlohmann::ordered_json();
  j["grad_norm"] = 0.5;
  j["lr"] = 1e-3;
  j["step_ms"] = 500;
  j["tokens_per_s"] = 200;
  j["mfu"] = nullptr;
  j["skipped"] = std::isfinite(loss) ? 0 : 1;
  return j.dump() + "\n";
}

std::string eval_line(int64_t step, double loss) {
  return fmt::format("{{\"step\":{},\"valid_loss\":{},\"valid_ppl\":1,\"valid_tokens\":5}}\n", step,
                     loss);
}

struct Runs {
  TempFolder tmp;
  std::string add(const std::string& name, const std::string& metrics,
                  const std::string& config = "") {
    const std::string folder = tmp / name;
    std::filesystem::create_directories(folder);
    spill(folder + "/metrics.jsonl", metrics);
    if (!config.empty()) spill(folder + "/config.json", config);
    return folder;
  }
};

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

nlohmann::json data_of(const std::string& page) {
  const std::string open = "id=\"data\">";
  const size_t at = page.find(open) + open.size();
  return nlohmann::json::parse(page.substr(at, page.find("</script>", at) - at));
}

// Tags that are opened are closed, in order.
bool well_formed(const std::string& page) {
  static const std::set<std::string> kVoid = {"!DOCTYPE", "meta", "link", "input"};
  std::vector<std::string> open;
  for (size_t at = 0; (at = page.find('<', at)) != std::string::npos;) {
    const size_t end = page.find('>', at);
    if (end == std::string::npos) return false;
    const bool closing = page[at + 1] == '/';
    const size_t name_at = at + 1 + closing;
    const std::string name = page.substr(name_at, page.find_first_of(" >\n", name_at) - name_at);
    at = end;
    if (closing) {
      if (open.empty() || open.back() != name) return false;
      open.pop_back();
    } else if (!kVoid.count(name)) {
      open.push_back(name);
      if (name == "script" || name == "style") at = page.find("</" + name, at);
    }
  }
  return open.empty();
}

}  // namespace

TEST_CASE("report: steps that are told twice count once, the later telling", "[report]") {
  Runs r;
  std::string lines;
  for (int64_t s = 1; s <= 6; ++s) lines += step_line(s, 10.0 - double(s));
  lines += eval_line(4, 3.0) + eval_line(6, 2.5);  // an evaluation that came late keeps its steps
  lines += step_line(5, 1.0) + step_line(6, 0.5) + eval_line(6, 0.4);
  const RunData run = read_run(r.add("run", lines));
  CHECK(run.steps.step == std::vector<double>{1, 2, 3, 4, 5, 6});
  CHECK(run.steps.loss == std::vector<double>{9, 8, 7, 6, 1, 0.5});
  CHECK(run.steps.time_s == std::vector<double>{0.5, 1, 1.5, 2, 2.5, 3});
  CHECK(run.valid.step == std::vector<double>{4, 6});
  CHECK(run.valid.loss == std::vector<double>{3.0, 0.4});
  CHECK(run.valid.tokens == std::vector<double>{400, 600});
  CHECK(run.valid.time_s == std::vector<double>{2, 3});
  REQUIRE(run.notes.size() == 1);
  CHECK(holds(run.notes[0], "set back"));
}

TEST_CASE("report: damaged files and numbers that are none", "[report]") {
  Runs r;
  const std::string lines = step_line(1, 5) + "not json\n\n[1,2]\n{\"loss\":3}\n" +
                            step_line(2, NAN) + step_line(3, 4) + "{\"step\":4,\"lo";
  const std::string folder = r.add("run", lines, "{\"optim\": ");
  spill(folder + "/eval.json", "{\"protocol\":");
  spill(folder + "/samples.jsonl", "{\"step\":2,\"prompt\":\"a\",\"text\":\"b\"}\n{\"st");
  spill(folder + "/layers.jsonl", "{\"step\":2,\"forget_gate\":[0.5,null],\"grad_norm\":7}\n?");
  const RunData run = read_run(folder);
  CHECK(run.steps.step == std::vector<double>{1, 2, 3});
  CHECK(std::isnan(run.steps.loss[1]));
  CHECK(run.skipped == 0);  // of the last line
  REQUIRE(run.samples.size() == 1);
  CHECK(run.samples[0].text == "b");
  REQUIRE(run.layers.forget_gate.size() == 2);
  CHECK(std::isnan(run.layers.forget_gate[1]));
  CHECK(run.layers.grad_norm.empty());
  std::string notes;
  for (const std::string& n : run.notes) notes += n + "\n";
  INFO(notes);
  CHECK(holds(notes, "4 lines of metrics.jsonl hold no metrics"));
  CHECK(holds(notes, "the last one is cut short"));
  CHECK(holds(notes, "the loss of 1 logged step is not finite"));
  CHECK(holds(notes, "config.json is left out"));
  CHECK(holds(notes, "eval.json"));
  CHECK(well_formed(report_html({run})));
  CHECK_FALSE(compare_text({run}, {}).empty());
}

TEST_CASE("report: what cannot be a run is refused with a reason", "[report]") {
  Runs r;
  CHECK(thrown_by([&] { read_run(r.tmp / "none"); }).has("no such run folder"));
  std::filesystem::create_directories(r.tmp / "empty");
  CHECK(thrown_by([&] { read_run(r.tmp / "empty"); }).has("no metrics.jsonl"));
  const Thrown t = thrown_by([&] { read_run(r.add("nothing", "\n{}\n")); });
  CHECK(t.code == Exit::data);
  CHECK(t.has("train.log_every"));
}

TEST_CASE("report: one point, no validation", "[report]") {
  Runs r;
  const auto runs = read_runs({r.add("one", step_line(1, 5)), r.add("only", eval_line(3, 2))}, {});
  const std::string page = report_html(runs);
  CHECK(well_formed(page));
  const auto data = data_of(page);
  CHECK(data[0]["charts"]["loss"]["mean"] == nlohmann::json::array({5}));
  CHECK(data[0]["valid"]["y"].is_null());
  CHECK(data[1]["charts"]["loss"].is_null());
  CHECK(data[1]["valid"]["y"]["mean"] == nlohmann::json::array({2}));
  const std::string text = compare_text(runs, {});
  CHECK(holds(text, "5.0000"));
}

TEST_CASE("report: names tell runs apart", "[report]") {
  Runs r;
  const std::string one = step_line(1, 5);
  const auto runs = read_runs({r.add("a/run", one), r.add("b/run", one), r.add("b/other", one),
                               r.add("c", one) + "/metrics.jsonl", r.add("d", one) + "/"},
                              {});
  CHECK(runs[0].name == "a/run");
  CHECK(runs[1].name == "b/run");
  CHECK(runs[2].name == "other");
  CHECK(runs[3].name == "c");
  CHECK(runs[4].name == "d");
}

TEST_CASE("report: configs that differ, evaluations side by side", "[report]") {
  Runs r;
  const std::string a =
      r.add("a", step_line(1, 5),
            R"({"model": {"hidden_size": 64, "bias": true}, "optim": {"lr": 1e-3}})");
  const std::string b =
      r.add("b", step_line(1, 4), R"({"model": {"hidden_size": 64}, "optim": {"lr": 2e-3}})");
  const auto eval = [](const std::string& checkpoint, double ppl) {
    return fmt::format(R"({{"task":"perplexity","protocol":"blocks","seq_len":128,"tokens":10,
      "nll":25.0,"nll_stderr":0.01,"ppl":{},"ppl_stderr":0.5,"words":null,"word_ppl":null,
      "word_ppl_stderr":null,"bytes":null,"bits_per_byte":null,"bits_per_byte_stderr":null,
      "checkpoint":"{}","step":7,"seconds":1}})",
                       ppl, checkpoint);
  };
  spill(a + "/eval.json", eval("elsewhere", 12.25));
  spill(r.tmp / "later.json", eval(b + "/checkpoints/step-00000007", 11.5));
  std::filesystem::create_directories(b + "/eval");
  spill(b + "/eval/tasks.json",
        R"({"results":{"lambada":{"alias":"x","acc,none":0.25,"acc_stderr,none":0.01}}})");
  const auto runs = read_runs({a, b}, {r.tmp / "later.json"});
  const Table differ = config_differences(runs);
  REQUIRE(differ.rows.size() == 2);
  CHECK(differ.rows[0] == std::vector<std::string>{"model.bias", "true", "-"});
  CHECK(differ.rows[1] == std::vector<std::string>{"optim.lr", "0.001", "0.002"});
  const Table evals = evaluation_table(runs);
  REQUIRE(evals.rows.size() == 5);
  CHECK(evals.rows[1][0] == "ppl: perplexity, blocks of 128 (eval.json)");
  CHECK(evals.rows[1][1] == "12.2500 +- 0.5000");
  CHECK(holds(evals.rows[2][0], "lambada"));
  CHECK(evals.rows[2][2] == "0.2500 +- 0.0100");
  CHECK(evals.rows[4][2] == "11.5000 +- 0.5000");
  spill(r.tmp / "lost.json", eval("/nowhere", 1));
  CHECK(thrown_by([&] { read_runs({a, b}, {r.tmp / "lost.json"}); }).code == Exit::usage);
  CHECK(thrown_by([&] { read_runs({a}, {a + "/config.json"}); }).code == Exit::data);
}

TEST_CASE("report: text fits the terminal, runs come in blocks", "[report]") {
  Runs r;
  std::vector<std::string> folders;
  for (int i = 0; i < 12; ++i) {
    std::string lines;
    for (int64_t s = 1; s <= 40; ++s) lines += step_line(s, 3.0 + 0.1 * i - 0.02 * double(s));
    folders.push_back(r.add(fmt::format("run_number_{}", i), lines + eval_line(40, 2.0 + 0.1 * i)));
  }
  const auto runs = read_runs(folders, {});
  for (const int columns : {60, 80, 132}) {
    const std::string text = compare_text(runs, {columns, true, true});
    std::istringstream in(text);
    for (std::string line; std::getline(in, line);)
      if (line.find("loss: mean") == std::string::npos) {
        INFO(line);
        CHECK(display_width(line) <= columns);
      }
    for (int i = 0; i < 12; ++i) CHECK(holds(text, fmt::format("run_number_{}", i)));
    CHECK(holds(text, "\x1b[1m"));  // the best of a row
  }
  CHECK_FALSE(holds(compare_text(runs, {80, false, false}), "\x1b"));
  for (char c : compare_text(runs, {80, false, false})) CHECK(static_cast<unsigned char>(c) < 0x80);
}

TEST_CASE("report: long columns keep their extremes in few points", "[report]") {
  std::vector<double> values(1000003, 1.0);
  values[77777] = 50;
  values[500001] = -3;
  values[999999] = NAN;
  const auto ends = group_ends(values.size(), 600);
  REQUIRE(ends.size() == 600);
  CHECK(ends.back() == values.size() - 1);
  const Grouped g = grouped(values, ends);
  CHECK(*std::max_element(g.largest.begin(), g.largest.end()) == 50);
  CHECK(*std::min_element(g.least.begin(), g.least.end()) == -3);
  CHECK(std::none_of(g.mean.begin(), g.mean.end(), [](double v) { return std::isnan(v); }));
  CHECK(group_ends(3, 600) == std::vector<size_t>{0, 1, 2});
  CHECK(group_ends(0, 600).empty());
}

TEST_CASE("report: ten runs of a million lines make a page of a few MB", "[report]") {
  RunData run;
  run.name = "long";
  StepColumns& s = run.steps;
  for (int64_t i = 1; i <= 1000000; ++i) {
    s.step.push_back(double(i));
    s.tokens.push_back(double(i) * 524288);
    s.time_s.push_back(double(i) * 0.351);
    const double wave = std::sin(double(i) * 0.37);
    s.loss.push_back(i % 1000 == 0 ? NAN : 2.5 + 0.1 * wave);
    s.grad_norm.push_back(0.4 + 0.1 * wave);
    s.lr.push_back(3e-4 / double(i));
    s.tokens_per_s.push_back(1.5e6 + 1e4 * wave);
    s.mfu.push_back(0.4 + 0.001 * wave);
  }
  CHECK(report_html({run}).size() < 300000);
  CHECK(report_html(std::vector<RunData>(10, run)).size() < 3000000);
}

TEST_CASE("report: the page stands alone and trusts nothing it shows", "[report]") {
  Runs r;
  const std::string bad = "</script><img src=x onerror=alert(1)>&\"'";
  const std::string folder = r.add("x<b>&y", step_line(1, 5) + step_line(2, 4));
  nlohmann::json config, sample, eval;
  config["optim"][bad] = bad;
  spill(folder + "/config.json", config.dump());
  sample = {{"step", 2}, {"prompt", bad}, {"text", bad + "\n\xf0\x9f\x98\x80"}};
  spill(folder + "/samples.jsonl", sample.dump() + "\n");
  eval["results"][bad][bad] = 1.5;
  spill(folder + "/tasks.json", eval.dump());
  const auto runs = read_runs({folder, r.add("plain", step_line(1, 3))}, {});
  const std::string page = report_html(runs);
  CHECK(well_formed(page));
  CHECK(data_of(page)[0]["name"] == "x<b>&y");
  CHECK_FALSE(holds(page, "<img"));
  CHECK(holds(page, "&lt;img src=x onerror=alert(1)&gt;"));
  // Nothing is fetched: no address but the name space of SVG, no import, no url() but of the page.
  std::string rest = std::regex_replace(page, std::regex("http://www\\.w3\\.org/2000/svg"), "");
  CHECK_FALSE(holds(rest, "http"));
  CHECK_FALSE(holds(rest, "@import"));
  CHECK_FALSE(std::regex_search(rest, std::regex("url\\((?!#)")));
  CHECK_FALSE(std::regex_search(rest, std::regex("<(script|link|img|iframe)[^>]* src=")));
  CHECK_FALSE(holds(rest, "fetch("));
  CHECK(holds(page, "prefers-color-scheme: dark"));
  CHECK(holds(page, "width=device-width"));
}

TEST_CASE("report: a browser draws the curves", "[report]") {
  if (std::system("command -v chromium > /dev/null 2>&1") != 0) {
    WARN("skipped: no chromium (apt-get install chromium)");
    return;
  }
  Runs r;
  std::string lines;
  for (int64_t s = 1; s <= 50; ++s)
    lines += step_line(s, s == 20 ? NAN : 5 - 0.05 * double(s)) +
             (s % 10 == 0 ? eval_line(s, 4 - 0.04 * double(s)) : "");
  const std::string page = r.tmp / "page.html";
  spill(page, report_html(read_runs({r.add("a", lines), r.add("one", step_line(1, 5))}, {})));
  const std::string out = r.tmp / "dom.html";
  const std::string command =
      "chromium --headless --no-sandbox --disable-gpu --user-data-dir='" + r.tmp / "profile" +
      "' --virtual-time-budget=3000 --dump-dom 'file://" + page + "' > '" + out + "' 2> /dev/null";
  if (std::system(("timeout 60 " + command).c_str()) != 0) {
    WARN("skipped: chromium does not start here");
    return;
  }
  const std::string dom = slurp(out);
  const auto count = [&](const std::string& part) {
    int n = 0;
    for (size_t at = 0; (at = dom.find(part, at)) != std::string::npos; ++at) ++n;
    return n;
  };
  CHECK(count("<figure") == 5);  // loss, validation, norm, lr, throughput; no mfu, no layers
  CHECK(count("<svg") == 5);
  CHECK(count(">no data<") == 0);
  CHECK(count("NaN") == 0);
  CHECK(count("class=\"bad\"") == 1);  // the step whose loss is not finite
  CHECK(count("<circle") > 4);         // the lone point of the second run in each chart
  CHECK(holds(dom, "id=\"controls\""));
  CHECK_FALSE(holds(dom, "id=\"controls\" hidden"));
}
