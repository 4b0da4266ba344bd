#include "model/lm.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace hgrn {
namespace {

// Logits exist in row slices of at most this size: (N,V) never exists whole. Each slice adds to the
// whole gradient of the table, which for few rows is most of its work: 1600 MiB are about 16,000
// rows of a vocabulary of 50,000. `spare`: memory is not short. HGRN_LOGIT_MIB in the environment
// is another size, for measurements.
int64_t logit_bytes(int64_t free, bool spare) {
  const char* const set = std::getenv("HGRN_LOGIT_MIB");
  if (set) return std::max<int64_t>(1, std::atoll(set)) << 20;
  return std::max(free, int64_t(spare ? 1600 : 512) << 20);
}

MixerConfig mixer_config(const ModelConfig& m, bool decay_all) {
  const bool fairseq = m.initializer == InitKind::fairseq;
  const double fan_in = 1 / std::sqrt(double(m.hidden_size));
  MixerConfig c;
  c.D = m.hidden_size;
  c.L = m.num_hidden_layers;
  c.n = m.expand_ratio;
  c.use_lower_bound = m.use_lower_bound;
  c.bias = m.bias;
  c.norm = m.norm;
  c.norm_eps = float(ModelConfig::kOutputNormEps);
  c.output_act = m.output_activation;
  c.input_act = m.input_activation;
  c.query_scale =
      m.query_scale == QueryScale::rsqrt ? float(1 / std::sqrt(double(m.expand_ratio))) : 1.0f;
  c.linear_init = fairseq ? Init::uniform : Init::normal;
  c.linear_init_scale = fairseq ? fan_in : m.initializer_range;
  c.bias_init = fairseq ? Init::uniform : Init::zeros;
  c.bias_init_scale = fairseq ? fan_in : 0;
  c.gamma_init = fairseq ? Init::ones : Init::zeros;
  c.decay_all = decay_all;
  return c;
}

int64_t padded(int64_t v, int64_t multiple) {
  return (v + multiple - 1) / multiple * multiple;
}

}  // namespace

LanguageModel::LanguageModel(Ops& ops, const ModelConfig& config, bool decay_all)
    : ops_(ops), config_(config), mixer_config_(mixer_config(config, decay_all)) {
  mixer_ = make_mixer(config_.mixer, ops_, mixer_config_);
  const int64_t D = config_.hidden_size, V = config_.vocab_size;
  const int64_t Vp = padded(V, ops_.vocab_multiple());
  const bool fairseq = config_.initializer == InitKind::fairseq;
  const double scale = fairseq ? 1 / std::sqrt(double(D)) : config_.initializer_range;
  auto matrix = [&](const char* name) {
    return table_.add({.name = name,
                       .shape = {V, D},
                       .init = Init::normal,
                       .init_scale = scale,
                       .stored = {Vp, D}});
  };
  auto vector = [&](const char* name, Init init) {
    return table_.add({.name = name,
                       .shape = {D},
                       .init = init,
                       .decay = mixer_config_.decay_of(/*matrix=*/false),
                       .read_as = ReadAs::master});
  };
  embedding_ = matrix("model.embeddings.weight");
  mixer_->add_shared_params(table_);
  blocks_.reserve(size_t(config_.num_hidden_layers));
  for (int l = 0; l < int(config_.num_hidden_layers); ++l) {
    blocks_.emplace_back(ops_, config_, *mixer_, l);
    blocks_.back().add_params(table_, mixer_config_);
  }
  norm_ = vector("model.norm.weight", Init::ones);
  if (config_.norm == Norm::layer) norm_bias_ = vector("model.norm.bias", Init::zeros);
  head_ = config_.tie_word_embeddings ? embedding_ : matrix("lm_head.weight");
  table_.finalize();
  stages_.resize(blocks_.size() + 2);
  for (ParamId id = 0; id < ParamId(table_.params().size()); ++id)
    stages_[size_t(stage_of(id) + 1)].push_back(id);
}

LanguageModel::~LanguageModel() {
  release();
}

void LanguageModel::release() {
  recorded_.clear();
  if (!memory_) return;
  ops_.use_scratch({});
  ops_.free(memory_);
  memory_ = nullptr;
}

int64_t LanguageModel::logit_rows(int64_t N, bool train, Recompute recompute) const {
  const auto act = int64_t(size_of(ops_.act_dtype()));
  const int64_t row = padded(config_.vocab_size, ops_.vocab_multiple()) * act;
  // In training they lie where the GLU's gradients will, 3 (N,F); a little more may save a slice.
  constexpr int64_t kMore = int64_t(32) << 20;
  const int64_t free = train ? 3 * N * Block::stored_width(ops_, config_) * act + kMore : 0;
  // In bf16: only tensor cores are so fast that adding up shows.
  const bool spare = train && recompute == Recompute::none && ops_.act_dtype() == DType::bf16;
  const int64_t most = std::max<int64_t>(128, logit_bytes(free, spare) / row / 128 * 128);
  // Slices of one size: a short last one would make products of poor shape.
  const int64_t slices = (N + most - 1) / most;
  return std::min(N, padded((N + slices - 1) / slices, 128));
}

void LanguageModel::layout(Arena& arena, const LmShape& shape) {
  shape_ = shape;
  const int64_t N = shape.B * shape.T, D = config_.hidden_size, L = config_.num_hidden_layers;
  const int64_t Vp = padded(config_.vocab_size, ops_.vocab_multiple());
  const DType act = ops_.act_dtype(), stat = ops_.stat_dtype();
  const bool recompute = shape.recompute == Recompute::block;
  const bool again = shape.train && shape.recompute == Recompute::elementwise;
  per_layer_ = shape.train && !recompute;
  const int sets = per_layer_ ? int(L) : 1;

  tokens_ = arena.take("tokens", {N}, DType::i32);
  targets_ = arena.take("tokens", {N}, DType::i32);
  reset_ = arena.take("tokens", {N}, DType::u8);
  clock_ = arena.take("tokens", {2 * int64_t(sizeof(int64_t))}, DType::u8);
  order_ = {};
  if (const int64_t size = shape.train ? ops_.embedding_order_size(N, Vp, D) : 0)
    order_ = arena.take("tokens", {size}, DType::i32);
  mixer_->take_shared(arena);
  acts_.clear();
  resid1_.clear();
  state_ = {};
  for (int s = 0; s < sets; ++s) {
    acts_.push_back(Block::take_acts(arena, ops_, config_, N, /*with_resid1=*/false, again));
    mixer_->take_acts(arena, s, shape.B, shape.T, shape.train, again);
  }
  for (int64_t l = 0; l < (shape.train ? L : 1); ++l)
    resid1_.push_back(arena.take("residual stream", {N, D}, act));
  // Between forward passes and until backward starts, its gradient's place is free for a branch.
  const bool own_branch =
      !shape.train || (recompute && (config_.dropout > 0 || !mixer_->adds_residual()));
  if (own_branch) branch_ = arena.take("branch", {N, D}, act);
  resid_ = arena.take("residual stream", {N, D}, act);
  normed_ = arena.take("normed inputs", {N, D}, act);
  stats_ = arena.take("norm statistics", {N, 2}, stat);
  nll_ = arena.take("nll", {N}, stat);
  last_ = arena.take("last rows", {shape.B, D}, act);
  likeliest_ = draws_ = {};
  if (shape.likeliest) {
    likeliest_ = arena.take("likeliest tokens", {N}, DType::i32);
    draws_ = arena.take("likeliest tokens", {N}, DType::i32);
  }

  const int64_t slice =
      std::max(logit_rows(N, shape.train, shape.recompute), shape.train ? int64_t(1) : shape.B);
  auto take_logits = [&] { logits_ = arena.take("logits", {slice, Vp}, act); };
  op_scratch_ = {};
  if (shape.train) {
    if (const size_t bytes = ops_.scratch_bytes(N, D))
      op_scratch_ = arena.take("temporaries of operations", {int64_t(bytes)}, DType::u8);
    // Logits, the GLU's gradients and the mixer's never live at the same time: one place for all.
    scratch_ = Block::take_scratch(arena, ops_, config_, N);
    if (!own_branch) branch_ = scratch_.dresid;
    const size_t mark = arena.mark();
    take_logits();
    arena.release(mark);
    Block::take_glu_scratch(arena, scratch_, ops_, config_, N);
    arena.release(mark);
    if (again)
      for (Block::Acts& a : acts_) Block::use_scratch(a, scratch_);
    mixer_->take_scratch(arena, shape.B, shape.T, /*backward=*/true);
  } else {
    mixer_->take_scratch(arena, shape.B, shape.T, /*backward=*/false);
    take_logits();
  }
  if (shape.state) {
    Shape one = mixer_->state_shape(shape.B);
    check(one.rank < Shape::kMaxRank, "a mixer's state has too many axes");
    Shape all;
    all.rank = one.rank + 1;
    all.dim[0] = L;
    for (int i = 0; i < one.rank; ++i) all.dim[i + 1] = one.dim[i];
    state_ = arena.take("state", all, stat);
  }
}

void LanguageModel::prepare(const LmShape& shape) {
  release();
  Arena arena("activations");
  layout(arena, shape);
  memory_ = ops_.alloc(arena.peak(), "activations");
  arena.bind(memory_);
  layout(arena, shape);
  ops_.use_scratch(op_scratch_);
  zero_state();
  if (draws_) ops_.zero(draws_);
}

void LanguageModel::zero_state() {
  if (state_) ops_.zero(state_);
}

MixerCall LanguageModel::call(int layer, const TokenRows& rows, bool train) const {
  MixerCall c;
  c.layer = layer;
  c.slot = slot(layer);
  c.B = rows.B;
  c.T = rows.T;
  c.save = train;
  if (rows.reset) c.reset = reset_.slice(0, rows.B * rows.T);
  if (state_) {
    const Shape one = mixer_->state_shape(rows.B);
    const Tensor whole = state_.slice(layer, 1);
    Shape rows_first;  // (shape.B, numel of one row)
    rows_first = {state_.shape[1], whole.numel() / state_.shape[1]};
    c.state = whole.view(rows_first).slice(0, rows.B).view(one);
  }
  return c;
}

Block::Acts LanguageModel::acts(int layer, int64_t N) const {
  Block::Acts a = acts_[size_t(slot(layer))];
  a.resid1 = resid1_[resid1_.size() > 1 ? size_t(layer) : 0];
  for (Tensor* t :
       {&a.resid1, &a.norm1, &a.stats1, &a.resid2, &a.norm2, &a.stats2, &a.gate_up, &a.hidden})
    *t = t->slice(0, N);
  return a;
}

void LanguageModel::upload(const TokenRows& rows) {
  const int64_t N = rows.B * rows.T;
  check(N <= tokens_.numel() && rows.B <= shape_.B,
        "a batch of {} x {} does not fit the memory laid out for {} x {}", rows.B, rows.T, shape_.B,
        shape_.T);
  ops_.upload(tokens_.slice(0, N), rows.inputs);
  if (rows.targets) ops_.upload(targets_.slice(0, N), rows.targets);
  if (rows.reset) ops_.upload(reset_.slice(0, N), rows.reset);
}

std::pair<Tensor, Tensor> LanguageModel::run_blocks(const TokenRows& rows, const Dropout& drop,
                                                    bool train) {
  const int64_t N = rows.B * rows.T;
  const float scale =
      config_.scale_embedding ? float(std::sqrt(double(config_.hidden_size))) : 1.0f;
  const auto before = [&](int stage) {
    if (hooks_.before_forward) hooks_.before_forward(stage);
  };
  ops_.embedding_forward(acts(0, N).resid1, tokens_.slice(0, N), weights_.w(embedding_), scale,
                         Block::at_site(drop, 0), train ? order_ : Tensor());
  Tensor resid, branch;  // their sum is the residual stream; without a branch, resid alone
  for (int l = 0; l < int(blocks_.size()); ++l) {
    const Block::Acts a = acts(l, N);
    before(l);
    Block& block = blocks_[size_t(l)];
    const MixerCall c = call(l, rows, train);
    if (train && drop.p == 0) {
      resid = l + 1 < int(blocks_.size()) ? acts(l + 1, N).resid1 : resid_.slice(0, N);
      block.forward(resid, {}, {}, a, weights_, c, drop);
      continue;
    }
    if (train)
      block.forward(branch_.slice(0, N), resid, branch, a, weights_, c, drop);
    else
      block.infer(branch_.slice(0, N), resid, branch, a, weights_, c);
    resid = a.resid2;
    branch = branch_.slice(0, N);
  }
  before(int(blocks_.size()));
  return {resid, branch};
}

void LanguageModel::run_forward(const TokenRows& rows, const Dropout& drop, bool train) {
  const int64_t N = rows.B * rows.T;
  if (hooks_.before_forward) hooks_.before_forward(-1);
  mixer_->begin_forward(weights_);
  const auto [resid, branch] = run_blocks(rows, drop, train);
  const Tensor normed = normed_.slice(0, N), stats = stats_.slice(0, N);
  const Tensor w = weights_.w(norm_), b = weights_.w(norm_bias_);
  if (branch)
    ops_.residual_norm_forward(resid_.slice(0, N), normed, stats, resid, branch, w, b, config_.norm,
                               float(config_.norm_eps),
                               Block::at_site(drop, blocks_.back().glu_site()));
  else
    ops_.norm_forward(normed, stats, resid, w, b, config_.norm, float(config_.norm_eps));
}

void LanguageModel::forward_backward(const TokenRows& rows, double grad_scale, const Dropout& drop,
                                     Tensor nll_sum, bool may_record) {
  check(shape_.train && rows.B == shape_.B && rows.T == shape_.T,
        "forward_backward needs the batch that prepare() was told: {} x {}", shape_.B, shape_.T);
  check(drop.p == 0 || config_.dropout > 0, "dropout {} in a model laid out for none", drop.p);
  upload(rows);
  Dropout ticking = drop;
  if (drop.p > 0) {
    const int64_t now[2] = {int64_t(drop.step), drop.row0};
    ops_.upload(clock_, now);
    ticking.step = 0, ticking.row0 = 0;
    ticking.clock = static_cast<const int64_t*>(clock_.data);
  }
  if (!may_record) return run_micro_batch(rows, grad_scale, ticking, nll_sum);
  Kept& kept = recorded_[{ledger_.fresh(), rows.reset != nullptr, drop.p, drop.seed, grad_scale,
                          nll_sum.data}];
  if (!kept.seen) {  // everything is in place after a first time
    kept.seen = true;
    return run_micro_batch(rows, grad_scale, ticking, nll_sum);
  }
  // The tokens are on the device: of rows the recording needs the counts, and whether resets are.
  if (!kept.recording)
    kept.recording = ops_.record([this, rows, grad_scale, ticking, nll_sum] {
      run_micro_batch(rows, grad_scale, ticking, nll_sum);
    });
  kept.recording->replay();
  ledger_.all_written();
}

// What forward_backward does once the batch is on the device.
void LanguageModel::run_micro_batch(const TokenRows& rows, double grad_scale, const Dropout& drop,
                                    Tensor nll_sum) {
  run_forward(rows, drop, /*train=*/true);

  // Cross-entropy and its gradient, a slice of rows at a time: dnorm = gradient of the final norm's
  // output.
  const int64_t N = rows.B * rows.T, step = logits_.shape[0];
  for (int64_t first = 0; first < N; first += step) {
    const int64_t count = std::min(step, N - first);
    const Tensor x = normed_.slice(first, count), logits = logits_.slice(0, count);
    ops_.linear_forward(logits, x, weights_.w(head_), {});
    ops_.cross_entropy(nll_.slice(first, count), logits, targets_.slice(first, count),
                       config_.vocab_size, /*backward=*/true, grad_scale);
    ops_.linear_backward(scratch_.dnorm.slice(first, count), weights_.dw(head_), {}, logits, x,
                         weights_.w(head_));
  }
  ops_.sum(nll_sum, nll_);
  run_backward(rows, drop);
}

void LanguageModel::run_backward(const TokenRows& rows, const Dropout& drop) {
  const int64_t N = rows.B * rows.T;
  const Block::Scratch& s = scratch_;
  const Tensor dropped = drop.p > 0 ? s.dbranch : Tensor();
  mixer_->begin_backward();
  // Nothing else reads the stream behind the last block: its gradient starts here.
  const Grad dw = weights_.dw(norm_), db = weights_.dw(norm_bias_);
  if (drop.p == 0) {
    ops_.norm_backward(s.dresid, dw, db, s.dnorm, resid_, weights_.w(norm_), stats_, config_.norm);
  } else {
    ops_.zero(s.dresid);
    ops_.residual_norm_backward(s.dresid, dropped, dw, db, s.dnorm, resid_, weights_.w(norm_),
                                stats_, config_.norm,
                                Block::at_site(drop, blocks_.back().glu_site()));
  }
  complete(int(blocks_.size()));
  for (int l = int(blocks_.size()) - 1; l >= 0; --l) {
    const Block::Acts a = acts(l, N);
    const MixerCall c = call(l, rows, /*train=*/true);
    if (!per_layer_)  // recomputation: the layer's input was kept, the rest is made again
      blocks_[size_t(l)].forward(branch_, {}, {}, a, weights_, c, drop, /*stop_before_down=*/true);
    Block::Scratch here = s;
    if (drop.p == 0) here.dbranch = s.dresid;
    blocks_[size_t(l)].backward(a, here, weights_, c, drop);
    // Between ranks the embedding's gradient, often the largest of all, travels while those of the
    // first layer's weights are still made.
    if (l == 0) embedding_backward(drop);
    blocks_[size_t(l)].input_weights_backward(a, weights_, c);
    complete(l);
  }
}

void LanguageModel::embedding_backward(const Dropout& drop) {
  const float scale =
      config_.scale_embedding ? float(std::sqrt(double(config_.hidden_size))) : 1.0f;
  ops_.embedding_backward(weights_.dw(embedding_), scratch_.dresid, tokens_, scale,
                          Block::at_site(drop, 0), order_);
  mixer_->end_backward(weights_);
  complete(-1);
}

// What no operation gave a gradient has none: zero, not what the step before left there.
void LanguageModel::complete(int stage) {
  for (ParamId id : stages_[size_t(stage + 1)])
    if (ledger_.first(table_, id)) ops_.zero(table_.view(weights_.grad, id));
  if (hooks_.after_backward) hooks_.after_backward(stage);
}

int LanguageModel::stage_of(ParamId id) const {
  if (id == norm_ || id == norm_bias_ || (id == head_ && head_ != embedding_))
    return int(blocks_.size());
  int layer = -1;
  std::sscanf(table_.params()[size_t(id)].name.c_str(), "model.layers.%d.", &layer);
  return layer;
}

Tensor LanguageModel::forward(const TokenRows& rows) {
  upload(rows);
  run_forward(rows, Dropout{}, /*train=*/false);
  const int64_t N = rows.B * rows.T, step = logits_.shape[0];
  for (int64_t first = 0; first < N; first += step) {
    const int64_t count = std::min(step, N - first);
    const Tensor l = logits(first, count);
    ops_.cross_entropy(nll_.slice(first, count), l, targets_.slice(first, count),
                       config_.vocab_size, /*backward=*/false, 0);
    if (likeliest_)
      ops_.sample(likeliest_.slice(first, count), {}, {}, draws_.slice(first, count), l,
                  config_.vocab_size, {.temperature = 0});
  }
  return nll_.slice(0, N);
}

void LanguageModel::advance(const TokenRows& rows) {
  upload(rows);
  run_forward(rows, Dropout{}, /*train=*/false);
}

Tensor LanguageModel::logits(int64_t first, int64_t count) {
  const Tensor out = logits_.slice(0, count);
  ops_.linear_forward(out, normed_.slice(first, count), weights_.w(head_), {});
  return out;
}

Tensor LanguageModel::forward_last_logits(const TokenRows& rows) {
  upload(rows);
  run_forward(rows, Dropout{}, /*train=*/false);
  const Tensor last = last_.slice(0, rows.B), out = logits_.slice(0, rows.B);
  for (int64_t b = 0; b < rows.B; ++b)
    ops_.copy(last.slice(b, 1), normed_.slice(b * rows.T + rows.T - 1, 1));
  ops_.linear_forward(out, last, weights_.w(head_), {});
  return out;
}

Tensor LanguageModel::step(int64_t B) {
  check(bool(state_) && B <= shape_.B, "step of {} rows needs prepare() with state for them", B);
  const auto [resid, branch] = run_blocks({B, 1, nullptr, nullptr, nullptr}, {}, /*train=*/false);
  const Tensor out = logits_.slice(0, B);
  ops_.norm_linear_forward(out,
                           {.normed = normed_.slice(0, B),
                            .stats = stats_.slice(0, B),
                            .sum = resid_.slice(0, B),
                            .x = resid,
                            .branch = branch,
                            .w = weights_.w(norm_),
                            .b = weights_.w(norm_bias_),
                            .kind = config_.norm,
                            .eps = float(config_.norm_eps)},
                           weights_.w(head_), {});
  return out;
}

double LanguageModel::mean_forget_gate(int layer) {
  TokenRows rows;
  rows.B = shape_.B;
  rows.T = shape_.T;
  return mixer_->mean_forget_gate(call(layer, rows, /*train=*/true));
}

double LanguageModel::flops_per_token() const {
  double matrices = 0;
  for (const Param& p : table_.params())
    if (p.shape.rank == 2 && p.read_as == ReadAs::compute) matrices += double(p.shape.numel());
  // An untied embedding is a lookup; a tied one is the head's GEMM.
  if (!config_.tie_word_embeddings)
    matrices -= double(config_.vocab_size) * double(config_.hidden_size);
  const double recurrence = double(config_.num_hidden_layers) * mixer_->flops_per_token();
  return 3 * (2 * matrices + recurrence);
}

}  // namespace hgrn
