// Files about the command line, made from the tree of commands: completions and the manual page.
#pragma once
#include <string>

namespace CLI {
class App;
}

namespace hgrn {

std::string bash_completion(const CLI::App& root);
std::string zsh_completion(const CLI::App& root);
std::string fish_completion(const CLI::App& root);
std::string man_page(const CLI::App& root);  // troff, man(7)

}  // namespace hgrn
