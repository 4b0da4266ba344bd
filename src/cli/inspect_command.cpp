// hgrn inspect: what a file or folder holds.
#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "train/inspect.h"

namespace hgrn {

Command inspect_command(CLI::App& root) {
  struct Args {
    std::string path;
    bool verify = false;
  };
  auto a = std::make_shared<Args>();
  CLI::App* app =
      root.add_subcommand("inspect", "What a checkpoint, shard, tokenizer or metrics file holds");
  app->footer("Example:\n  hgrn inspect runs/quickstart --verify");
  app->add_option("path", a->path, "file or folder")->required();
  app->add_flag("--verify", a->verify, "check every byte against its checksum");
  return {app, [a] {
            print(inspect(a->path, a->verify));
            return Exit::ok;
          }};
}

}  // namespace hgrn
