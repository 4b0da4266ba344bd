#include "train/manifest.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "core/check.h"
#include "core/file.h"
#include "core/json_text.h"

namespace hgrn {
namespace {

constexpr uint64_t kMaxManifestBytes = 64 << 20;
constexpr int kMaxWorld = 100000;  // five digits in the file name

uint64_t parse_hash(const std::string& text, const std::string& where) {
  const bool ok =
      text.size() == 16 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
  check(ok, Exit::data, "{}: \"{}\" is not an XXH3 of 16 lower-case hex digits", where, text);
  return std::stoull(text, nullptr, 16);
}

template <class Json>
const Json& field(const Json& object, const char* key, const std::string& where) {
  check(object.contains(key), Exit::data, "{}: \"{}\" is missing", where, key);
  return object[key];
}

}  // namespace

std::string optimizer_file(int rank, int world) {
  return fmt::format("optimizer-{:05d}-of-{:05d}.safetensors", rank, world);
}

bool is_plain_name(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name[0] != '.' &&
         name.find_first_of(std::string("/\0", 2)) == std::string::npos;
}

int Manifest::world(const std::string& where) const {
  int world = 0;
  for (const auto& [name, entry] : files) {
    int rank = 0, of = 0;
    if (std::sscanf(name.c_str(), "optimizer-%5d-of-%5d.safetensors", &rank, &of) != 2) continue;
    check(of > 0 && of < kMaxWorld && rank >= 0 && rank < of && name == optimizer_file(rank, of),
          Exit::data, "{}: \"{}\" is not a valid name of an optimizer file", where, name);
    check(world == 0 || world == of, Exit::data, "{}: optimizer files of {} and of {} ranks", where,
          world, of);
    world = of;
  }
  check(world > 0, Exit::data, "{}: no optimizer file is listed", where);
  for (int r = 0; r < world; ++r)
    check(files.count(optimizer_file(r, world)) > 0, Exit::data, "{}: {} is not listed", where,
          optimizer_file(r, world));
  return world;
}

std::string manifest_to_json(const Manifest& manifest) {
  nlohmann::ordered_json root, files = nlohmann::ordered_json::object();
  for (const auto& [name, entry] : manifest.files) {
    files[name]["size"] = entry.size;
    files[name]["xxh3"] = hex16(entry.xxh3);
  }
  root["version"] = kManifestVersion;
  root["step"] = manifest.step;
  root["files"] = std::move(files);
  return root.dump(2) + "\n";
}

Manifest manifest_from_json(const std::string& text, const std::string& where) {
  const nlohmann::ordered_json root = parse_json(text, where);
  check(root.is_object(), Exit::data, "{}: not a JSON object", where);
  const auto& version = field(root, "version", where);
  check(version == kManifestVersion, Exit::data,
        "{}: version {} where {} is known; a newer program wrote it", where, version.dump(),
        int(kManifestVersion));
  const auto& step = field(root, "step", where);
  check(step.is_number_unsigned() && step.get<uint64_t>() <= uint64_t(INT64_MAX), Exit::data,
        "{}: \"step\" is not a count", where);
  const auto& files = field(root, "files", where);
  check(files.is_object(), Exit::data, "{}: \"files\" is not an object", where);
  Manifest manifest;
  manifest.step = step.get<int64_t>();
  for (const auto& [name, value] : files.items()) {
    check(is_plain_name(name), Exit::data, "{}: \"{}\" is not a plain file name", where, name);
    const std::string what = where + ": " + name;
    check(value.is_object(), Exit::data, "{}: not an object", what);
    const auto& size = field(value, "size", what);
    const auto& hash = field(value, "xxh3", what);
    check(size.is_number_unsigned() && hash.is_string(), Exit::data,
          "{}: \"size\" is not a count or \"xxh3\" not a string", what);
    manifest.files[name] = {size.get<uint64_t>(), parse_hash(hash.get<std::string>(), what)};
  }
  // The checksums protect the other files, this the manifest: no changed byte passes.
  check(manifest_to_json(manifest) == text, Exit::data,
        "{}: the text is not what this program writes; it was damaged or edited", where);
  return manifest;
}

Manifest check_folder(const std::string& dir, Checksums checksums) {
  const std::string path = dir + "/" + kManifestName;
  check(exists(path), Exit::data,
        "{} is missing: {} is not a complete checkpoint; name a complete one or its run folder",
        path, dir);
  const Manifest manifest = manifest_from_json(read_file(path, kMaxManifestBytes), path);
  for (const char* needed : {kModelFile, kConfigFile, kTrainerFile})
    check(manifest.files.count(needed) > 0, Exit::data, "{}: {} is not listed", path, needed);
  manifest.world(path);
  for (const auto& [name, entry] : manifest.files) {
    const std::string file = dir + "/" + name;
    check(exists(file), Exit::data, "{} is missing", file);
    const uint64_t size = file_size(file);
    check(size == entry.size, Exit::data, "{} has {} bytes, its manifest says {}", file, size,
          entry.size);
  }
  if (checksums == Checksums::none) return manifest;
  for (const auto& [name, entry] : manifest.files) {
    const bool optimizer = name.rfind("optimizer-", 0) == 0;
    if (optimizer && checksums == Checksums::without_optimizer) continue;
    const std::string file = dir + "/" + name;
    const uint64_t hash = xxh3_file(file);
    check(hash == entry.xxh3, Exit::data, "{} is damaged: XXH3 {}, its manifest says {}", file,
          hex16(hash), hex16(entry.xxh3));
  }
  return manifest;
}

}  // namespace hgrn
