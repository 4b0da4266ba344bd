// The names in RUN/checkpoints, and setting checkpoints aside: where a run goes on from an older
// checkpoint than the newest, the later ones belong to a branch that it left. They must not win
// the next resume, and must not be lost: they move to checkpoints/abandoned-K/, whole. A note,
// written first and removed last, makes this complete at every moment: while it is there, readers
// pass over what is still to move, and the next start of the run moves it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace hgrn {

// The older of two checkpoints of one step, between two renames (docs/checkpoints.md).
constexpr const char* kReplaced = ".replaced-";

bool starts_with(const std::string& s, const std::string& prefix);
std::vector<std::string> list_names(const std::string& folder);  // sorted; none if it is missing
int64_t step_of(const std::string& name);  // the step of "step-00001000"; -1 for any other name
// The same for "step-00001000" and ".replaced-step-00001000".
int64_t checkpoint_step_of(const std::string& name);

// Moves checkpoints of steps above `after`, with a copy of RUN/metrics.jsonl. Returns where they
// lie now; empty if there were none. The caller holds the run folder's lock.
std::string abandon_later(const std::string& folder, int64_t after);
// Ends what a dead process began; the same return.
std::string finish_abandoning(const std::string& folder);
// The largest step that counts: all, unless a note says otherwise.
int64_t last_step_that_counts(const std::string& folder);

}  // namespace hgrn
