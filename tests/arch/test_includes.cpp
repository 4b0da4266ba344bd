// The direction of includes: core <- ops <- mixers <- model <- text, train, eval <- cli, tools.
// kernels/ include only core and ops; nothing in src/ includes kernels/; CUDA headers stay in
// kernels/cuda.
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>

#include "catch.h"

namespace fs = std::filesystem;

namespace {

const std::map<std::string, std::set<std::string>> kMayInclude = {
    {"core", {"core"}},
    {"ops", {"core", "ops"}},
    {"mixers", {"core", "ops", "mixers"}},
    {"model", {"core", "ops", "mixers", "model"}},
    {"text", {"core", "text"}},
    {"launch", {"core", "ops", "launch"}},
    {"sweep", {"core", "ops", "model", "launch", "sweep"}},
    {"monitor", {"core", "monitor"}},
    {"train", {"core", "ops", "mixers", "model", "text", "launch", "monitor", "train"}},
    {"eval", {"core", "ops", "mixers", "model", "text", "train", "eval"}},
    {"report", {"core", "monitor", "report"}},
    {"api", {"core", "ops", "model", "text", "eval", "api"}},
    {"cli",
     {"core", "ops", "mixers", "model", "text", "launch", "monitor", "train", "eval", "report",
      "sweep", "cli"}},
};

std::set<std::string> includes_of(const fs::path& file) {
  static const std::regex line_form(R"(^\s*#\s*include\s*["<]([^">]+)[">])");
  std::set<std::string> out;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);)
    if (std::smatch m; std::regex_search(line, m, line_form)) out.insert(m[1]);
  return out;
}

bool is_code(const fs::path& p) {
  const std::string e = p.extension().string();
  return e == ".h" || e == ".cpp" || e == ".cu" || e == ".cuh";
}

std::string room_of(const std::string& include) {
  const size_t slash = include.find('/');
  return slash == std::string::npos ? "" : include.substr(0, slash);
}

bool is_cuda_header(const std::string& include) {
  return std::regex_search(include, std::regex("^(cuda|cublas|cudnn|nccl|cub/|mma\\.h)"));
}

}  // namespace

TEST_CASE("includes point one way", "[arch]") {
  const fs::path root = HGRN_SOURCE_DIR;
  int64_t seen = 0;
  for (const auto& [room, allowed] : kMayInclude) {
    if (!fs::exists(root / "src" / room)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / "src" / room)) {
      if (!is_code(entry.path())) continue;
      ++seen;
      for (const std::string& include : includes_of(entry.path())) {
        INFO(entry.path().string() << " includes " << include);
        const std::string to = room_of(include);
        if (kMayInclude.count(to)) CHECK(allowed.count(to) == 1);
        CHECK(include.find("kernels/") == std::string::npos);
        CHECK(to != "cpu");
        CHECK(to != "cuda");
        CHECK_FALSE(is_cuda_header(include));
      }
    }
  }
  CHECK(seen > 40);
}

TEST_CASE("kernels include core, ops and themselves", "[arch]") {
  const fs::path root = fs::path(HGRN_SOURCE_DIR) / "kernels";
  int64_t seen = 0;
  for (const auto& entry : fs::recursive_directory_iterator(root)) {
    if (!is_code(entry.path())) continue;
    ++seen;
    const std::string own = room_of(fs::relative(entry.path(), root).string());
    for (const std::string& include : includes_of(entry.path())) {
      INFO(entry.path().string() << " includes " << include);
      const std::string to = room_of(include);
      if (kMayInclude.count(to)) CHECK((to == "core" || to == "ops"));
      if (to == "cpu" || to == "cuda") CHECK(to == own);
      if (own != "cuda") CHECK_FALSE(is_cuda_header(include));
    }
  }
  CHECK(seen > 10);
}

TEST_CASE("heavy headers stay out of ours", "[arch]") {
  for (const char* top : {"src", "kernels"})
    for (const auto& entry : fs::recursive_directory_iterator(fs::path(HGRN_SOURCE_DIR) / top)) {
      if (entry.path().extension() != ".h") continue;
      for (const std::string& include : includes_of(entry.path())) {
        INFO(entry.path().string() << " includes " << include);
        CHECK(include != "nlohmann/json.hpp");
        CHECK(include.rfind("spdlog", 0) != 0);
        CHECK(include.rfind("CLI/", 0) != 0);
        CHECK(include != "cblas.h");
        CHECK(include.rfind("mkl_", 0) != 0);
      }
    }
}
