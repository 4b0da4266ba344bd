// The commands of the program, one file each: flags to options, options to a call of a room.
// A new command is a file <name>_command.cpp, a line below and a row in cli.cpp.
#pragma once
#include <functional>
#include <string_view>

#include "core/check.h"
#include "ops/ops.h"

namespace CLI {
class App;
}

namespace hgrn {

struct Command {
  CLI::App* app = nullptr;
  std::function<Exit()> run;  // called where the command line named this command
};

// Each adds its subcommand to the tree.
Command train_command(CLI::App& root);
Command eval_command(CLI::App& root);
Command generate_command(CLI::App& root);
Command tokenize_command(CLI::App& root);
Command plan_command(CLI::App& root);
Command config_command(CLI::App& root);
Command inspect_command(CLI::App& root);
Command launch_command(CLI::App& root);
Command sweep_command(CLI::App& root);
Command completion_command(CLI::App& root);
Command report_command(CLI::App& root);
Command compare_command(CLI::App& root);

// The whole program: the exit code of docs/formats.md. Throws what the command throws.
int run_command_line(int argc, char** argv);

void print(std::string_view text);  // results, to stdout, at once
void add_device(CLI::App* app, Device& device);

}  // namespace hgrn
