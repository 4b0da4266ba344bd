// The registry of token mixers. A new one is one row here (docs/add_a_mixer.md).
#include "mixers/mixer.h"

namespace hgrn {

std::unique_ptr<Mixer> make_hgru2(Ops& ops, const MixerConfig& config);  // hgru2.cpp

namespace {
struct Row {
  const char* name;
  std::unique_ptr<Mixer> (*make)(Ops&, const MixerConfig&);
};
const Row kMixers[] = {
    {"hgru2", make_hgru2},
};
}  // namespace

std::vector<std::string> mixer_names() {
  std::vector<std::string> names;
  for (const Row& row : kMixers) names.push_back(row.name);
  return names;
}

std::unique_ptr<Mixer> make_mixer(std::string_view name, Ops& ops, const MixerConfig& config) {
  std::string known;
  for (const Row& row : kMixers) {
    if (name == row.name) return row.make(ops, config);
    known += std::string(known.empty() ? "" : ", ") + row.name;
  }
  fail(Exit::usage, "model.mixer: there is no mixer \"{}\"; this build has: {}", name, known);
}

}  // namespace hgrn
