// A plan for people and for programs.
#include <nlohmann/json.hpp>

#include "model/plan.h"

namespace hgrn {
namespace {

constexpr double kGiB = double(int64_t(1) << 30);

std::string grouped(double x) {  // 44,661,244
  const std::string digits = fmt::format("{:.0f}", x);
  std::string s;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) s += ',';
    s += digits[i];
  }
  return s;
}

std::string gib(size_t bytes) {
  return fmt::format("{:.3f} GiB", double(bytes) / kGiB);
}

std::string duration(double hours) {
  if (hours < 1) return fmt::format("{:.1f} min", 60 * hours);
  return hours < 48 ? fmt::format("{:.1f} h", hours) : fmt::format("{:.1f} days", hours / 24);
}

const char* name_of(Recompute r) {
  switch (r) {
    case Recompute::none: return "none";
    case Recompute::elementwise: return "elementwise";
    case Recompute::block: return "block";
  }
  fail(Exit::failed, "plan: unknown recomputation {}", int(r));
}

class Text {
 public:
  template <class... Args>
  void head(fmt::format_string<Args...> text, Args&&... args) {
    out += fmt::format(text, std::forward<Args>(args)...) + "\n";
  }
  void row(const std::string& name, const std::string& value) {
    out += fmt::format("  {:<40} {:>18}\n", name, value);
  }
  std::string out;
};

void limits(Text& t, const Plan& p) {
  const PlanOptions& o = p.options;
  if (p.savings.empty() && p.rooflines.empty()) return;
  if (o.cpu)
    t.head("limits of the process");
  else
    t.head("limits ({} GPU{}, {:g} GiB each)", o.gpus, o.gpus == 1 ? "" : "s", p.device_memory_gib);
  if (!p.savings.empty())
    t.row("largest micro-batch that fits",
          p.largest_micro_batch > 0 ? grouped(double(p.largest_micro_batch)) : "none fits");
  if (p.rooflines.empty())
    t.head("  roofline: known of bf16 alone; describe fp32 with --tflops and --bandwidth");
  for (const Roofline& r : p.rooflines) {
    t.row(fmt::format("roofline, {}", r.name), grouped(r.tokens_per_s) + " tok/s");
    t.row(fmt::format("  at {:g} % of it, MFU {:.1f} %", 100 * o.share, 100 * r.mfu),
          grouped(r.expected) + " tok/s");
  }
}

void budget(Text& t, const Plan& p) {
  if (p.hours == 0 || p.budget_tokens == 0) return;
  const PlanOptions& o = p.options;
  t.head("{} tokens on {} {}{}", grouped(p.budget_tokens), o.gpus, p.card.name,
         o.gpus == 1 ? "" : "s");
  t.row("time", duration(p.hours));
  if (o.cpu) return;
  const double gpu_hours = p.hours * double(o.gpus);
  t.row("GPU hours", gpu_hours < 100 ? fmt::format("{:.1f}", gpu_hours) : grouped(gpu_hours));
  if (o.price > 0)
    t.row(fmt::format("cost at {:g} a GPU and hour", o.price),
          gpu_hours * o.price < 100 ? fmt::format("{:.2f}", gpu_hours * o.price)
                                    : grouped(gpu_hours * o.price));
}

void saved(Text& t, const Plan& p) {
  if (p.savings.empty()) return;
  t.head("what recomputation{} saves", p.options.gpus > 1 ? " and ZeRO" : "");
  t.head("  {:<11} {:>5} {:>14} {:>20} {:>18}", "recompute", "zero", "memory",
         "largest micro-batch", p.card.gemm_flops > 0 ? "tok/s expected" : "");
  for (const Saving& s : p.savings)
    t.head("{} {:<11} {:>5} {:>14} {:>20} {:>18}", s.configured ? '*' : ' ', name_of(s.recompute),
           s.zero, gib(s.peak), s.largest > 0 ? grouped(double(s.largest)) : "none fits",
           p.card.gemm_flops > 0 ? grouped(s.tokens_per_s) : "");
  t.head("  (* as configured)");
}

void scaling(Text& t, const Plan& p) {
  if (p.scaling.empty()) return;
  const PlanOptions& o = p.options;
  t.head(
      "{} x 1 to {}, at {:g} % of the roofline, {} a node, {:g} GB/s between GPUs of a node, "
      "{:g} GB/s from node to node",
      p.card.name, p.scaling.back().step.gpus, 100 * o.share, o.network.gpus_per_node,
      o.network.link_gbs, o.network.network_gbs);
  t.head("  {:>4} {:>5} {:>9} {:>6} {:>11} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>6}", "GPUs",
         "nodes", "sequences", "micro", "tok/s", "GiB a GPU", "GB sent", "link ms", "net ms",
         "comm ms", "shown ms", "effic.");
  for (const ScaleRow& r : p.scaling) {
    const ClusterStep& s = r.step;
    t.head(
        "  {:>4} {:>5} {:>9} {:>6} {:>11} {:>9.2f} {:>9.3f} {:>8.2f} {:>8.2f} {:>8.2f} {:>8.2f} "
        "{:>5.1f}%",
        s.gpus, s.nodes, s.sequences, s.accumulation, grouped(s.tokens_per_s),
        double(r.peak) / kGiB, s.bytes / 1e9, 1e3 * s.link_s, 1e3 * s.network_s,
        1e3 * s.collective_s, 1e3 * s.exposed_s, 100 * s.efficiency);
  }
}

}  // namespace

std::string plan_text(const Plan& p) {
  const PlanOptions& o = p.options;
  const Config& c = p.config;
  Text t;
  t.head("parameters");
  for (const auto& [kind, count] : p.parameters) t.row(kind, grouped(double(count)));
  t.row("total", grouped(double(p.total_parameters)));
  t.head("memory of one {} (micro-batch {} x {} tokens)", o.cpu ? "process" : "GPU",
         c.train.micro_batch, c.data.seq_len);
  for (const Arena::Row& r : p.memory.rows) t.row(r.name, gib(r.bytes));
  t.row("peak (scratch shares memory)", gib(p.memory.peak));
  if (!o.cpu) t.row("host memory while a checkpoint is saved", gib(p.memory.host_save));
  t.head("work");
  t.row("FLOPs a token (forward + backward)", fmt::format("{:.4g}", p.flops_per_token));
  const int64_t tokens = c.train.global_batch * c.data.seq_len;
  t.row("tokens a step", grouped(double(tokens)));
  t.row("tokens of the run", grouped(double(tokens) * double(c.train.steps)));
  limits(t, p);
  budget(t, p);
  saved(t, p);
  scaling(t, p);
  return t.out;
}

std::string plan_json(const Plan& p) {
  using Json = nlohmann::ordered_json;
  const PlanOptions& o = p.options;
  Json j;
  j["parameters"] = p.parameters;
  j["parameters"]["total"] = p.total_parameters;
  Json& memory = j["memory"];
  memory["device"] = o.cpu ? "cpu" : "gpu";
  memory["micro_batch"] = p.config.train.micro_batch;
  for (const Arena::Row& r : p.memory.rows) memory["rows"][r.name] = r.bytes;
  memory["peak_bytes"] = p.memory.peak;
  memory["host_save_bytes"] = p.memory.host_save;
  const double tokens = double(p.config.train.global_batch * p.config.data.seq_len);
  j["work"] = {{"flops_per_token", p.flops_per_token},
               {"tokens_per_step", tokens},
               {"tokens", tokens * double(p.config.train.steps)}};
  j["assumptions"] = {{"gpus", o.gpus},
                      {"device_memory_gib", p.device_memory_gib},
                      {"card", p.card.name},
                      {"gemm_flops", p.card.gemm_flops},
                      {"bytes_per_s", p.card.bytes_per_s},
                      {"roofline_share", o.share},
                      {"gpus_per_node", o.network.gpus_per_node},
                      {"link_gbs", o.network.link_gbs},
                      {"network_gbs", o.network.network_gbs},
                      {"bucket_elements", o.network.bucket_elements},
                      {"link_us", o.network.link_us},
                      {"network_us", o.network.network_us}};
  j["largest_micro_batch"] = p.largest_micro_batch;
  j["rooflines"] = Json::array();
  for (const Roofline& r : p.rooflines)
    j["rooflines"].push_back({{"card", r.name},
                              {"tokens_per_s", r.tokens_per_s},
                              {"expected_tokens_per_s", r.expected},
                              {"expected_mfu", r.mfu}});
  const double gpu_hours = p.hours * double(o.gpus);
  j["budget"] = {{"tokens", p.budget_tokens}, {"hours", p.hours}, {"gpu_hours", gpu_hours}};
  j["budget"]["cost"] = o.price > 0 ? Json(gpu_hours * o.price) : Json();
  j["savings"] = Json::array();
  for (const Saving& s : p.savings)
    j["savings"].push_back({{"recompute", name_of(s.recompute)},
                            {"zero", s.zero},
                            {"configured", s.configured},
                            {"peak_bytes", s.peak},
                            {"largest_micro_batch", s.largest},
                            {"tokens_per_s", s.tokens_per_s}});
  j["scaling"] = Json::array();
  for (const ScaleRow& r : p.scaling) {
    const ClusterStep& s = r.step;
    j["scaling"].push_back({{"gpus", s.gpus},
                            {"nodes", s.nodes},
                            {"sequences", s.sequences},
                            {"micro_batches", s.accumulation},
                            {"tokens_per_s", s.tokens_per_s},
                            {"peak_bytes", r.peak},
                            {"sent_bytes", s.bytes},
                            {"link_s", s.link_s},
                            {"network_s", s.network_s},
                            {"collective_s", s.collective_s},
                            {"exposed_s", s.exposed_s},
                            {"compute_s", s.compute_s},
                            {"efficiency", s.efficiency}});
  }
  return j.dump(2) + "\n";
}

}  // namespace hgrn
