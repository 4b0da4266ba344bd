#include "model/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "model/lm.h"
#include "ops/plan_ops.h"

namespace hgrn {
namespace {

constexpr double kGiB = double(int64_t(1) << 30);
// Left free for what varies: fragmentation, another context's leftovers.
constexpr double kMarginGiB = 0.5;
// On the CPU: the program, its libraries, what BLAS packs, the allocator; measured
// (docs/planning.md). CUDA's libraries are there even where they are not used: cuBLASLt's
// relocations alone fill most of it.
#ifdef HGRN_WITH_CUDA
constexpr size_t kProcessBytes = size_t(174) << 20;
#else
constexpr size_t kProcessBytes = size_t(17) << 20;
#endif
constexpr double kDefaultMemoryGiB = 80;
constexpr int64_t kMostGpus = 512;  // of the table

int64_t act_bytes(const Config& c, bool cpu) {
  return cpu || c.train.precision == Precision::fp32 ? 4 : 2;
}

std::unique_ptr<Ops> planning_ops(const Config& c, bool cpu) {
  return make_plan_ops(act_bytes(c, cpu) == 4 ? DType::f32 : DType::bf16, cpu);
}

MemoryPlan count_memory(const Config& c, int64_t micro_batch, int64_t gpus, bool cpu) {
  const auto ops = planning_ops(c, cpu);
  LanguageModel model(*ops, c.model, c.optim.decay == DecayKind::all);
  const size_t total = size_t(model.params().total());
  const size_t shards = c.train.zero == 1 ? size_t(gpus) : 1;
  Arena state("state");
  WeightStore weights;
  weights.take(state, *ops, model.params(), /*with_grad=*/true, nullptr,
               {{0, int64_t(total / shards)}});
  Arena acts("activations");
  model.layout(
      acts, {.B = micro_batch, .T = c.data.seq_len, .train = true, .recompute = c.train.recompute});
  MemoryPlan m;
  m.rows = state.rows();
  m.peak = state.peak() + acts.peak();
  const auto add = [&](const std::string& name, size_t bytes) {
    m.rows.push_back({name, bytes});
    m.peak += bytes;
  };
  const size_t moments = 8 * total / shards;
  const std::string share = shards > 1 ? fmt::format(" (1/{} of them)", shards) : "";
  for (Arena::Row& row : m.rows)
    if (row.name == kLowerHalves) row.name += share;
  add("optimizer moments" + share, moments);
  if (gpus > 1 && c.train.reduce_dtype == ReduceDType::bf16)
    add("gradients on their way (bf16)", 2 * total);
  m.rows.insert(m.rows.end(), acts.rows().begin(), acts.rows().end());
  // A save works on copies, so that training goes on; one tensor a time is packed for its file.
  int64_t largest = 0;
  for (const Param& p : model.params().params()) largest = std::max(largest, p.shape.numel());
  m.host_save = 4 * total + moments + 4 * size_t(largest);
  if (cpu) {
    add("copies while a checkpoint is saved", m.host_save);
    add("program and libraries", kProcessBytes);
  } else {
    add("CUDA context and libraries", size_t(kContextGiB * kGiB));
  }
  return m;
}

std::map<std::string, int64_t> parameters_by_kind(const ParamTable& table) {
  std::map<std::string, int64_t> kinds;
  for (const Param& p : table.params()) {
    const auto has = [&](const char* part) { return p.name.find(part) != std::string::npos; };
    const char* kind = has("embeddings") || has("lm_head") ? "embedding and head"
                       : has("lower_bounds")               ? "lower bounds"
                       : p.shape.rank == 1                 ? "norms and biases"
                       : has(".mlp.")                      ? "GLU"
                                                           : "mixer projections";
    kinds[kind] += p.shape.numel();
  }
  return kinds;
}

ModelSize model_size(const LanguageModel& model) {
  ModelSize size;
  size.parameters = model.params().count();
  for (ParamId id = 0; id < ParamId(model.params().params().size()); ++id)
    if (model.stage_of(id) < 0) size.first += model.params().params()[size_t(id)].shape.numel();
  return size;
}

Card choose_card(const Config& c, const PlanOptions& o) {
  check((o.tflops > 0) == (o.bandwidth_gbs > 0), Exit::usage,
        "hgrn plan: --tflops and --bandwidth describe a device together; give both");
  check(o.card.empty() || o.tflops == 0, Exit::usage,
        "hgrn plan: --card and --tflops with --bandwidth name two devices; give one");
  if (o.tflops > 0) return {"device", o.tflops * 1e12, o.bandwidth_gbs * 1e9, o.tflops * 1e12, 0};
  if (o.cpu) return {"", 0, 0, 0, 0};
  std::string known;
  for (const Card& k : cards()) known += (known.empty() ? "" : ", ") + std::string(k.name);
  const Card* card = find_card(o.card.empty() ? "H100" : o.card);
  check(card != nullptr, Exit::usage,
        "hgrn plan: --card {}: {} are known; describe another with --tflops and --bandwidth",
        o.card, known);
  Card found = *card;
  if (c.train.precision == Precision::fp32) found.gemm_flops = 0;  // the rates known are of bf16
  return found;
}

std::vector<Roofline> rooflines(const Plan& p, const ModelSize& size) {
  if (p.card.gemm_flops == 0) return {};
  std::vector<Card> devices;
  if (p.options.tflops > 0)
    devices = {p.card};
  else
    devices.assign(cards().begin(), cards().end());
  const double gpus = double(p.options.gpus);
  std::vector<Roofline> rows;
  for (const Card& card : devices) {
    const auto rate = [&](double share, int64_t n) {
      return cluster_step(p.config, size, act_bytes(p.config, p.options.cpu), card, share,
                          p.options.network, n)
          .tokens_per_s;
    };
    Roofline r{card.name, gpus * rate(1, 1), rate(p.options.share, p.options.gpus), 0};
    r.mfu = 6 * double(size.parameters) * r.expected / (gpus * card.peak_flops);
    rows.push_back(r);
  }
  return rows;
}

std::vector<Saving> savings(const Plan& p, const ModelSize& size, double room) {
  std::vector<Saving> rows;
  for (const Recompute recompute : {Recompute::none, Recompute::elementwise, Recompute::block})
    for (const int64_t zero : {0, 1}) {
      if (p.options.gpus == 1 && zero == 1) continue;  // nothing to divide by
      Config c = p.config;
      c.train.recompute = recompute;
      c.train.zero = zero;
      Saving s;
      s.recompute = recompute;
      s.zero = zero;
      s.configured = recompute == p.config.train.recompute &&
                     (p.options.gpus == 1 || zero == p.config.train.zero);
      const auto bytes = [&](int64_t B) {
        return count_memory(c, B, p.options.gpus, p.options.cpu).peak;
      };
      s.peak = bytes(c.train.micro_batch);
      s.largest = largest_micro_batch(bytes, room);
      if (p.card.gemm_flops > 0)
        s.tokens_per_s = cluster_step(c, size, act_bytes(c, p.options.cpu), p.card, p.options.share,
                                      p.options.network, p.options.gpus)
                             .tokens_per_s;
      rows.push_back(s);
    }
  return rows;
}

}  // namespace

size_t planned_bytes(const Config& c, const PlanOptions& o) {
  return count_memory(c, c.train.micro_batch, o.gpus, o.cpu).peak;
}

int64_t largest_micro_batch(const std::function<size_t(int64_t)>& bytes, double room) {
  const auto fits = [&](int64_t b) { return double(bytes(b)) <= room; };
  if (!fits(1)) return 0;
  int64_t low = 1, high = 2;
  while (high < (1 << 20) && fits(high)) low = high, high *= 2;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

double parse_tokens(const std::string& text) {
  char* end = nullptr;
  double value = std::strtod(text.c_str(), &end);
  const std::string unit = end;
  const char* const units = "KMBT";
  if (unit.size() == 1)
    for (int i = 0; i < 4; ++i)
      if (std::toupper(static_cast<unsigned char>(unit[0])) == units[i])
        return parse_tokens(std::to_string(value * std::pow(1e3, i + 1)));
  check(end != text.c_str() && unit.empty() && std::isfinite(value) && value >= 1, Exit::usage,
        "hgrn plan: --tokens {}: a count such as 100B, 250M or 3e9 is expected", text);
  return value;
}

Plan make_plan(const Config& c, const PlanOptions& o) {
  Plan p;
  p.config = c;
  p.options = o;
  p.card = choose_card(c, o);
  const auto ops = planning_ops(c, o.cpu);
  const LanguageModel model(*ops, c.model, c.optim.decay == DecayKind::all);
  const ModelSize size = model_size(model);
  p.parameters = parameters_by_kind(model.params());
  p.total_parameters = size.parameters;
  p.memory = count_memory(c, c.train.micro_batch, o.gpus, o.cpu);
  p.flops_per_token = model.flops_per_token();
  p.device_memory_gib = o.device_memory_gib > 0                    ? o.device_memory_gib
                        : p.card.memory_gib > 0 && !o.card.empty() ? p.card.memory_gib
                                                                   : kDefaultMemoryGiB;
  const double room = (p.device_memory_gib - kMarginGiB) * kGiB;
  if (!o.cpu || o.device_memory_gib > 0) {
    p.savings = savings(p, size, room);
    for (const Saving& s : p.savings)
      if (s.configured) p.largest_micro_batch = s.largest;
  }
  p.rooflines = rooflines(p, size);
  p.budget_tokens = o.tokens > 0
                        ? o.tokens
                        : double(c.train.global_batch * c.data.seq_len) * double(c.train.steps);
  if (p.card.gemm_flops == 0) return p;
  const auto step = [&](int64_t gpus) {
    return cluster_step(c, size, act_bytes(c, o.cpu), p.card, o.share, o.network, gpus);
  };
  p.hours = p.budget_tokens / step(o.gpus).tokens_per_s / 3600;
  for (int64_t gpus = 1; !o.cpu && gpus <= kMostGpus; gpus *= 2)
    p.scaling.push_back({step(gpus), count_memory(c, c.train.micro_batch, gpus, false).peak});
  return p;
}

}  // namespace hgrn
