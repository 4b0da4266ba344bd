// TensorBoard's records byte by byte and read back by the real package, the Prometheus file, NVML.
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <regex>
#include <set>
#include <sstream>

#include "catch.h"
#include "core/file.h"
#include "monitor/event_record.h"
#include "monitor/nvml.h"
#include "monitor/prometheus.h"
#include "monitor/tensorboard.h"
#include "temp_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

StepMetrics step_of(int64_t step, double loss) {
  StepMetrics m;
  m.step = step;
  m.steps = 100;
  m.tokens = step * 512;
  m.loss = loss;
  m.grad_norm = 0.5;
  m.lr = 1e-3;
  m.step_ms = 20;
  m.tokens_per_s = 25600;
  m.mfu = 0.25;
  m.memory_gib = 3;
  m.eta_s = 7;
  m.skipped = 1;
  return m;
}

std::vector<std::string> event_names(const std::string& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().filename().string().find("tfevents") != std::string::npos)
      names.insert(entry.path().string());
  return {names.begin(), names.end()};
}

// Whole records of an event file, and whether it ends with one.
std::vector<std::string> records_of(const std::string& bytes, bool* whole) {
  std::vector<std::string> out;
  size_t at = 0;
  while (at + 12 <= bytes.size()) {
    uint64_t length = 0;
    uint32_t crc = 0;
    std::memcpy(&length, bytes.data() + at, 8);
    std::memcpy(&crc, bytes.data() + at + 8, 4);
    CHECK(crc == masked_crc32c(bytes.substr(at, 8)));
    if (at + 16 + length > bytes.size()) break;
    out.push_back(bytes.substr(at + 12, length));
    std::memcpy(&crc, bytes.data() + at + 12 + length, 4);
    CHECK(crc == masked_crc32c(out.back()));
    at += 16 + length;
  }
  *whole = at == bytes.size();
  return out;
}

// The output of a Python program with the tensorboard package, or nothing where there is none.
// What TensorBoard's own reader finds, with the server's settings; it keeps scalars as tensors.
const char* const kReader = R"(import sys
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
e = EventAccumulator(sys.argv[1], size_guidance={"tensors": 0})
e.Reload()
def points(tag):
    return [(t.step, make_ndarray(t.tensor_proto).tolist()) for t in e.Tensors(tag)]
def tags(plugin):
    return sorted(e.PluginTagToContent(plugin))
)";

// Runs `program` behind the reader. Empty, with a warning, where the package is missing; a reader
// that is there and fails is a failure.
std::string tensorboard(const TempFolder& tmp, const std::string& program) {
  const char* python = std::getenv("HGRN_TENSORBOARD_PYTHON");  // of a virtual environment
  const std::string interpreter = python ? python : "python3";
  const std::string start = "'" + interpreter + "' -W ignore ";
  if (std::system((start + "-c 'import tensorboard' 2> /dev/null").c_str()) != 0) {
    WARN("skipped: " << interpreter << " has no package tensorboard (pip install tensorboard)");
    return {};
  }
  spill(tmp / "read.py", kReader + program);
  const std::string out = tmp / "read.out", err = tmp / "read.err";
  const int status = std::system(
      (start + "'" + tmp / "read.py" + "' '" + tmp.path() + "' > '" + out + "' 2> '" + err + "'")
          .c_str());
  INFO(slurp(err));
  REQUIRE(status == 0);
  return slurp(out);
}

}  // namespace

TEST_CASE("monitor: crc32c and protocol buffers match their specifications", "[monitor]") {
  // RFC 3720, appendix B.4, and the check value of CRC-32C
  CHECK(crc32c("123456789") == 0xE3069283u);
  CHECK(crc32c(std::string(32, '\0')) == 0x8A9136AAu);
  CHECK(crc32c(std::string(32, '\xff')) == 0x62A8AB43u);
  // the examples of the encoding's documentation: 150 in field 1, "testing" in field 2
  CHECK(ProtoMessage().integer(1, 150).str() == "\x08\x96\x01");
  CHECK(ProtoMessage().bytes(2, "testing").str() == "\x12\x07testing");
  CHECK(ProtoMessage().integer(1, -2).str() ==
        std::string("\x08\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"));
}

TEST_CASE("monitor: an event file holds whole records at any moment", "[monitor]") {
  const TempFolder tmp;
  TensorBoardFile file(tmp.path(), 0, "{}\n");
  for (int64_t step = 1; step <= 3; ++step) {
    file.logged(step_of(step, 2.0));
    bool whole = false;
    const auto records = records_of(slurp(file.path()), &whole);
    CHECK(whole);
    REQUIRE(records.size() == size_t(3 + step));
    CHECK(records[0].find("brain.Event:2") != std::string::npos);
    CHECK(records.back().find("train/loss") != std::string::npos);
  }
}

TEST_CASE("monitor: files of later starts sort behind earlier ones", "[monitor]") {
  const TempFolder tmp;
  // a file that a machine with a clock in the future wrote
  spill(tmp / "events.out.tfevents.9999999990.elsewhere.1", "");
  const TensorBoardFile a(tmp.path(), 0, "{}"), b(tmp.path(), 3, "{}");
  const auto names = event_names(tmp.path());
  REQUIRE(names.size() == 3);
  CHECK(names[1] == a.path());
  CHECK(names[2] == b.path());
  set_event_files_aside(tmp.path(), tmp / "events.before-1");
  CHECK(event_names(tmp.path()).empty());
  CHECK(event_names(tmp / "events.before-1").size() == 3);
}

TEST_CASE("monitor: tensorboard reads what was written", "[monitor]") {
  const TempFolder tmp;
  {
    TensorBoardFile first(tmp.path(), 0, "{\"a\": 1}\n");
    for (int64_t step = 1; step <= 6; ++step) first.logged(step_of(step, 5.0 - double(step)));
    first.evaluated({5, 2.5, 100});
    first.sampled({4, "Once ", "upon <b>a</b> *time*\nand again"});
    LayerMetrics layers;
    layers.step = 4;
    layers.grad_norm = {0.1, 0.2};
    layers.forget_gate = {0.25, NAN};
    first.layers(layers);
    first.logged(step_of(7, NAN));
  }
  {
    TensorBoardFile second(tmp.path(), 3, "{}");  // resumed from step 3
    second.logged(step_of(4, 0.5));
    second.logged(step_of(5, 0.25));
    second.rolled_back(4);
    second.logged(step_of(5, 0.125));
  }
  const std::string told = tensorboard(tmp, R"(
print("loss", points("train/loss"))
print("valid", points("valid/loss"))
print("mfu", points("speed/mfu")[0])
print("gate", points("forget_gate/layer_0"))
print("config", points("config"))
print("texts", tags("text"))
print("sample", points("sample"))
)");
  if (told.empty()) return;
  INFO(told);
  const auto says = [&](const std::string& part) { CHECK(told.find(part) != std::string::npos); };
  // What the first start told after step 3 is gone, and so is the step that was rolled back.
  says("loss [(1, 4.0), (2, 3.0), (3, 2.0), (4, 0.5), (5, 0.125)]");
  says("valid []");
  says("mfu (1, 0.25)");
  says("gate []");
  says(R"(config [(0, [b'    {"a": 1}\n']), (3, [b'    {}'])])");
  says("texts ['config', 'sample']");
  says("sample []");
}

TEST_CASE("monitor: tensorboard reads samples, layers and numbers that are none", "[monitor]") {
  const TempFolder tmp;
  TensorBoardFile file(tmp.path(), 0, "{}");
  file.sampled({4, "Once ", "upon <b>a</b> *time*\nand again"});
  LayerMetrics layers;
  layers.step = 4;
  layers.grad_norm.assign(11, 0.5);
  layers.forget_gate.assign(11, 0.25);
  layers.forget_gate[3] = NAN;
  file.layers(layers);
  file.logged(step_of(7, NAN));
  const std::string told = tensorboard(tmp, R"(
print("loss", points("train/loss"))
print("norms", [t for t in tags("scalars") if t.startswith("grad_norm/")])
print("gates", len([t for t in tags("scalars") if t.startswith("forget_gate/")]))
print("sample", points("sample"))
)");
  if (told.empty()) return;
  INFO(told);
  CHECK(told.find("loss [(7, nan)]") != std::string::npos);
  CHECK(told.find("'grad_norm/layer_09', 'grad_norm/layer_10'") != std::string::npos);
  CHECK(told.find("gates 10") != std::string::npos);
  CHECK(told.find(R"((4, [b'    Once upon <b>a</b> *time*\n    and again']))") !=
        std::string::npos);
}

TEST_CASE("monitor: the Prometheus file follows the text format", "[monitor]") {
  const TempFolder tmp;
  const std::string path = tmp / "hgrn.prom";
  {
    PrometheusFile file(path, "a \"run\"\\with\nall", "cpu");
    file.every_step(step_of(1, 2.5));
    GpuStatus gpu;
    gpu.power_w = 612;
    file.gpu(gpu);
    file.evaluated({1, 2.75, 10});
    file.every_step(step_of(2, NAN));
    const std::string text = file.text(true, 1.7e9);
    // One HELP and one TYPE before each sample, every line of a known form.
    const std::regex sample(R"re([a-z_]+\{[a-z]+="([^"\\\n]|\\.)*"(,[a-z]+="[^"]*")*\} \S+)re");
    std::istringstream in(text);
    std::set<std::string> names;
    std::string help, type;
    for (std::string line; std::getline(in, line);) {
      INFO(line);
      if (line.rfind("# HELP ", 0) == 0) {
        help = line.substr(7, line.find(' ', 7) - 7);
      } else if (line.rfind("# TYPE ", 0) == 0) {
        type = line.substr(7, line.find(' ', 7) - 7);
      } else {
        CHECK(std::regex_match(line, sample));
        const std::string name = line.substr(0, line.find('{'));
        CHECK((name == help && name == type && names.insert(name).second));
      }
    }
    CHECK(text.find("hgrn_train_loss{run=\"a \\\"run\\\"\\\\with\\nall\"} NaN\n") !=
          std::string::npos);
    CHECK(text.find("} 612\n") != std::string::npos);
    CHECK(names.count("hgrn_gpu_temperature_celsius") == 0);  // unknown
    CHECK(names.count("hgrn_valid_loss") == 1);
    CHECK(slurp(path).find("hgrn_train_running{run=") != std::string::npos);
    struct stat info {};
    REQUIRE(::stat(path.c_str(), &info) == 0);
    CHECK((info.st_mode & 0044) == 0044);  // node_exporter is another user
  }
  const std::string left = slurp(path);
  CHECK(left.find("all\"} 0\n") != std::string::npos);  // running 0
  CHECK(left.find("hgrn_train_step{") != std::string::npos);
  CHECK(tmp.files() == 1);  // no temporary file stays
  CHECK(thrown_by([&] { PrometheusFile("/nonexistent/x.prom", "r", "cpu"); }).code == Exit::usage);
}

TEST_CASE("monitor: NVML through a stand-in library", "[monitor]") {
  const Nvml gpu("0000:1B:00.0", HGRN_FAKE_NVML);
  const auto s = gpu.read();
  REQUIRE(s.has_value());
  CHECK(s->memory_used == double(61ull << 30));
  CHECK(s->memory_total == double(150ull << 30));
  CHECK(s->power_w == Approx(612.345));
  CHECK(s->power_limit_w == 700);
  CHECK(s->temperature_c == 61);
  CHECK(s->utilization < 0);  // the call failed
  CHECK_FALSE(Nvml("0000:FF:00.0", HGRN_FAKE_NVML).read().has_value());
  CHECK_FALSE(Nvml("0000:1B:00.0", "libno-such-library.so").read().has_value());
  CHECK_FALSE(Nvml("", HGRN_FAKE_NVML).read().has_value());
}
