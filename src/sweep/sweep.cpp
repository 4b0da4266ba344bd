#include "sweep/sweep.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <thread>

#include "core/file.h"
#include "core/log.h"
#include "launch/child.h"
#include "launch/sockets.h"
#include "model/config.h"

namespace hgrn {
namespace {

// Where runs find their place: GPUs by their id, or nothing but a number of processes.
struct Places {
  bool gpus = false;
  std::vector<std::string> ids;
};

Places find_places(const SweepOptions& o) {
  Places p;
  p.gpus = resolve_device(o.device) == Device::cuda;
  const int count = p.gpus ? cuda_device_count() : std::max(1, o.jobs);
  std::istringstream visible(
      std::getenv("CUDA_VISIBLE_DEVICES") ? std::getenv("CUDA_VISIBLE_DEVICES") : "");
  for (int i = 0; i < count; ++i) {
    std::string id;
    if (!p.gpus || !std::getline(visible, id, ',')) id = std::to_string(i);
    p.ids.push_back(id);
  }
  if (p.gpus && o.jobs > 0) p.ids.resize(std::min(p.ids.size(), size_t(o.jobs)));
  return p;
}

// The last line of a log that tells an error; its end is enough to look at.
std::string last_error(const std::string& path) {
  constexpr int64_t kTail = 1 << 16;
  const int64_t size = int64_t(file_size(path)), from = std::max<int64_t>(0, size - kTail);
  std::string text(size_t(size - from), '\0');
  const Fd fd = open_for_read(path);
  pread_exact(fd, path, text.data(), text.size(), uint64_t(from));
  const size_t at = text.rfind("error: ");
  if (at == std::string::npos) return "";
  return text.substr(at + 7, text.find('\n', at) - at - 7);
}

class Runner {
 public:
  Runner(const SweepOptions& o, const std::vector<SweepRun>& runs,
         std::vector<SweepResult>& results)
      : o_(o), runs_(runs), results_(results), places_(find_places(o)) {}
  ~Runner() {  // only after an error of our own is anything still there
    for (const Job& job : jobs_) {
      ::kill(-job.pid, SIGKILL);
      ::waitpid(job.pid, nullptr, 0);
    }
  }
  Exit run();

 private:
  struct Job {
    size_t run, place;
    pid_t pid;
    double started;
  };
  void start(size_t run, size_t place);
  void on_signal(int number);
  void reap();
  void ended(const Job& job, int status);
  std::string label(size_t run) const {
    return fmt::format("sweep: run {} of {}, {}", run + 1, runs_.size(), runs_[run].name);
  }

  const SweepOptions& o_;
  const std::vector<SweepRun>& runs_;
  std::vector<SweepResult>& results_;
  const Places places_;
  const SignalFd signals_;
  std::vector<Job> jobs_;
  bool stopping_ = false;
};

void Runner::start(size_t run, size_t place) {
  const SweepRun& r = runs_[run];
  const Fd log(::open(r.log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  check(bool(log), "{}: {}; choose another --out", r.log, std::strerror(errno));
  ChildSpec child;
  child.out = child.err = log.get();
  child.words = {
      "train", "--config", o_.config, "--out", r.dir, "--device", places_.gpus ? "cuda" : "cpu"};
  for (const std::string& s : r.overrides) child.words.insert(child.words.end(), {"--set", s});
  // A run is one rank, whatever this process is.
  child.unset = {"RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"};
  if (places_.gpus) child.set.push_back({"CUDA_VISIBLE_DEVICES", places_.ids[place]});
  const int cores = int(std::thread::hardware_concurrency());
  if (!std::getenv("OMP_NUM_THREADS"))
    child.set.push_back(
        {"OMP_NUM_THREADS", std::to_string(std::max(1, cores / int(places_.ids.size())))});
  jobs_.push_back({run, place, start_child(child), monotonic_s()});
  results_[run].state = RunState::running;
  results_[run].error.clear();
  log_info("{}: started{}", label(run),
           places_.gpus ? fmt::format(" on GPU {}", places_.ids[place]) : "");
}

void Runner::on_signal(int number) {
  if (number == SIGCHLD) return;
  if (!stopping_) log_warn("sweep: signal {}: the runs save and end", number);
  stopping_ = true;
  for (const Job& job : jobs_) ::kill(-job.pid, number == SIGHUP ? SIGTERM : number);
}

void Runner::reap() {
  for (size_t i = 0; i < jobs_.size();) {
    int status = 0;
    if (::waitpid(jobs_[i].pid, &status, WNOHANG) != jobs_[i].pid) {
      ++i;
      continue;
    }
    const Job job = jobs_[i];
    jobs_.erase(jobs_.begin() + int64_t(i));
    ::kill(-job.pid, SIGKILL);  // whatever it may have started
    ended(job, status);
  }
}

void Runner::ended(const Job& job, int status) {
  SweepResult& r = results_[job.run];
  r.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  r.seconds += monotonic_s() - job.started;
  const bool stopped = r.code == int(Exit::stopped) || (stopping_ && WIFSIGNALED(status));
  r.state = r.code == 0 ? RunState::done : stopped ? RunState::stopped : RunState::failed;
  if (r.state == RunState::failed) r.error = last_error(runs_[job.run].log);
  r = gather_result(runs_[job.run], r);
  write_results(o_.out, runs_, results_);
  if (r.state == RunState::failed)
    log_warn("{}: failed with code {}: {} ({})", label(job.run), r.code,
             r.error.empty() ? "it said no error" : r.error, runs_[job.run].log);
  else
    log_info("{}: {} at step {}, valid loss {:.4f}", label(job.run), name_of(r.state), r.step,
             r.valid_loss);
}

Exit Runner::run() {
  std::vector<size_t> waiting;
  for (size_t i = 0; i < runs_.size(); ++i)
    if (results_[i].state != RunState::done) waiting.push_back(i);
  log_info("sweep: {} runs, {} finished before; {} side by side", runs_.size(),
           runs_.size() - waiting.size(), places_.ids.size());
  std::reverse(waiting.begin(), waiting.end());
  for (;;) {
    while (const int number = signals_.next()) on_signal(number);
    reap();
    for (size_t place = 0; place < places_.ids.size() && !stopping_ && !waiting.empty(); ++place) {
      const bool taken = std::any_of(jobs_.begin(), jobs_.end(),
                                     [&](const Job& job) { return job.place == place; });
      if (taken) continue;
      start(waiting.back(), place);
      waiting.pop_back();
    }
    if (jobs_.empty() && (stopping_ || waiting.empty())) break;
    pollfd p = {signals_.get(), POLLIN, 0};
    ::poll(&p, 1, 500);
  }
  const auto any = [&](RunState s) {
    return std::any_of(results_.begin(), results_.end(),
                       [&](const SweepResult& r) { return r.state == s; });
  };
  if (stopping_ && (any(RunState::stopped) || any(RunState::pending))) return Exit::stopped;
  return any(RunState::failed) ? Exit::failed : any(RunState::stopped) ? Exit::stopped : Exit::ok;
}

// A run folder of the same name from another config must not pass for a result of this sweep.
void check_same_config(const SweepRun& run) {
  const std::string path = run.dir + "/config.json";
  if (!exists(path)) return;
  const std::vector<std::string> changed =
      forbidden_changes(read_file(path, 1 << 24), run.config_json);
  check(changed.empty(), Exit::usage,
        "{}: the run there has another {}; restore the config, or choose another --out", run.dir,
        changed.empty() ? "" : changed[0]);
}

}  // namespace

Exit run_sweep(const SweepOptions& o, const std::vector<SweepRun>& runs,
               std::vector<SweepResult>& results) {
  return Runner(o, runs, results).run();
}

Exit sweep(const SweepOptions& o, std::string& table) {
  const std::vector<SweepRun> runs = sweep_runs(o);
  check(o.slurm.empty() || !o.report, Exit::usage,
        "hgrn sweep: --slurm and --report do different things; give one");
  if (!o.report) make_dirs(o.out + "/runs"), make_dirs(o.out + "/logs");
  check(is_folder(o.out), Exit::data, "{}: no such folder; there is nothing to report", o.out);
  for (const SweepRun& run : runs) check_same_config(run);
  std::vector<SweepResult> results = read_results(o.out, runs);
  if (!o.slurm.empty()) {
    write_file_atomic(o.slurm, slurm_script(o, runs, results));
    log_info("{}: written; submit it with: sbatch {}", o.slurm, o.slurm);
    return Exit::ok;
  }
  Exit code = Exit::ok;
  if (o.report) {
    write_results(o.out, runs, results);
  } else {
    const FileLock lock(o.out);
    code = run_sweep(o, runs, results);
    write_results(o.out, runs, results);
  }
  table = results_table(runs, results);
  return code;
}

}  // namespace hgrn
