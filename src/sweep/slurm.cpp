#include <filesystem>

#include "launch/child.h"
#include "sweep/sweep.h"

namespace hgrn {
namespace {

std::string shell_quoted(const std::string& word) {
  std::string q = "'";
  for (char c : word) q += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return q + "'";
}

std::string absolute(const std::string& path) {
  return std::filesystem::absolute(path).lexically_normal().string();
}

}  // namespace

// Each task is one `hgrn train`, so that a task that Slurm preempts or requeues goes on by itself.
std::string slurm_script(const SweepOptions& o, const std::vector<SweepRun>& runs,
                         const std::vector<SweepResult>& results) {
  std::string tasks, cases;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (results[i].state == RunState::done) continue;
    tasks += (tasks.empty() ? "" : ",") + std::to_string(i);
    cases += fmt::format("  {}) set -- --out {}", i, shell_quoted(absolute(runs[i].dir)));
    for (const std::string& s : runs[i].overrides) cases += " --set " + shell_quoted(s);
    cases += " ;;\n";
  }
  check(!tasks.empty(), Exit::usage, "hgrn sweep: all runs of {} are finished", o.out);
  const bool gpu = o.device != Device::cpu;
  std::string s =
      "#!/usr/bin/env bash\n# Written by hgrn sweep. Results: the same command with "
      "--report instead of --slurm.\n#SBATCH --job-name=hgrn-sweep\n";
  s += "#SBATCH --array=" + tasks;
  if (o.jobs > 0) s += fmt::format("%{}", o.jobs);
  s += "\n#SBATCH --ntasks=1\n";
  if (gpu) s += "#SBATCH --gpus=1\n";
  s += "#SBATCH --cpus-per-task=8\n#SBATCH --requeue\n#SBATCH --open-mode=append\n";
  s += "#SBATCH --signal=B:USR1@120\n";
  s += "#SBATCH --output=" + absolute(o.out) + "/logs/slurm-%A_%a.log\n";
  s += "set -uo pipefail\ncd " + shell_quoted(std::filesystem::current_path().string()) + "\n";
  s += "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}\n";
  s += "unset SLURM_PROCID\ncase $SLURM_ARRAY_TASK_ID in\n" + cases;
  s += "  *) echo \"no run has the number $SLURM_ARRAY_TASK_ID\" >&2; exit 2 ;;\nesac\n";
  s += shell_quoted(own_program()) + " train --config " + shell_quoted(absolute(o.config)) +
       " --device " +
       (o.device == Device::cpu    ? "cpu"
        : o.device == Device::cuda ? "cuda"
                                   : "auto") +
       " \"$@\" &\n";
  s += R"(run=$!
trap 'kill -USR1 $run' USR1
trap 'kill -TERM $run' TERM
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do # wait ends early when a trap runs
  wait "$run"
  code=$?
done
if [ "$code" -eq 75 ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
  exit 0
fi
exit "$code"
)";
  return s;
}

}  // namespace hgrn
