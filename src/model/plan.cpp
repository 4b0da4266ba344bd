#include "model/plan.h"

#include <algorithm>
#include <map>
#include <vector>

#include "model/lm.h"
#include "ops/plan_ops.h"

namespace hgrn {
namespace {

constexpr double kGiB = double(int64_t(1) << 30);
// Left free for what varies: fragmentation, another context's leftovers.
constexpr double kMarginGiB = 0.5;

constexpr Card kCards[] = {{"H100", 798e12, 3.0e12}, {"H200", 798e12, 4.3e12}};

struct Memory {
  std::vector<Arena::Row> rows;
  size_t total = 0;
};

Memory count_memory(const Config& c, int64_t micro_batch, const PlanOptions& o) {
  const DType act = o.cpu || c.train.precision == Precision::fp32 ? DType::f32 : DType::bf16;
  const auto ops = make_plan_ops(act, o.cpu);
  LanguageModel model(*ops, c.model, c.optim.decay == DecayKind::all);
  Memory m;
  Arena state("state");
  WeightStore weights;
  weights.take(state, *ops, model.params(), /*with_grad=*/true);
  const size_t moments = 2 * size_t(model.params().total()) * 4;
  const int64_t shards = c.train.zero == 1 ? o.gpus : 1;
  Arena acts("activations");
  model.layout(
      acts, {.B = micro_batch, .T = c.data.seq_len, .train = true, .recompute = c.train.recompute});
  m.rows = state.rows();
  m.rows.push_back({shards > 1 ? fmt::format("optimizer moments (1/{} of them)", shards)
                               : std::string("optimizer moments"),
                    moments / size_t(shards)});
  m.rows.insert(m.rows.end(), acts.rows().begin(), acts.rows().end());
  const size_t context = o.cpu ? 0 : size_t(kContextGiB * kGiB);
  if (context > 0) m.rows.push_back({"CUDA context and libraries", context});
  m.total = state.peak() + moments / size_t(shards) + acts.peak() + context;
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

// Seconds a token that a card's arithmetic and memory bandwidth allow, nothing overlapped: GEMMs at
// the measured GEMM rate, and the bytes that the operations between them must move.
double roofline_seconds(const Config& c, const LanguageModel& model, const Card& card) {
  const double L = double(c.model.num_hidden_layers), D = double(c.model.hidden_size);
  const double F = double(c.model.intermediate_size), V = double(c.model.vocab_size);
  const double n = double(c.model.expand_ratio), H = D / n;
  const double P = double(model.params().count());
  const double batch_tokens = double(c.train.global_batch * c.data.seq_len);
  const double micro_tokens = double(c.train.micro_batch * c.data.seq_len);
  const double gemm = model.flops_per_token() - 3 * L * 4 * D * n;
  const double state = 2 * n * n / 64;  // bytes a token and head for the saved chunk states
  const double recurrence = L * H * ((8 * n + state) + (14 * n + state));
  const double norms = L * (24 * D + 10 * D) + 24 * D;
  const double glu = L * 16 * F, cross_entropy = 4 * V;
  const double update = 34 * P / batch_tokens + 8 * P / micro_tokens;
  return gemm / card.gemm_flops +
         (recurrence + norms + glu + cross_entropy + update) / card.bytes_per_s;
}

std::string grouped(int64_t n) {  // 44,661,244
  const std::string digits = std::to_string(n);
  std::string s;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) s += ',';
    s += digits[i];
  }
  return s;
}

}  // namespace

std::span<const Card> cards() {
  return kCards;
}

size_t planned_bytes(const Config& c, const PlanOptions& o) {
  return count_memory(c, c.train.micro_batch, o).total;
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

std::string plan_text(const Config& c, const PlanOptions& o) {
  const auto ops = make_plan_ops(o.cpu ? DType::f32 : DType::bf16, o.cpu);
  const LanguageModel model(*ops, c.model, c.optim.decay == DecayKind::all);
  std::string out = "parameters\n";
  auto row = [&](const std::string& name, const std::string& value) {
    out += fmt::format("  {:<36} {:>18}\n", name, value);
  };
  for (const auto& [kind, count] : parameters_by_kind(model.params())) row(kind, grouped(count));
  row("total", grouped(model.params().count()));

  const Memory m = count_memory(c, c.train.micro_batch, o);
  out += fmt::format("memory of one {} (micro-batch {} x {} tokens)\n", o.cpu ? "process" : "GPU",
                     c.train.micro_batch, c.data.seq_len);
  for (const Arena::Row& r : m.rows) row(r.name, fmt::format("{:.3f} GiB", double(r.bytes) / kGiB));
  row("peak (scratch shares memory)", fmt::format("{:.3f} GiB", double(m.total) / kGiB));

  out += "work\n";
  row("FLOPs a token (forward + backward)", fmt::format("{:.4g}", model.flops_per_token()));
  const int64_t tokens = c.train.global_batch * c.data.seq_len;
  row("tokens a step", grouped(tokens));
  row("tokens of the run", grouped(tokens * c.train.steps));

  if (o.cpu) return out;
  out += fmt::format("limits ({} GPU{}, {:g} GiB each)\n", o.gpus, o.gpus == 1 ? "" : "s",
                     o.device_memory_gib);
  const int64_t largest =
      largest_micro_batch([&](int64_t b) { return count_memory(c, b, o).total; },
                          (o.device_memory_gib - kMarginGiB) * kGiB);
  row("largest micro-batch that fits", largest > 0 ? grouped(largest) : "none fits");
  for (const Card& card : kCards) {
    const double rate = double(o.gpus) / roofline_seconds(c, model, card);
    row(fmt::format("roofline, {}", card.name), fmt::format("{} tok/s", grouped(int64_t(rate))));
  }
  return out;
}

}  // namespace hgrn
