// The command tree: parses the command line, names the nearest flag where one is unknown.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <regex>
#include <sstream>

#include <fmt/format.h>

#include "cli/command.h"
#include "core/version.h"
#include "model/fields.h"

namespace hgrn {
namespace {

const std::map<std::string, Device> kDevices = {
    {"auto", Device::automatic}, {"cpu", Device::cpu}, {"cuda", Device::cuda}};

// Flags are written with - or _; CLI11 knows the - form.
std::vector<std::string> normalised(int argc, char** argv) {
  std::vector<std::string> words;
  bool options = true;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word == "--") options = false;
    if (options && word.rfind("--", 0) == 0)
      for (char& c : word) {
        if (c == '=') break;
        if (c == '_') c = '-';
      }
    words.push_back(word);
  }
  return words;
}

// CLI11's texts of checks on a value, as a person would put them. A range is "0 to 1" in
// version 2.1 and "[0 - 1]" in 2.4; the latter writes the smallest double for what must be above 0.
std::string plain_words(const std::string& what) {
  static const std::regex range(
      R"re((.*): Value (.*) not in range \[?(\S+) (?:to|-) ([^\]\s]+)\]?)re");
  static const std::regex choice("(.*): Check (.*) value in \\{(.*)\\} OR .*");
  static const std::regex missing("(.*): 1 required .* missing");
  std::smatch m;
  if (std::regex_match(what, m, missing)) return m[1].str() + " needs a value";
  if (std::regex_match(what, m, choice)) {
    std::vector<std::string> names;
    std::istringstream pairs(m[3]);
    for (std::string pair; std::getline(pairs, pair, ',');)
      names.push_back(pair.substr(0, pair.find("->")));
    return fmt::format("{}: \"{}\" is not one of {}{}", m[1].str(), m[2].str(),
                       fmt::join(names, ", "), did_you_mean(m[2], names));
  }
  if (!std::regex_match(what, m, range)) return what;
  const std::string name = m[1], value = m[2];
  const double smallest = std::atof(m[3].str().c_str()), high = std::atof(m[4].str().c_str());
  const double low = std::fabs(smallest) < 1e-300 ? 0 : smallest;
  char* end = nullptr;
  const double given = std::strtod(value.c_str(), &end);
  if (end == value.c_str() || *end != 0)
    return fmt::format("{}: \"{}\" is not a number of the kind wanted", name, value);
  if (high < 1e300)
    return fmt::format("{}: {} is not between {:g} and {:g}", name, value, low, high);
  return fmt::format("{}: {} is out of range; it must be {} {:g}", name, value,
                     given >= low || low != smallest ? "above" : "at least", low);
}

std::string usage_error(const CLI::App& root, const CLI::ParseError& e,
                        const std::vector<std::string>& words) {
  const CLI::App* app = &root;
  std::vector<std::string> commands, flags;
  for (const CLI::App* sub : root.get_subcommands(nullptr)) {
    commands.push_back(sub->get_name());
    if (sub->parsed() || (!words.empty() && words[0] == sub->get_name())) app = sub;
  }
  if (!words.empty() && app == &root && words[0].rfind("-", 0) != 0)
    return fmt::format("hgrn {}: unknown command{}", words[0], did_you_mean(words[0], commands));
  for (const CLI::Option* o : app->get_options())
    for (const std::string& name : o->get_lnames()) flags.push_back("--" + name);
  for (const std::string& word : words) {
    if (word == "--") break;
    const std::string flag = word.substr(0, word.find('='));
    if (flag.rfind("--", 0) == 0 && flag.size() > 2 &&
        std::find(flags.begin(), flags.end(), flag) == flags.end())
      return fmt::format("{}: unknown flag {}{}", app == &root ? "hgrn" : "hgrn " + app->get_name(),
                         flag, did_you_mean(flag, flags));
  }
  if (app == &root)
    return fmt::format("hgrn: {}; see hgrn --help",
                       words.empty()
                           ? "give a command: " + fmt::format("{}", fmt::join(commands, ", "))
                           : e.what());
  return fmt::format("hgrn {}: {}; see hgrn {} --help", app->get_name(), plain_words(e.what()),
                     app->get_name());
}

}  // namespace

void print(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

void add_device(CLI::App* app, Device& device) {
  app->add_option("--device", device, "auto, cpu or cuda")
      ->transform(CLI::CheckedTransformer(kDevices, CLI::ignore_case).description(""))
      ->default_str("auto");
}

int run_command_line(int argc, char** argv) {
  CLI::App root("hgrn: trainer for HGRN2 language models", "hgrn");
  root.set_version_flag("--version",
                        std::string("hgrn ") + version() + "\nCUDA: " + cuda_versions());
  root.require_subcommand(1);
  root.footer(
      "Example:\n  hgrn train --config configs/quickstart.json\nhgrn COMMAND --help shows a "
      "command's flags.");
  const Command commands[] = {
      train_command(root),    eval_command(root),   generate_command(root),
      tokenize_command(root), plan_command(root),   config_command(root),
      inspect_command(root),  report_command(root), compare_command(root),
      launch_command(root),   sweep_command(root),  completion_command(root)};
  const std::vector<std::string> words = normalised(argc, argv);
  try {
    root.parse(std::vector<std::string>(words.rbegin(), words.rend()));
  } catch (const CLI::CallForHelp&) {
    print(root.help());
    return 0;
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return root.exit(e);
    std::fprintf(stderr, "error: %s\n", usage_error(root, e, words).c_str());
    return int(Exit::usage);
  }
  for (const Command& c : commands)
    if (c.app->parsed()) return int(c.run());
  return int(Exit::usage);
}

}  // namespace hgrn
