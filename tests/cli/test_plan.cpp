// What `hgrn plan --cpu` says beside what a process really takes.
#include <nlohmann/json.hpp>
#include <regex>

#include "catch.h"
#include "launch/process.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

TEST_CASE("cli: the planned memory of a CPU run is what it takes", "[cli]") {
  const char* options = std::getenv("ASAN_OPTIONS");
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  options = "a sanitizer's memory is not planned";
#endif
  if (options) {
    WARN("skipped: sanitizers take memory of their own");
    return;
  }
  const TempFolder tmp;
  std::vector<int32_t> tokens(20000);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = int32_t(i * i % 251);
  write_shard(tmp / "t.bin", tokens);
  using Case = std::pair<const char*, const char*>;
  for (const auto& [extra, recompute] :
       {Case{R"("vocab_size": 257, "hidden_size": 256, "num_hidden_layers": 8)", "none"},
        Case{R"("vocab_size": 257, "hidden_size": 256, "num_hidden_layers": 8)", "elementwise"},
        Case{R"("vocab_size": 30000, "hidden_size": 128, "num_hidden_layers": 2)", "none"}}) {
    spill(tmp / "c.json", std::string(R"({"model": {)") + extra +
                              R"(, "expand_ratio": 32, "intermediate_size": 704},
      "data": {"train": ")" + (tmp / "t.bin") +
                              R"(", "seq_len": 256},
      "train": {"steps": 4, "global_batch": 4, "micro_batch": 4, "precision": "fp32",
                "recompute": ")" +
                              recompute + R"(", "eval_every": 0, "checkpoint_every": 2}})");
    const Env two = {{"OMP_NUM_THREADS", "2"}};
    std::filesystem::remove(tmp / "plan");
    Process plan(HGRN_BINARY, {"plan", "--config", tmp / "c.json", "--cpu", "--json"}, two,
                 tmp / "plan");
    REQUIRE(plan.wait() == 0);
    const double planned = nlohmann::json::parse(plan.output())["memory"]["peak_bytes"];
    Process run(HGRN_BINARY,
                {"train", "--config", tmp / "c.json", "--out", tmp / "run", "--device", "cpu",
                 "--resume", "never"},
                two, tmp / "log");
    double peak = 0;
    const std::string status = fmt::format("/proc/{}/status", run.pid());
    std::smatch m;
    while (run.running()) {
      const std::string text = slurp(status);
      if (std::regex_search(text, m, std::regex("VmHWM:\\s*(\\d+) kB")))
        peak = 1024 * std::stod(m[1]);
      sleep_ms(2);
    }
    REQUIRE(run.wait() == 0);
    INFO("planned " << planned / 1048576 << " MiB, taken " << peak / 1048576 << " MiB");
    CHECK(planned == Approx(peak).epsilon(0.05));
  }
}
