// The C++ API of hgrn: open a trained HGRN2 model, score tokens, step its recurrent state,
// generate. Link hgrn::hgrn (find_package(hgrn)); nothing but the standard library is included
// here. docs/api.md has an example.
//
//   hgrn::api::Model model("runs/quickstart");
//   for (float logp : model.score(model.encode("the cat"))) ...
//   std::string text = model.generate("the ", {.tokens = 100});
//
// A Model and its States belong to one thread at a time; two Models are independent.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#if defined(__GNUC__)
#define HGRN_API __attribute__((visibility("default")))
#else
#define HGRN_API
#endif

namespace hgrn::api {

// All calls below throw it. what() says what is wrong, where, and how to mend it, in one line;
// code() is the exit code that the program ends with for the same reason: 1 failed while running,
// 2 wrong use, 3 a file is missing, damaged or does not match.
class HGRN_API Error : public std::runtime_error {
 public:
  Error(int code, const std::string& what) : std::runtime_error(what), code_(code) {}
  ~Error() override;
  int code() const { return code_; }

 private:
  int code_;
};

HGRN_API std::string version();  // "0.1.0 (commit)"

struct LoadOptions {
  std::string device = "auto";  // "auto": a GPU where one is usable; "cpu"; "cuda"
  std::string tokenizer{};      // "byte", a file or a folder; empty: what the checkpoint records
};

struct GenerateOptions {
  int64_t tokens = 128;   // at most; an end-of-text token ends it earlier
  float temperature = 1;  // 0: the most likely token
  int64_t top_k = 0;      // 0: off
  double top_p = 1;       // 1: off
  float repetition_penalty = 1;
  uint64_t seed = 0;                // the same seed gives the same draws on every device
  std::vector<std::string> stop{};  // texts before which it ends (text alone)
};

class State;

class HGRN_API Model {
 public:
  // `folder`: a checkpoint, a run folder (its newest valid checkpoint), or any Hugging Face HGRN2
  // folder of flash-linear-attention's layout.
  explicit Model(const std::string& folder, const LoadOptions& options = {});
  ~Model();
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;

  int64_t vocab_size() const;
  int64_t parameters() const;
  int64_t layers() const;
  int64_t hidden_size() const;
  int32_t end_of_text() const;  // -1: not known
  int64_t step() const;         // training steps; -1: not a checkpoint of hgrn
  std::string folder() const;   // the checkpoint that was opened
  std::string device() const;   // "cpu fp32, 2 threads, ..."

  bool has_tokenizer() const;
  std::vector<int32_t> encode(std::string_view text) const;
  std::string decode(const std::vector<int32_t>& tokens) const;

  // Natural logarithm of the probability of each of `tokens`, given `context` and the tokens before
  // it. An empty context stands for an end-of-text token.
  std::vector<float> score(const std::vector<int32_t>& tokens,
                           const std::vector<int32_t>& context = {});

  // The text that follows `prompt`, without it. `sink` is given each piece as it is made, ends
  // between characters, and stops everything where it returns false.
  std::string generate(std::string_view prompt, const GenerateOptions& options = {},
                       const std::function<bool(std::string_view)>& sink = {});
  // The same in tokens; the prompt must not be empty.
  std::vector<int32_t> generate(const std::vector<int32_t>& prompt,
                                const GenerateOptions& options = {});

 private:
  friend class State;
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

// The recurrent state of one sequence: of a fixed size, whatever number of tokens it has seen. A
// copy is a sequence that goes on by itself from there. States keep the weights alive. Changing
// from one State to another copies both between the device and the host.
class HGRN_API State {
 public:
  explicit State(Model& model);  // before the first token
  ~State();
  State(const State&);
  State& operator=(const State&);
  State(State&&) noexcept;
  State& operator=(State&&) noexcept;

  // Takes a token in; returns the logits of what follows, (vocab_size).
  std::vector<float> step(int32_t token);
  // The same for many tokens, in one pass of the chunked kernels; at least one.
  std::vector<float> advance(const std::vector<int32_t>& tokens);

  int64_t position() const;  // tokens taken in
  size_t bytes() const;      // of the state

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hgrn::api
