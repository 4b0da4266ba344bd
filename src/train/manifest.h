// MANIFEST.json: {"version": 1, "step": S, "files": {NAME: {"size": BYTES, "xxh3": HEX16}}}.
// Canonical text: the reader accepts only the bytes that the writer would give. Written last, so a
// folder that has one was complete; it names every file of the checkpoint.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace hgrn {

constexpr int kManifestVersion = 1;
constexpr const char* kManifestName = "MANIFEST.json";
constexpr const char* kModelFile = "model.safetensors";
constexpr const char* kConfigFile = "config.json";
constexpr const char* kTrainerFile = "trainer.json";
std::string optimizer_file(int rank, int world);  // "optimizer-00000-of-00001.safetensors"

struct Manifest {
  struct Entry {
    uint64_t size = 0, xxh3 = 0;
  };
  int64_t step = 0;
  std::map<std::string, Entry> files;  // plain names, never a path

  // Ranks that wrote optimizer files. Exit::data if one is missing or they disagree.
  int world(const std::string& where) const;
};

std::string manifest_to_json(const Manifest& manifest);
Manifest manifest_from_json(const std::string& text, const std::string& where);

// A name that stays inside its folder and cannot be taken for one of the store's hidden names.
bool is_plain_name(const std::string& name);

// Which files' checksums are compared, and so read. Evaluation needs no optimizer, which is twice
// as large as the model.
enum class Checksums { none, without_optimizer, all };

// Reads dir/MANIFEST.json and checks that all files are there with their sizes, and that the parts
// every checkpoint has are named. Checksums too if asked.
Manifest check_folder(const std::string& dir, Checksums checksums);

}  // namespace hgrn
