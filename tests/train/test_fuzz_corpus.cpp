// Every input that the fuzzers start from or once tripped over, in builds without libFuzzer too.
#include <filesystem>

#include "catch.h"
#include "fuzz/config_target.h"
#include "fuzz/targets.h"
#include "temp_folder.h"

using namespace hgrn;

TEST_CASE("the fuzzers' corpus is read or refused", "[train]") {
  const std::string corpus = std::string(HGRN_SOURCE_DIR) + "/tests/fuzz/corpus/";
  const auto replay = [&](const std::string& format, void (*target)(const uint8_t*, size_t)) {
    size_t files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(corpus + format)) {
      INFO(entry.path().string());
      const std::string bytes = test::slurp(entry.path());
      CHECK_NOTHROW(target(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()));
      ++files;
    }
    CHECK(files > 0);
  };
  replay("config", fuzz::config);
  replay("safetensors", fuzz::safetensors);
  replay("manifest", fuzz::manifest);
  replay("trainer_state", fuzz::trainer_state);
}
