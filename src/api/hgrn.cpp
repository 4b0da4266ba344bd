#include "api/hgrn.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <new>

#include "core/dtype.h"
#include "core/log.h"
#include "core/version.h"
#include "eval/generate.h"
#include "eval/load.h"

namespace hgrn::api {
namespace {

constexpr int64_t kSegment = 1024;  // tokens of one pass

// What the library throws becomes what the API promises.
template <class F>
auto guarded(F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const hgrn::Error& e) {
    throw Error(int(e.code()), e.what());
  } catch (const std::bad_alloc&) {
    throw Error(int(Exit::failed), "out of memory; close other programs or open a smaller model");
  }
}

Device device_of(const std::string& name) {
  if (name == "auto") return Device::automatic;
  if (name == "cpu") return Device::cpu;
  if (name == "cuda") return Device::cuda;
  fail(Exit::usage, "device \"{}\": auto, cpu and cuda are known", name);
}

// A library does not talk on stderr but to warn.
void quiet_log() {
  static std::once_flag once;
  std::call_once(once, [] { log_init(/*rank=*/1, /*world_size=*/1); });
}

Sampling sampling_of(const GenerateOptions& o) {
  check(o.tokens > 0 && o.temperature >= 0 && o.top_k >= 0 && o.top_p >= 0 && o.top_p <= 1 &&
            o.repetition_penalty > 0,
        Exit::usage,
        "tokens {}, temperature {}, top_k {}, top_p {}, repetition_penalty {}: one is out of range",
        o.tokens, o.temperature, o.top_k, o.top_p, o.repetition_penalty);
  Sampling s;
  s.temperature = o.temperature;
  s.top_k = o.top_k;
  s.top_p = o.top_p;
  s.repetition_penalty = o.repetition_penalty;
  s.seed = o.seed;
  return s;
}

// A sequence's state while another one is on the device; empty: zero.
struct Kept {
  std::vector<char> bytes;
};

}  // namespace

Error::~Error() = default;

std::string version() {
  return hgrn::version();
}

// ---- model

struct State::Impl : Kept {
  std::shared_ptr<Model::Impl> model;
  int64_t position = 0;
};

struct Model::Impl {
  LoadedModel loaded;
  Kept* current = nullptr;  // whose state the device holds
  bool laid_out = false;
  bool passed = false;  // a pass has left behind what the decoding kernels need

  Impl(const std::string& folder, const LoadOptions& o)
      : loaded(load_model(folder, device_of(o.device), o.tokenizer)) {}

  LanguageModel& model() { return *loaded.model; }
  Ops& ops() { return *loaded.ops; }
  int64_t vocab() const { return loaded.model->config().vocab_size; }

  void lay_out() {
    if (laid_out) return;
    model().prepare({.B = 1, .T = kSegment, .state = true});
    laid_out = true;
    passed = false;
  }
  // The device's state becomes that of `next` (none: zero).
  void change_to(Kept* next) {
    lay_out();
    if (current == next && next) return;
    put_away();
    if (next && !next->bytes.empty())
      ops().upload(model().state(), next->bytes.data());
    else
      model().zero_state();
    current = next;
  }
  void put_away() {
    if (!current) return;
    current->bytes.resize(model().state().bytes());
    ops().download(current->bytes.data(), model().state());
    current = nullptr;
  }
  // Generation lays the memory out for itself.
  void give_up_layout() {
    put_away();
    laid_out = false;
  }

  void check_tokens(const std::vector<int32_t>& tokens) const {
    for (size_t i = 0; i < tokens.size(); ++i)
      check(tokens[i] >= 0 && tokens[i] < vocab(), Exit::usage,
            "token {} is {}; the vocabulary has {}", i, tokens[i], vocab());
  }
  const Tokenizer& tokenizer() const {
    check(loaded.tokenizer != nullptr, Exit::usage,
          "{}: no tokenizer is recorded; name one in LoadOptions::tokenizer", loaded.dir);
    return *loaded.tokenizer;
  }
  std::vector<float> read_logits(Tensor logits) {
    std::vector<float> out(static_cast<size_t>(vocab()));
    const Tensor row = logits.slice(0, 1);
    if (row.dtype == DType::f32) {
      std::vector<float> padded(size_t(row.numel()));
      ops().download(padded.data(), row);
      std::copy_n(padded.begin(), out.size(), out.begin());
    } else {
      std::vector<uint16_t> padded(size_t(row.numel()));
      ops().download(padded.data(), row);
      std::transform(padded.begin(), padded.begin() + int64_t(out.size()), out.begin(),
                     bf16_to_float);
    }
    return out;
  }
  std::vector<float> advance(const std::vector<int32_t>& tokens) {
    const int64_t count = int64_t(tokens.size()), last = (count - 1) / kSegment * kSegment;
    passed = true;
    for (int64_t at = 0; at < last; at += kSegment)
      model().advance({1, kSegment, &tokens[size_t(at)], nullptr, nullptr});
    return read_logits(
        model().forward_last_logits({1, count - last, &tokens[size_t(last)], nullptr, nullptr}));
  }
};

Model::Model(const std::string& folder, const LoadOptions& options) {
  quiet_log();
  impl_ = guarded([&] { return std::make_shared<Impl>(folder, options); });
}
Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;

int64_t Model::vocab_size() const {
  return impl_->vocab();
}
int64_t Model::parameters() const {
  return impl_->loaded.model->params().count();
}
int64_t Model::layers() const {
  return impl_->loaded.model->config().num_hidden_layers;
}
int64_t Model::hidden_size() const {
  return impl_->loaded.model->config().hidden_size;
}
int32_t Model::end_of_text() const {
  return int32_t(impl_->loaded.eos);
}
int64_t Model::step() const {
  return impl_->loaded.step;
}
std::string Model::folder() const {
  return impl_->loaded.dir;
}
std::string Model::device() const {
  return impl_->loaded.ops->describe();
}
bool Model::has_tokenizer() const {
  return impl_->loaded.tokenizer != nullptr;
}

std::vector<int32_t> Model::encode(std::string_view text) const {
  return guarded([&] {
    std::vector<int32_t> tokens;
    impl_->tokenizer().encode(text, tokens);
    return tokens;
  });
}

std::string Model::decode(const std::vector<int32_t>& tokens) const {
  return guarded([&] { return impl_->tokenizer().decode(tokens); });
}

std::vector<float> Model::score(const std::vector<int32_t>& tokens,
                                const std::vector<int32_t>& context) {
  return guarded([&] {
    Impl& m = *impl_;
    m.check_tokens(tokens);
    m.check_tokens(context);
    std::vector<int32_t> inputs = context;
    if (inputs.empty()) {
      check(m.loaded.eos >= 0, Exit::usage,
            "{}: no end-of-text token is known to stand before the first; give a context",
            m.loaded.dir);
      inputs.push_back(int32_t(m.loaded.eos));
    }
    const size_t before = inputs.size() - 1;  // places whose target is context
    inputs.insert(inputs.end(), tokens.begin(), tokens.end());
    std::vector<int32_t> targets(before, -1);
    targets.insert(targets.end(), tokens.begin(), tokens.end());
    m.change_to(nullptr);
    std::vector<float> nll(targets.size());
    for (size_t at = 0; at < targets.size(); at += size_t(kSegment)) {
      const size_t T = std::min(size_t(kSegment), targets.size() - at);
      m.ops().download(&nll[at],
                       m.model().forward({1, int64_t(T), &inputs[at], &targets[at], nullptr}));
    }
    std::vector<float> out(nll.begin() + int64_t(before), nll.end());
    for (float& x : out) x = -x;
    return out;
  });
}

std::string Model::generate(std::string_view prompt, const GenerateOptions& o,
                            const std::function<bool(std::string_view)>& sink) {
  return guarded([&] {
    Impl& m = *impl_;
    std::vector<int32_t> tokens;
    if (m.loaded.eos >= 0) tokens.push_back(int32_t(m.loaded.eos));
    m.tokenizer().encode(prompt, tokens);
    for (const std::string& s : o.stop) check(!s.empty(), Exit::usage, "a stop text is empty");
    const DecodeOptions d{o.tokens, sampling_of(o)};
    m.give_up_layout();
    TextStream stream(o.stop);
    std::string text;
    const auto give = [&](const std::string& piece) {
      text += piece;
      return piece.empty() || !sink || sink(piece);
    };
    bool wanted = true;
    hgrn::decode(m.model(), {tokens}, d, [&](int64_t, int32_t token) {
      if (token == m.loaded.eos) return false;
      // Ids that only the model's padding of the vocabulary has decode to nothing.
      if (token < m.tokenizer().vocab_size())
        wanted = give(stream.push(m.tokenizer().decode({&token, 1})));
      return wanted && !stream.stopped();
    });
    if (wanted) give(stream.finish());
    return text;
  });
}

std::vector<int32_t> Model::generate(const std::vector<int32_t>& prompt, const GenerateOptions& o) {
  return guarded([&] {
    Impl& m = *impl_;
    m.check_tokens(prompt);
    const DecodeOptions d{o.tokens, sampling_of(o)};
    m.give_up_layout();
    std::vector<int32_t> made;
    hgrn::decode(m.model(), {prompt}, d, [&](int64_t, int32_t token) {
      made.push_back(token);
      return token != m.loaded.eos;
    });
    return made;
  });
}

// ---- state

State::State(Model& model) : impl_(std::make_unique<Impl>()) {
  impl_->model = model.impl_;
}
State::~State() {
  if (impl_ && impl_->model->current == impl_.get()) impl_->model->current = nullptr;
}
State::State(const State& other) {
  guarded([&] {
    // What the device holds comes back; it stays the other one's.
    Model::Impl& m = *other.impl_->model;
    if (m.current == other.impl_.get()) {
      m.put_away();
      m.current = other.impl_.get();
    }
    impl_ = std::make_unique<Impl>(*other.impl_);
  });
}
State& State::operator=(const State& other) {
  if (this != &other) *this = State(other);
  return *this;
}
State::State(State&&) noexcept = default;
State& State::operator=(State&& other) noexcept {
  std::swap(impl_, other.impl_);
  return *this;
}

std::vector<float> State::step(int32_t token) {
  return advance({token});
}

std::vector<float> State::advance(const std::vector<int32_t>& tokens) {
  return guarded([&] {
    Model::Impl& m = *impl_->model;
    check(!tokens.empty(), Exit::usage, "advance() needs at least one token");
    m.check_tokens(tokens);
    m.change_to(impl_.get());
    impl_->position += int64_t(tokens.size());
    if (tokens.size() > 1 || !m.passed) return m.advance(tokens);
    m.ops().upload(m.model().next_tokens(1), tokens.data());
    return m.read_logits(m.model().step(1));
  });
}

int64_t State::position() const {
  return impl_->position;
}

size_t State::bytes() const {
  return guarded([&] {
    impl_->model->lay_out();
    return impl_->model->model().state().bytes();
  });
}

}  // namespace hgrn::api
