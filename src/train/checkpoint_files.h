// The single files of a checkpoint folder: one function writes each, and returns what the manifest
// says about it.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "train/checkpoint.h"
#include "train/manifest.h"

namespace hgrn {

// Parameters in the table's order, fp32, without padding. `master` (total).
Manifest::Entry write_model_file(const std::string& path, const ParamTable& table,
                                 const std::vector<float>& master);

// A rank's part of the moments. Each parameter that meets the range has exp_avg.NAME and
// exp_avg_sq.NAME, 1-D slices of the flattened parameter; metadata slice.NAME = "begin:end:numel"
// in elements of it, so any number of ranks can read them again.
Manifest::Entry write_optimizer_file(const std::string& path, const Snapshot& snapshot, int rank,
                                     int world);

Manifest::Entry write_text_file(const std::string& path, std::string_view text);
Manifest::Entry copy_extra_file(const std::string& from, const std::string& to);

// The range with its end filled in, checked against the table.
FlatRange resolve(FlatRange range, const ParamTable& table);
// The snapshot's ranges, resolved and checked to be ascending.
std::vector<FlatRange> ranges_of(const Snapshot& snapshot);

}  // namespace hgrn
