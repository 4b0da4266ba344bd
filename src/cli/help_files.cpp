#include "cli/help_files.h"

#include <CLI/CLI.hpp>
#include <map>
#include <vector>

#include "core/version.h"

namespace hgrn {
namespace {

struct Flag {
  std::string name, text, value;  // "--config", ..., "KEY=VALUE" or "FILE"; empty: takes none
  std::string initial;            // its default
  bool required = false;
};

// Values that a flag has where they are few; CLI11's checks do not tell them.
const std::map<std::string, std::string> kChoices = {
    {"--device", "auto cpu cuda"},
    {"--protocol", "blocks carry lines"},
    {"--task", "lambada hellaswag piqa winogrande arc_easy arc_challenge openbookqa"},
    {"--card", "H100 H200 A100"},
    {"--resume", "auto never"},
};

std::string choices_of(const Flag& f) {
  const auto it = kChoices.find(f.name);
  return it == kChoices.end() ? "" : it->second;
}

std::vector<Flag> flags_of(const CLI::App& app) {
  std::vector<Flag> flags;
  for (const CLI::Option* o : app.get_options()) {
    if (o->get_lnames().empty()) continue;  // files and the like
    Flag f;
    f.name = "--" + o->get_lnames()[0];
    f.text = o->get_description();
    if (o->get_items_expected_max() > 0)
      f.value = o->get_type_name().empty() ? "VALUE" : o->get_type_name();
    // "TEXT:INT in [1 - 4096]" and the like: the first word says enough.
    f.value = f.value.substr(0, f.value.find_first_of(": "));
    f.initial = o->get_default_str();
    f.required = o->get_required();
    flags.push_back(f);
  }
  return flags;
}

std::vector<const CLI::App*> commands_of(const CLI::App& root) {
  std::vector<const CLI::App*> shown;
  for (const CLI::App* c : root.get_subcommands([](const CLI::App*) { return true; }))
    if (!c->get_group().empty()) shown.push_back(c);  // those without a group are hidden
  return shown;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
  return text;
}

std::string names_of(const CLI::App& app) {
  std::string names;
  for (const Flag& f : flags_of(app)) names += (names.empty() ? "" : " ") + f.name;
  return names;
}

// ---- troff

std::string troff(const std::string& text) {  // no line of it may be taken for a request
  std::string s = replaced(replaced(text, "\\", "\\e"), "-", "\\-");
  if (!s.empty() && (s[0] == '.' || s[0] == '\'')) s = "\\&" + s;
  return replaced(replaced(s, "\n.", "\n\\&."), "\n'", "\n\\&'");
}

std::string troff_flags(const CLI::App& app) {
  std::string out;
  for (const Flag& f : flags_of(app)) {
    out += ".TP\n\\fB" + troff(f.name) + "\\fR";
    if (!f.value.empty()) out += " \\fI" + troff(f.value) + "\\fR";
    out += "\n" + troff(f.text);
    if (!f.initial.empty()) out += ". Default: " + troff(f.initial);
    if (f.required) out += ". Required";
    out += ".\n";
  }
  return out;
}

}  // namespace

std::string bash_completion(const CLI::App& root) {
  std::string commands, cases, values;
  for (const CLI::App* c : commands_of(root)) {
    commands += (commands.empty() ? "" : " ") + c->get_name();
    cases += "    " + c->get_name() + ") flags=\"" + names_of(*c) + "\" ;;\n";
  }
  for (const auto& [flag, words] : kChoices)
    values +=
        "    " + flag + ") COMPREPLY=($(compgen -W \"" + words + "\" -- \"$word\")); return ;;\n";
  return "# bash completion of hgrn, made by `hgrn completion bash`\n_hgrn() {\n"
         "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command= "
         "flags= i\n"
         "  COMPREPLY=()\n"
         "  if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
         "    COMPREPLY=($(compgen -W \"" +
         commands +
         " --help --version\" -- \"$word\"))\n"
         "    return\n  fi\n"
         "  case $before in\n" +
         values +
         "  esac\n"
         "  command=${COMP_WORDS[1]}\n"
         "  if [ \"$command\" = launch ]; then # what follows -- is a command of its own\n"
         "    for ((i = 2; i < COMP_CWORD; ++i)); do\n"
         "      [ \"${COMP_WORDS[i]}\" = -- ] && command=${COMP_WORDS[i+1]}\n"
         "    done\n  fi\n"
         "  case $command in\n" +
         cases +
         "  esac\n"
         "  if [[ $word == -* ]]; then\n"
         "    COMPREPLY=($(compgen -W \"$flags\" -- \"$word\"))\n"
         "  else\n"
         "    COMPREPLY=($(compgen -f -- \"$word\"))\n"
         "    compopt -o filenames 2>/dev/null\n"
         "  fi\n}\ncomplete -F _hgrn hgrn\n";
}

std::string zsh_completion(const CLI::App& root) {
  const auto plain = [](const std::string& s) {  // within '...' of an _arguments specification
    return replaced(replaced(replaced(replaced(s, "'", "'\\''"), "[", "\\["), "]", "\\]"), ":",
                    "\\:");
  };
  std::string commands, cases;
  for (const CLI::App* c : commands_of(root)) {
    commands += "    '" + c->get_name() + ":" + plain(c->get_description()) + "'\n";
    cases += "    " + c->get_name() + ")\n      _arguments -S";
    for (const Flag& f : flags_of(*c)) {
      cases +=
          " \\\n        '*" + f.name + (f.value.empty() ? "" : "=") + "[" + plain(f.text) + "]";
      if (!f.value.empty())
        cases += ":" + f.value + ":" +
                 (choices_of(f).empty() ? std::string("_files") : "(" + choices_of(f) + ")");
      cases += "'";
    }
    cases += " \\\n        '*:file:_files' ;;\n";
  }
  return "#compdef hgrn\n# made by `hgrn completion zsh`\n_hgrn() {\n  local -a commands=(\n" +
         commands +
         "  )\n  if (( CURRENT == 2 )); then\n    _describe command commands\n"
         "    return\n  fi\n  local command=$words[2]\n  shift words\n  (( CURRENT-- ))\n"
         "  case $command in\n" +
         cases + "  esac\n}\n_hgrn \"$@\"\n";
}

std::string fish_completion(const CLI::App& root) {
  const auto plain = [](const std::string& s) {
    return "'" + replaced(replaced(s, "\\", "\\\\"), "'", "\\'") + "'";
  };
  std::string out = "# made by `hgrn completion fish`\n";
  for (const CLI::App* c : commands_of(root)) {
    out += "complete -c hgrn -n __fish_use_subcommand -f -a " + c->get_name() + " -d " +
           plain(c->get_description()) + "\n";
    for (const Flag& f : flags_of(*c)) {
      out += "complete -c hgrn -n '__fish_seen_subcommand_from " + c->get_name() + "' -l " +
             f.name.substr(2) + " -d " + plain(f.text);
      if (!choices_of(f).empty())
        out += " -x -a '" + choices_of(f) + "'";
      else if (!f.value.empty())
        out += " -r";
      out += "\n";
    }
  }
  return out;
}

std::string man_page(const CLI::App& root) {
  std::string number = version();
  number = number.substr(0, number.find(' '));
  std::string out = ".TH HGRN 1 \"\" \"hgrn " + number +
                    "\" \"User Commands\"\n.SH NAME\nhgrn \\- trainer for HGRN2 language models\n"
                    ".SH SYNOPSIS\n.B hgrn\n.I COMMAND\n[\\fIFLAGS\\fR]\n.SH DESCRIPTION\n"
                    "Pretrains, evaluates and samples HGRN2 language models (arXiv 2404.07904) on "
                    "CPUs and NVIDIA GPUs. Flags are written with \\- or _.\n.SH COMMANDS\n";
  for (const CLI::App* c : commands_of(root)) {
    out +=
        ".SS hgrn " + c->get_name() + "\n" + troff(c->get_description()) + ".\n" + troff_flags(*c);
    std::string example = c->get_footer();
    const std::string head = "Example:\n";
    if (example.rfind(head, 0) == 0) example.erase(0, head.size());
    if (!example.empty()) out += ".PP\nExample:\n.PP\n.EX\n" + troff(example) + "\n.EE\n";
  }
  out +=
      ".SH EXIT STATUS\n"
      ".TP\n0\nDone.\n.TP\n1\nFailed while running.\n.TP\n2\nWrong usage, flag or config.\n"
      ".TP\n3\nA file is missing, damaged or does not match.\n"
      ".TP\n4\nLoss or gradient not finite, and train.on_nonfinite is abort.\n"
      ".TP\n75\nStopped by a signal after saving: run again to go on.\n"
      ".SH ENVIRONMENT\n"
      ".TP\nOMP_NUM_THREADS\nThreads of the CPU backend.\n"
      ".TP\nNO_COLOR\nNo colours on a terminal.\n"
      ".TP\nRANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT\n"
      "Which rank of a run this is, as torchrun and hgrn launch set them.\n"
      ".SH SEE ALSO\nThe documentation in the folder share/doc/hgrn of the installation.\n";
  return out;
}

}  // namespace hgrn
