// What the fuzzers feed, one function a format. The fuzzers (CMakeLists.txt here) and the test that
// replays the corpus share them. An input may be refused with Exit::data; anything else that is
// thrown, and any broken invariant, is a finding.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/file.h"
#include "model/safetensors.h"
#include "train/checkpoint.h"
#include "train/manifest.h"

namespace hgrn::fuzz {

inline void require(bool ok) {
  if (!ok) std::abort();
}

template <class F>
void refuse_or(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    require(e.code() == Exit::data);
  }
}

// A whole file: opened, and every tensor read.
inline void safetensors(const uint8_t* data, size_t size) {
  const Fd fd(::memfd_create("fuzz", 0));
  require(bool(fd) && ::write(fd.get(), data, size) == ssize_t(size));
  refuse_or([&] {
    const SafetensorsReader in("/proc/self/fd/" + std::to_string(fd.get()));
    uint64_t at = 0;
    for (const TensorInfo& t : in.tensors()) {
      require(t.begin == at && t.end >= t.begin && in.find(t.name) == &t);
      at = t.end;
      std::vector<char> bytes(size_t(t.end - t.begin));
      in.read_raw(t, bytes.data());
      if (safetensors_dtype_size(t.dtype) == 0) continue;
      std::vector<double> values(size_t(t.shape.numel()));
      refuse_or([&] { in.read_f64(t, values.data()); });
    }
    require(at <= size);
  });
}

inline void manifest(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  refuse_or([&] {
    const Manifest m = manifest_from_json(text, "fuzz");
    require(manifest_to_json(m) == text && m.step >= 0);
    for (const auto& [name, entry] : m.files)
      require(is_plain_name(name) && name.find('/') == std::string::npos && name != "..");
    require(m.world("fuzz") > 0);
  });
}

inline void trainer_state(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  refuse_or([&] {
    const TrainerState s = trainer_state_from_json(text, "fuzz");
    const std::string once = trainer_state_to_json(s);
    require(trainer_state_to_json(trainer_state_from_json(once, "fuzz")) == once);
  });
}

}  // namespace hgrn::fuzz
