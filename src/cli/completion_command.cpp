// hgrn completion: what shells and man(1) read, on stdout.
#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "cli/help_files.h"

namespace hgrn {

Command completion_command(CLI::App& root) {
  auto kind = std::make_shared<std::string>();
  CLI::App* app =
      root.add_subcommand("completion", "Print completions for bash, zsh or fish, or the manual");
  app->footer("Example:\n  hgrn completion bash > ~/.local/share/bash-completion/completions/hgrn");
  app->add_option("kind", *kind, "bash, zsh, fish or man")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish", "man"}));
  return {app, [kind, &root] {
            print(*kind == "bash"   ? bash_completion(root)
                  : *kind == "zsh"  ? zsh_completion(root)
                  : *kind == "fish" ? fish_completion(root)
                                    : man_page(root));
            return Exit::ok;
          }};
}

}  // namespace hgrn
