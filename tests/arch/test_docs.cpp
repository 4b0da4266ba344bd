// docs/troubleshooting.md quotes messages: each must still be one. In its tables that begin with
// "Message", the texts between backticks in the first column, with ... for what differs.
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>
#include <vector>

#include "catch.h"

namespace fs = std::filesystem;

namespace {

std::string text_of(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
}

// Source text as its messages read: literals that the compiler joins are joined.
std::string messages_of(const fs::path& path) {
  std::string text = text_of(path), out;
  for (size_t at = 0; at < text.size(); ++at) {
    if (text[at] == '"') {
      const size_t next = text.find_first_not_of(" \n", at + 1);
      if (next != std::string::npos && next > at + 1 && text[next] == '"') {
        at = next;
        continue;
      }
    }
    out += text[at];
  }
  replace_all(out, "\\\"", "\"");
  replace_all(out, "{{", "{");
  return out;
}

std::vector<std::string> sources() {
  const fs::path root = HGRN_SOURCE_DIR;
  std::vector<std::string> out = {messages_of(root / "CMakeLists.txt")};
  for (const char* folder : {"src", "kernels", "scripts"})
    for (const auto& entry : fs::recursive_directory_iterator(root / folder))
      if (entry.is_regular_file()) out.push_back(messages_of(entry.path()));
  return out;
}

// The parts of a quotation occur in this order, close to each other.
bool quotes(const std::string& source, const std::vector<std::string>& parts) {
  for (size_t at = source.find(parts[0]); at != std::string::npos;
       at = source.find(parts[0], at + 1)) {
    size_t end = at + parts[0].size(), found = 1;
    for (; found < parts.size(); ++found) {
      const size_t next = source.find(parts[found], end);
      if (next == std::string::npos || next > end + 120) break;
      end = next + parts[found].size();
    }
    if (found == parts.size()) return true;
  }
  return false;
}

std::vector<std::string> split(const std::string& quotation) {
  std::vector<std::string> parts;
  size_t from = 0;
  for (size_t at; (at = quotation.find("...", from)) != std::string::npos; from = at + 3)
    parts.push_back(quotation.substr(from, at - from));
  parts.push_back(quotation.substr(from));
  return parts;
}

// "line: quotation"
std::vector<std::pair<int, std::string>> quotations(const fs::path& page) {
  static const std::regex quoted("`([^`]+)`");
  std::vector<std::pair<int, std::string>> out;
  std::ifstream in(page);
  bool messages = false;
  int number = 0;
  for (std::string line; std::getline(in, line);) {
    ++number;
    if (line.rfind("| ", 0) != 0 && line.rfind("|-", 0) != 0) messages = false;
    if (line.rfind("| Message", 0) == 0) messages = true;
    if (!messages) continue;
    const std::string cell = line.substr(0, line.find(" | ", 2));
    for (std::sregex_iterator m(cell.begin(), cell.end(), quoted), end; m != end; ++m)
      out.emplace_back(number, (*m)[1]);
  }
  return out;
}

}  // namespace

TEST_CASE("the messages that docs/troubleshooting.md quotes are in the sources", "[arch]") {
  const std::vector<std::string> all = sources();
  const auto found = quotations(fs::path(HGRN_SOURCE_DIR) / "docs/troubleshooting.md");
  CHECK(found.size() > 100);
  for (const auto& [line, quotation] : found) {
    INFO("docs/troubleshooting.md:" << line << ": " << quotation);
    bool known = false;
    for (const std::string& source : all) known = known || quotes(source, split(quotation));
    CHECK(known);
  }
}
