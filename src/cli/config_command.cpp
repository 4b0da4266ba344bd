// hgrn config: the reference of the config's keys, on stdout.
#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "model/config.h"

namespace hgrn {

Command config_command(CLI::App& root) {
  CLI::App* app = root.add_subcommand("config", "Every key of a config: default, range, meaning");
  app->footer("Example:\n  hgrn config | grep dropout");
  return {app, [] {
            print(config_reference());
            return Exit::ok;
          }};
}

}  // namespace hgrn
