// What the live view shows, at every width.
#include <algorithm>
#include <cmath>

#include "catch.h"
#include "core/terminal.h"
#include "monitor/live_view.h"

using namespace hgrn;

namespace {

ViewState busy() {
  ViewState s;
  s.run = "hgrn2_1b";
  s.device = "cuda bf16";
  s.step.step = 412;
  s.step.steps = 960;
  s.step.tokens = 843776;
  s.step.loss = 2.8123;
  s.step.grad_norm = 0.52;
  s.step.lr = 4.1e-3;
  s.step.step_ms = 76;
  s.step.tokens_per_s = 27104;
  s.step.mfu = 0.412;
  s.step.eta_s = 3700;
  s.step.skipped = 2;
  s.elapsed_s = 48;
  s.eval = {240, 3.0891, 65536};
  s.gpu.memory_used = double(61ull << 30);
  s.gpu.memory_total = double(140ull << 30);
  s.gpu.power_w = 612;
  s.gpu.power_limit_w = 700;
  s.gpu.temperature_c = 61;
  for (int i = 0; i < 400; ++i) s.losses.add(5 - 0.005 * i);
  return s;
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("view: lines fit every width, in every style", "[monitor]") {
  for (int columns = 1; columns < 220; ++columns)
    for (const bool colour : {false, true})
      for (const bool utf8 : {false, true})
        for (const std::string& line : render(busy(), {columns, colour, utf8})) {
          INFO(columns << ": " << line);
          CHECK(display_width(line) <= std::max(1, columns - 1));
          CHECK(holds(line, "\x1b") == (colour && holds(line, "\x1b")));
          if (!colour) CHECK_FALSE(holds(line, "\x1b"));
          if (colour && holds(line, "\x1b["))
            CHECK(line.rfind("\x1b[0m") >= line.rfind("\x1b[", line.rfind("\x1b[0m")));
          if (!utf8)
            for (char c : line) CHECK(static_cast<unsigned char>(c) < 0x80);
        }
}

TEST_CASE("view: what it says", "[monitor]") {
  const auto wide = render(busy(), {140, false, true});
  REQUIRE(wide.size() == 4);
  CHECK(holds(wide[0], "hgrn2_1b  ━"));
  CHECK(holds(wide[0], "42.9%  step 412/960  eta 1:01:40  elapsed 0:48"));
  CHECK(holds(wide[1], "loss 2.8123  █"));
  CHECK(holds(wide[1], "▁  norm 0.520  valid 3.0891 at 240  skipped 2  lr 4.10e-03"));
  CHECK(wide[2] == "27.1k tok/s  76 ms/step  mfu 41.2%  844k tokens  cuda bf16");
  CHECK(wide[3] == "gpu  memory 61.0/140.0 GiB  612/700 W  61 °C");
  // The bar outlives what is less wanted.
  const auto narrow = render(busy(), {50, false, false});
  CHECK(holds(narrow[0], "hgrn2_1b  ###"));
  CHECK(holds(narrow[0], "42.9%"));
  ViewState fresh;
  fresh.run = "r";
  fresh.phase = "evaluating";
  CHECK(render(fresh, {80, false, true}).size() == 1);
  CHECK(holds(render(fresh, {80, false, true})[0], "evaluating"));
}

TEST_CASE("view: a curve of any length in bounded memory", "[monitor]") {
  Curve empty;
  CHECK(empty.levels(10).empty());
  Curve c;
  for (int i = 0; i < 1000000; ++i) c.add(i % 100 == 0 ? NAN : double(i));
  const auto levels = c.levels(8);
  CHECK(levels == std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7});
  Curve flat;
  for (int i = 0; i < 10; ++i) flat.add(2);
  CHECK(flat.levels(40) == std::vector<int>(5, 0));
}

TEST_CASE("terminal: widths and cuts of texts", "[monitor]") {
  CHECK(display_width("abc") == 3);
  CHECK(display_width("\x1b[1m"
                      "abc"
                      "\x1b[0m") == 3);
  CHECK(display_width("日本") == 4);
  CHECK(display_width("e\u0301") == 1);  // combining accent
  CHECK(display_width("\xff\xfe") == 2);
  CHECK(cut_to("日本", 3) == "日");
  CHECK(cut_to("\x1b[1m"
               "abcdef"
               "\x1b[0m",
               2) ==
        "\x1b[1m"
        "ab"
        "\x1b[0m");
  CHECK(cut_to("ab日cd", 3) == "ab");
}
