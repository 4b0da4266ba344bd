#include "eval/loglikelihood.h"

#include <algorithm>
#include <numeric>
#include <span>

#include "eval/padded_rows.h"

namespace hgrn {
namespace {

constexpr int64_t kMaxRows = 128;
constexpr int64_t kStateBytes = int64_t(1) << 30;  // of all rows' states, twice

// Pairs [first, first + count) have one context.
struct Group {
  size_t first, count;
};

class Scorer {
 public:
  Scorer(LanguageModel& model, const std::vector<ContextPair>& pairs, int64_t tokens_at_once)
      : model_(model), ops_(model.ops()), pairs_(pairs), scores_(pairs.size()) {
    const bool gpu = ops_.peak_flops() > 0;
    tokens_ = tokens_at_once > 0 ? tokens_at_once : gpu ? 16384 : 2048;
    model_.prepare({.B = 1, .T = 1, .state = true});
    const int64_t row_bytes = int64_t(model_.state().bytes());
    rows_ = std::clamp<int64_t>(kStateBytes / row_bytes, 1, std::min(kMaxRows, tokens_));
    model_.prepare({.B = rows_, .T = tokens_ / rows_, .state = true, .likeliest = true});
    tokens_ = tokens_ / rows_ * rows_;
    kept_ = model_.state();
    kept_.data = ops_.alloc(kept_.bytes(), "states of contexts");
  }
  ~Scorer() { ops_.free(kept_.data); }
  Scorer(const Scorer&) = delete;
  Scorer& operator=(const Scorer&) = delete;

  std::vector<PairScore> run();

 private:
  void contexts(const std::vector<Group>& batch);
  void continuations(const std::vector<std::pair<size_t, int64_t>>& rows);
  void copy_state(Tensor to, int64_t to_row, Tensor from, int64_t from_row);
  const std::vector<int32_t>& context(const Group& g) const { return pairs_[g.first].context; }

  LanguageModel& model_;
  Ops& ops_;
  const std::vector<ContextPair>& pairs_;
  std::vector<PairScore> scores_;
  int64_t tokens_ = 0, rows_ = 0;
  Tensor kept_;  // as the model's state: those after the contexts of a batch
};

std::vector<PairScore> Scorer::run() {
  std::vector<Group> groups;
  for (size_t i = 0; i < pairs_.size(); ++i) {
    check(!pairs_[i].context.empty() && !pairs_[i].continuation.empty(),
          "a continuation and its context have at least one token each");
    if (groups.empty() || pairs_[i].context != context(groups.back())) groups.push_back({i, 0});
    ++groups.back().count;
  }
  // Contexts of like length together: little padding.
  std::stable_sort(groups.begin(), groups.end(), [&](const Group& a, const Group& b) {
    return context(a).size() > context(b).size();
  });
  for (size_t at = 0; at < groups.size(); at += size_t(rows_)) {
    const std::vector<Group> batch(
        groups.begin() + int64_t(at),
        groups.begin() + int64_t(std::min(groups.size(), at + size_t(rows_))));
    contexts(batch);
    std::vector<std::pair<size_t, int64_t>> rows;  // pair, its context's row
    for (size_t g = 0; g < batch.size(); ++g)
      for (size_t i = 0; i < batch[g].count; ++i) rows.emplace_back(batch[g].first + i, g);
    for (size_t first = 0; first < rows.size(); first += size_t(rows_))
      continuations({rows.begin() + int64_t(first),
                     rows.begin() + int64_t(std::min(rows.size(), first + size_t(rows_)))});
  }
  return std::move(scores_);
}

// Leaves in kept_ the states before each context's last token, which is the first input of what
// follows it.
void Scorer::contexts(const std::vector<Group>& batch) {
  std::vector<std::span<const int32_t>> before_last;
  for (const Group& g : batch) before_last.emplace_back(context(g).data(), context(g).size() - 1);
  PaddedRows rows(std::move(before_last));
  model_.zero_state();
  const int64_t B = rows.count(), segment = tokens_ / B;
  for (int64_t at = 0; at < rows.longest(); at += segment) {
    const int64_t T = std::min(segment, rows.longest() - at);
    rows.lay_out(at, T);
    model_.advance({B, T, rows.inputs.data(), nullptr, rows.reset.data()});
  }
  ops_.copy(kept_, model_.state());
}

void Scorer::copy_state(Tensor to, int64_t to_row, Tensor from, int64_t from_row) {
  const int64_t L = to.shape[0], B = to.shape[1];
  const Shape rows = {L * B, to.numel() / (L * B)};
  for (int64_t l = 0; l < L; ++l)
    ops_.copy(to.view(rows).slice(l * B + to_row, 1), from.view(rows).slice(l * B + from_row, 1));
}

void Scorer::continuations(const std::vector<std::pair<size_t, int64_t>>& rows) {
  const int64_t B = int64_t(rows.size());
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) {
    copy_state(model_.state(), b, kept_, rows[size_t(b)].second);
    const ContextPair& p = pairs_[rows[size_t(b)].first];
    longest = std::max(longest, int64_t(p.continuation.size()));
    scores_[rows[size_t(b)].first].likeliest = true;
  }
  const int64_t segment = tokens_ / B;
  std::vector<int32_t> inputs, targets, likeliest;
  std::vector<uint8_t> reset;
  std::vector<float> nll;
  for (int64_t at = 0; at < longest; at += segment) {
    const int64_t T = std::min(segment, longest - at);
    inputs.assign(size_t(B * T), 0);
    targets.assign(size_t(B * T), -1);
    reset.assign(size_t(B * T), 0);
    for (int64_t b = 0; b < B; ++b) {
      const ContextPair& p = pairs_[rows[size_t(b)].first];
      const int64_t end = std::min(T, int64_t(p.continuation.size()) - at);
      for (int64_t t = 0; t < end; ++t) {
        inputs[size_t(b * T + t)] =
            at + t == 0 ? p.context.back() : p.continuation[size_t(at + t - 1)];
        targets[size_t(b * T + t)] = p.continuation[size_t(at + t)];
      }
      // Of a context of one token kept_ has nothing but padding.
      if (at == 0 && p.context.size() == 1) reset[size_t(b * T)] = 1;
    }
    const Tensor out = model_.forward({B, T, inputs.data(), targets.data(), reset.data()});
    nll.resize(size_t(B * T));
    likeliest.resize(size_t(B * T));
    ops_.download(nll.data(), out);
    ops_.download(likeliest.data(), model_.likeliest(B * T));
    for (int64_t b = 0; b < B; ++b) {
      PairScore& s = scores_[rows[size_t(b)].first];
      for (int64_t t = 0; t < T; ++t) {
        const size_t i = size_t(b * T + t);
        if (targets[i] < 0) continue;
        s.nll.push_back(nll[i]);
        s.loglik -= double(nll[i]);
        s.likeliest = s.likeliest && likeliest[i] == targets[i];
      }
    }
  }
}

}  // namespace

std::vector<PairScore> loglikelihoods(LanguageModel& model, const std::vector<ContextPair>& pairs,
                                      int64_t tokens_at_once) {
  if (pairs.empty()) return {};
  return Scorer(model, pairs, tokens_at_once).run();
}

}  // namespace hgrn
