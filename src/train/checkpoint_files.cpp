#include "train/checkpoint_files.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <set>

#include "core/check.h"
#include "core/fault.h"
#include "core/file.h"
#include "model/safetensors.h"

namespace hgrn {
namespace {

constexpr uint64_t kMaxTrainerBytes = 64 << 20;
constexpr size_t kNamesShown = 5;

// Elements [begin, end) of one flattened parameter.
struct Slice {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

// What of a parameter lies in a range of the flat buffers. Padding is never saved.
Slice part_of(const Param& p, FlatRange range) {
  return {p.elements_before(range.begin), p.elements_before(range.end)};
}

// The same for several ranges, and the position in the whole flat buffer with which a buffer that
// holds the ranges one after another would have to start for this slice to lie where it does.
// A parameter may meet one of them only: a file keeps one slice of each.
struct Placed {
  Slice slice;
  int64_t first = 0;
};
Placed part_of(const Param& p, const std::vector<FlatRange>& ranges) {
  Placed found;
  int64_t before = 0;
  for (const FlatRange& range : ranges) {
    const Slice s = part_of(p, range);
    if (s.size() > 0) {
      check(found.slice.size() == 0, "{} lies in two ranges of one rank", p.name);
      found = {s, range.begin - before};
    }
    before += range.end - range.begin;
  }
  return found;
}

TensorInfo tensor(const std::string& name, const Shape& shape) {
  TensorInfo t;
  t.name = name;
  t.dtype = "F32";
  t.shape = shape;
  return t;
}

std::string list_names(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < std::min(names.size(), kNamesShown); ++i)
    text += (i ? ", " : "") + names[i];
  return names.size() > kNamesShown
             ? fmt::format("{} and {} more", text, names.size() - kNamesShown)
             : text;
}

// Names of the folder and of the table must be the same set.
void check_names(const ModelFolder& folder, const ParamTable& table) {
  std::vector<std::string> missing, unknown;
  for (const Param& p : table.params())
    if (!folder.find(p.name)) missing.push_back(p.name);
  for (const std::string& name : folder.names())
    if (table.find(name) == kNoParam) unknown.push_back(name);
  const auto tied_hint = [](const std::vector<std::string>& names, const char* value) {
    return names.size() == 1 && names[0] == "lm_head.weight"
               ? fmt::format("set model.tie_word_embeddings to {}", value)
               : std::string("does the config belong to these weights?");
  };
  check(missing.empty(), Exit::data, "{} lacks {} of the model's tensors: {}; {}", folder.path(),
        missing.size(), list_names(missing), tied_hint(missing, "true"));
  check(unknown.empty(), Exit::data, "{} has {} tensors that the model lacks: {}; {}",
        folder.path(), unknown.size(), list_names(unknown), tied_hint(unknown, "false"));
}

Slice parse_slice(const std::string& text, const Param& p, const std::string& where) {
  int64_t n[3] = {-1, -1, -1};
  const char *at = text.data(), *end = at + text.size();
  bool ok = true;
  for (int i = 0; i < 3 && ok; ++i) {
    const auto [next, err] = std::from_chars(at, end, n[i]);
    ok = err == std::errc() && (i == 2 ? next == end : next < end && *next == ':');
    at = next + 1;
  }
  ok = ok && 0 <= n[0] && n[0] <= n[1] && n[1] <= n[2] && n[2] == p.shape.numel();
  check(ok, Exit::data, "{}: slice.{} is \"{}\"; begin:end:{} is expected", where, p.name, text,
        p.shape.numel());
  return {n[0], n[1]};
}

// Reads one file's slices into m and v, which hold `ranges`; notes which elements it had.
void read_optimizer_file(const std::string& path, const ParamTable& table,
                         const std::vector<FlatRange>& ranges, float* m, float* v,
                         std::vector<std::vector<Slice>>& seen) {
  const SafetensorsReader file(path);
  size_t known = 0;
  for (ParamId id = 0; id < ParamId(table.params().size()); ++id) {
    const Param& p = table.params()[size_t(id)];
    const auto meta = file.metadata().find("slice." + p.name);
    if (meta == file.metadata().end()) continue;
    const Slice have = parse_slice(meta->second, p, path);
    const Placed placed = part_of(p, ranges);
    const Slice want = placed.slice;
    const Slice both{std::max(have.begin, want.begin), std::min(have.end, want.end)};
    for (auto [prefix, out] : {std::pair{"exp_avg.", m}, std::pair{"exp_avg_sq.", v}}) {
      const TensorInfo* t = file.find(prefix + p.name);
      check(t != nullptr, Exit::data, "{}: tensor {}{} is missing", path, prefix, p.name);
      check(t->shape == Shape{have.size()}, Exit::data,
            "{}: tensor {} has shape {}, its slice says ({})", path, t->name, t->shape.str(),
            have.size());
      ++known;
      if (!out || both.begin >= both.end) continue;
      std::vector<float> dense(size_t(both.size()));
      file.read_f32(*t, dense.data(), both.begin - have.begin, both.size());
      scatter(out, dense.data(), p, both.begin, both.end, placed.first);
    }
    seen[size_t(id)].push_back(have);
  }
  check(known == file.tensors().size(), Exit::data,
        "{}: {} of its {} tensors belong to no parameter of the model", path,
        file.tensors().size() - known, file.tensors().size());
}

void read_optimizer(const std::string& dir, int world, const ParamTable& table,
                    const std::vector<FlatRange>& ranges, float* m, float* v) {
  for (float* out : {m, v})
    if (out) std::memset(out, 0, size_t(total_size(ranges)) * sizeof(float));
  std::vector<std::vector<Slice>> seen(table.params().size());
  for (int r = 0; r < world; ++r)
    read_optimizer_file(dir + "/" + optimizer_file(r, world), table, ranges, m, v, seen);
  for (size_t i = 0; i < seen.size(); ++i) {
    const Param& p = table.params()[i];
    std::sort(seen[i].begin(), seen[i].end(), [](const Slice& a, const Slice& b) {
      return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    int64_t at = 0;
    for (const Slice& s : seen[i]) {
      check(s.begin == at, Exit::data, "{}: the moments of {} {} at element {}", dir, p.name,
            s.begin < at ? "overlap" : "have a hole", std::min(s.begin, at));
      at = s.end;
    }
    check(at == p.shape.numel(), Exit::data, "{}: the moments of {} end at element {} of {}", dir,
          p.name, at, p.shape.numel());
  }
}

void read_master(const ModelFolder& folder, const ParamTable& table, float* master) {
  std::memset(master, 0, size_t(table.total()) * sizeof(float));  // the padding
  std::vector<float> dense;
  for (const Param& p : table.params()) {
    dense.resize(size_t(p.shape.numel()));
    folder.read_f32(p.name, p.shape, dense.data());
    scatter(master, dense.data(), p, 0, p.shape.numel());
  }
}

// Appends elements [s.begin, s.end) of a parameter out of a flat buffer that starts at `first`.
void write_slice(SafetensorsWriter& out, const float* flat, const Param& p, Slice s,
                 int64_t first) {
  std::vector<float> dense(size_t(s.size()));
  gather(dense.data(), flat, p, s.begin, s.end, first);
  out.write(dense.data(), dense.size() * sizeof(float));
}

}  // namespace

FlatRange resolve(FlatRange range, const ParamTable& table) {
  if (range.end < 0) range.end = table.total();
  check(0 <= range.begin && range.begin <= range.end && range.end <= table.total(),
        "range [{}, {}) of {} elements", range.begin, range.end, table.total());
  return range;
}

std::vector<FlatRange> ranges_of(const Snapshot& snapshot) {
  std::vector<FlatRange> ranges = snapshot.ranges;
  if (ranges.empty()) ranges.push_back(snapshot.range);
  int64_t at = 0;
  for (FlatRange& range : ranges) {
    range = resolve(range, *snapshot.table);
    check(range.begin >= at, "ranges of moments overlap at element {}", range.begin);
    at = range.end;
  }
  return ranges;
}

Manifest::Entry write_model_file(const std::string& path, const ParamTable& table,
                                 const std::vector<float>& master) {
  check(int64_t(master.size()) == table.total(), "master weights: {} elements of {}", master.size(),
        table.total());
  std::vector<TensorInfo> tensors;
  for (const Param& p : table.params()) tensors.push_back(tensor(p.name, p.shape));
  SafetensorsWriter out(path, std::move(tensors), {{"format", "pt"}});
  for (size_t i = 0; i < table.params().size(); ++i) {
    const Param& p = table.params()[i];
    if (i == table.params().size() / 2) fault_point("save.mid-model");
    write_slice(out, master.data(), p, {0, p.shape.numel()}, 0);
  }
  out.finish();
  return {out.size(), out.hash()};
}

Manifest::Entry write_optimizer_file(const std::string& path, const Snapshot& snapshot, int rank,
                                     int world) {
  const ParamTable& table = *snapshot.table;
  const std::vector<FlatRange> ranges = ranges_of(snapshot);
  const size_t size = size_t(total_size(ranges));
  check(snapshot.m.size() == size && snapshot.v.size() == size,
        "moments: {} and {} elements for a range of {}", snapshot.m.size(), snapshot.v.size(),
        size);
  std::map<std::string, std::string> metadata = {{"rank", std::to_string(rank)},
                                                 {"world", std::to_string(world)}};
  std::vector<TensorInfo> tensors;
  for (const char* prefix : {"exp_avg.", "exp_avg_sq."}) {
    for (const Param& p : table.params()) {
      const Slice s = part_of(p, ranges).slice;
      if (s.size() == 0) continue;
      tensors.push_back(tensor(prefix + p.name, {s.size()}));
      metadata["slice." + p.name] = fmt::format("{}:{}:{}", s.begin, s.end, p.shape.numel());
    }
  }
  SafetensorsWriter out(path, std::move(tensors), metadata);
  for (const std::vector<float>* moment : {&snapshot.m, &snapshot.v}) {
    for (const Param& p : table.params()) {
      const Placed part = part_of(p, ranges);
      if (part.slice.size() == 0) continue;
      write_slice(out, moment->data(), p, part.slice, part.first);
    }
    if (moment == &snapshot.m) fault_point("save.mid-optimizer");
  }
  out.finish();
  return {out.size(), out.hash()};
}

Manifest::Entry write_text_file(const std::string& path, std::string_view text) {
  FileWriter out(path, text.size());
  out.write(text.data(), text.size());
  out.finish();
  return {out.size(), out.hash()};
}

Manifest::Entry copy_extra_file(const std::string& from, const std::string& to) {
  const uint64_t hash = copy_file_synced(from, to);
  return {file_size(to), hash};
}

int64_t verify_checkpoint(const std::string& dir, Checksums checksums) {
  const Manifest manifest = check_folder(dir, checksums);
  const std::string path = dir + "/" + kTrainerFile;
  const int64_t step = trainer_state_from_json(read_file(path, kMaxTrainerBytes), path).step;
  check(step == manifest.step, Exit::data, "{} is of step {}, its manifest of step {}", path, step,
        manifest.step);
  return step;
}

void load_checkpoint(const std::string& dir, const ParamTable& table, float* master, float* m,
                     float* v, TrainerState* state, FlatRange range) {
  load_checkpoint(dir, table, master, m, v, state, std::vector<FlatRange>{range});
}

void load_checkpoint(const std::string& dir, const ParamTable& table, float* master, float* m,
                     float* v, TrainerState* state, const std::vector<FlatRange>& wanted) {
  std::vector<FlatRange> ranges = wanted;
  for (FlatRange& range : ranges) range = resolve(range, table);
  const Manifest manifest = check_folder(dir, Checksums::none);
  if (master) load_weights(dir, table, master);
  if (m || v) read_optimizer(dir, manifest.world(dir), table, ranges, m, v);
  if (!state) return;
  const std::string path = dir + "/" + kTrainerFile;
  *state = trainer_state_from_json(read_file(path, kMaxTrainerBytes), path);
}

void load_weights(const std::string& dir, const ParamTable& table, float* master) {
  const ModelFolder folder(dir);
  check_names(folder, table);
  read_master(folder, table, master);
}

void read_weights(const std::string& dir, const ParamTable& table,
                  const std::function<void(ParamId, const float*)>& each) {
  const ModelFolder folder(dir);
  check_names(folder, table);
  int64_t most = 0;
  for (const Param& p : table.params()) most = std::max(most, p.shape.numel());
  const std::unique_ptr<float[]> values(new float[size_t(most)]);
  for (ParamId id = 0; id < ParamId(table.params().size()); ++id) {
    const Param& p = table.params()[size_t(id)];
    folder.read_f32(p.name, p.shape, values.get());
    each(id, values.get());
  }
}

}  // namespace hgrn
