// The command tree: parses the command line, names the nearest flag where one is unknown.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>

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
      return fmt::format("hgrn {}: unknown flag {}{}", app->get_name(), flag,
                         did_you_mean(flag, flags));
  }
  return fmt::format("hgrn {}: {}; see hgrn {} --help", app->get_name(), e.what(), app->get_name());
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
  const Command commands[] = {train_command(root),    eval_command(root),   generate_command(root),
                              tokenize_command(root), plan_command(root),   inspect_command(root),
                              launch_command(root),   report_command(root), compare_command(root)};
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
