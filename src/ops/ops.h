// What a backend must do. The model is written once against this interface; kernels/cpu/cpu_ops.h
// and kernels/cuda/cuda_ops.h override it with equal file stems and equal method names. The CPU
// backend is the specification: tests hold every other one to it.
//
// Conventions. Outputs first, then inputs, then scalars. Letters: B batch, T tokens of a row,
// N = B*T rows, D hidden, F GLU width, V vocabulary, L layers. `x =` means written, `x +=` means
// added to; `x +=` of a Grad means written where it is fresh. Activations have act_dtype(),
// statistics and states stat_dtype(), gradients of weights and master weights master_dtype(). An
// empty Tensor is an absent argument. Work may be asynchronous: download() and synchronize() wait
// for it. All calls come from one thread. Every result is deterministic: the same call on the same
// machine gives the same bits.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/grad.h"
#include "core/rng.h"
#include "core/sampling.h"
#include "core/tensor.h"
#include "ops/seq_kernel.h"

namespace hgrn {

enum class Norm { rms, layer };

// AdamW (Loshchilov & Hutter 2019) with bias correction; t counts applied updates from 1.
struct AdamStep {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t t;
};

struct MemoryInfo {
  size_t free = 0, total = 0;  // bytes; 0: unknown
};

// What a fused norm reads and writes: normed = norm(sum) with sum = x + branch, or norm(x) where
// branch is absent. sum is not x. normed and stats may be left unwritten.
struct NormInput {
  Tensor normed{}, stats{}, sum{}, x{}, branch{}, w{}, b{};  // as in Ops::residual_norm_forward
  Norm kind = Norm::rms;
  float eps = 0;
};

// A norm's backward may make forward's output again, for those that did not keep it: y (N,D) = what
// forward wrote, bit for bit. y may be dy itself.
struct NormAgain {
  Tensor y{}, b{};  // b as in forward; y absent: not wanted
};

// A matrix product of linear_forward or linear_backward.
struct Product {
  enum class Kind { forward, input_gradient, weight_gradient } kind = Kind::forward;
  int64_t N = 0, I = 0, O = 0;
  bool add = false;  // forward: c; weight gradient: not fresh
};
struct ProductTrial {
  std::string algorithm;
  double us = 0;        // median
  bool chosen = false;  // the one that the backend uses
};
// What time_product() tries: the first `candidates` algorithms that the library ranks. every: and
// as many of the others that it accepts, the fastest by a first call. sustain_ms: those within 15 %
// of the fastest are timed again, each for so long without a pause, which is how they run at the
// card's limit of power; the others are left out, but for the chosen one.
struct ProductTrials {
  int candidates = 12;
  int runs = 10;
  double sustain_ms = 0;
  bool every = false;
};

// Operations recorded by Ops::record, to be run again on what their tensors hold by then.
class Recording {
 public:
  virtual ~Recording() = default;
  virtual void replay() = 0;
};

class Ops {
 public:
  virtual ~Ops() = default;

  // ---- identity
  virtual std::string describe() const = 0;  // "cpu fp32, 2 threads, OpenBLAS 0.3.21"
  virtual DType act_dtype() const = 0;
  virtual DType stat_dtype() const = 0;    // f32; f64 in gradient checks
  virtual DType master_dtype() const = 0;  // f32; f64 in gradient checks
  // The vocabulary and the GLU's width are padded in memory to multiples of these.
  virtual int64_t vocab_multiple() const = 0;
  virtual int64_t width_multiple() const = 0;
  virtual double peak_flops() const = 0;  // dense, of act_dtype(), for MFU; 0: unknown
  virtual MemoryInfo memory() const = 0;
  virtual std::string pci_bus_id() const { return ""; }  // of the GPU, "0000:1B:00.0"

  // ---- memory
  // Uninitialised, aligned to Arena::kAlign. Fails with Exit::failed, naming `what` and the size.
  virtual void* alloc(size_t bytes, std::string_view what) = 0;
  virtual void free(void* p) = 0;
  virtual void zero(Tensor t) = 0;
  virtual void copy(Tensor dst, Tensor src) = 0;          // same dtype and size
  virtual void cast(Tensor dst, Tensor src) = 0;          // between f32, f64 and bf16
  virtual void upload(Tensor dst, const void* host) = 0;  // dst.bytes()
  virtual void download(void* host, Tensor src) = 0;      // src.bytes(); waits
  virtual void synchronize() = 0;
  // Whether calls return before their work is done, so that it pays to have the next in hand.
  virtual bool asynchronous() const { return false; }
  // A download of at most kLaterBytes that does not wait. fetch() waits for it; it may be asked
  // again, until kLaterSlots more were started.
  static constexpr size_t kLaterBytes = 64;
  static constexpr int64_t kLaterSlots = 16;
  virtual int64_t download_later(Tensor src);
  virtual void fetch(void* host, int64_t ticket);
  // ---- time
  // A point on the device's timeline, between the calls before and after it. elapsed_ms() of two of
  // them needs synchronize() first. Marks cost a little memory each until forget_marks().
  virtual int64_t mark() = 0;
  virtual double elapsed_ms(int64_t from, int64_t to) = 0;
  virtual void forget_marks() = 0;

  // What a training step over N rows of width D needs for temporaries within a call, in bytes; the
  // model takes it from its arena, so that it is planned, and hands it over. It stays the owner.
  virtual size_t scratch_bytes(int64_t N, int64_t D) const = 0;
  virtual void use_scratch(Tensor bytes /*(scratch_bytes()) u8, or absent*/) = 0;

  // ---- embedding
  // Backward may want the tokens in an order of its own. Forward makes it where its tensor is
  // given, (embedding_order_size()) i32; 0: this backend needs none, and ignores one.
  virtual int64_t embedding_order_size(int64_t /*N*/, int64_t /*V*/, int64_t /*D*/) const {
    return 0;
  }
  // x (N,D) = dropout(scale * w[token]), order =;  tokens (N) i32, w (V,D)
  virtual void embedding_forward(Tensor x, Tensor tokens, Tensor w, float scale, Dropout drop,
                                 Tensor order = {}) = 0;
  // dw += scatter of scale * dropout'(dx) by token, in the order of the rows. order: forward's, of
  // these tokens; absent: it is made here.
  virtual void embedding_backward(Grad dw, Tensor dx, Tensor tokens, float scale, Dropout drop,
                                  Tensor order = {}) = 0;

  // ---- linear: y (N,O) = x (N,I) w^T + b + c;  w (O,I), b (O) or absent, c (N,O) or absent, not
  // y. The sum with c is formed before y is rounded.
  virtual void linear_forward(Tensor y, Tensor x, Tensor w, Tensor b, Tensor c = {}) = 0;
  // dx = dy w; dw += dy^T x; db += column sums of dy; those absent are skipped. For db alone x and
  // w may be absent.
  virtual void linear_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w) = 0;

  // ---- norm over the columns. stats (N,2) = mean (0 for rms), 1/sqrt(variance + eps)
  // w (D), b (D) or absent, both master_dtype()
  virtual void norm_forward(Tensor y, Tensor stats, Tensor x, Tensor w, Tensor b, Norm kind,
                            float eps) = 0;
  // dx =, dw +=, db +=, again.y =
  virtual void norm_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w,
                             Tensor stats, Norm kind, NormAgain again = {}) = 0;
  // The residual stream: sum = x + dropout(branch), y = norm(sum). sum may be x.
  virtual void residual_norm_forward(Tensor sum, Tensor y, Tensor stats, Tensor x, Tensor branch,
                                     Tensor w, Tensor b, Norm kind, float eps, Dropout drop) = 0;
  // dsum += norm'(dy) (dsum arrives with the gradient of the residual stream), dw +=, db +=,
  // dbranch = dropout'(dsum), again.y =; dbranch may be absent when drop.p == 0, where it would
  // equal dsum.
  virtual void residual_norm_backward(Tensor dsum, Tensor dbranch, Grad dw, Grad db, Tensor dy,
                                      Tensor sum, Tensor w, Tensor stats, Norm kind, Dropout drop,
                                      NormAgain again = {}) = 0;

  // ---- GLU: h (N,F) = act(g) * u with gu (N,2F) = [g|u]
  virtual void glu_forward(Tensor h, Tensor gu, Act act) = 0;
  // dgu =; h (N,F), or absent: forward's output again, bit for bit. h may be dh itself.
  virtual void glu_backward(Tensor dgu, Tensor dh, Tensor gu, Act act, Tensor h = {}) = 0;
  // gu (N,2F) = linear(x (N,D)) with w (2F,D), b (2F) or absent; h (N,F) = act(g) * u
  virtual void linear_glu_forward(Tensor h, Tensor gu, Tensor x, Tensor w, Tensor b, Act act);
  // The gradient of y = linear(h) with w (D,F), h = act(g) * u, back to dgu (N,2F) =; dw +=, db +=,
  // and db_gu (2F) +=, of the bias that went into gu (both or either absent). dh (N,F) is for what
  // lies between and may be left unwritten. again: h was not kept, it is written before it is read,
  // with the bits of linear_glu_forward; it may then be dh itself.
  virtual void glu_linear_backward(Tensor dgu, Tensor dh, Grad dw, Grad db, Grad db_gu, Tensor dy,
                                   Tensor h, Tensor gu, Tensor w, Act act, bool again = false);

  // ---- cross-entropy with its gradient, in place
  // nll (N) stat_dtype() = -log softmax(logits[:, :V])[target], 0 where target < 0.
  // logits (N,Vp), Vp >= V = vocab: with backward, overwritten by grad_scale * (softmax - onehot),
  // 0 in rows with target < 0 and in columns >= V; without, left alone.
  virtual void cross_entropy(Tensor nll, Tensor logits, Tensor targets, int64_t vocab,
                             bool backward, double grad_scale) = 0;

  // ---- lower bounds: beta (L,D) = cumsum over layers of softmax over layers of gamma (L,D), less
  // its first row (paper Eq. 3); dgamma +=
  virtual void lower_bound_forward(Tensor beta, Tensor gamma) = 0;
  virtual void lower_bound_backward(Grad dgamma, Tensor dbeta, Tensor gamma) = 0;

  // ---- update
  virtual void sum(Tensor out, Tensor x) = 0;         // out (1) f64 += sum of x (f32 or f64)
  virtual void square_sum(Tensor out, Tensor x) = 0;  // out (1) f64 += sum of squares
  // control (3) f64 = {norm, clip factor, ok}: norm = sqrt(square_sum), factor = min(1,
  // max_norm / (norm + 1e-6)) as PyTorch clips (1 if max_norm is 0), ok = 1 if norm and nll_sum
  // are finite, else 0.
  virtual void clip_control(Tensor control, Tensor square_sum, Tensor nll_sum, double max_norm) = 0;
  // One AdamW update of flat buffers with gradients grad * control.factor; nothing at all is
  // written where control.ok is 0. compute = cast(master) unless it is absent or master itself.
  // Or compute is bf16 and master i16: the two halves of the master weights (split()).
  virtual void adamw(Tensor master, Tensor compute, Tensor m, Tensor v, Tensor grad,
                     const AdamStep& step, Tensor control) = 0;

  // compute (n) bf16 and rest (n) i16 = master (n) f32, as core/dtype.h splits a weight; rest may
  // be absent. join: the reverse.
  virtual void split(Tensor compute, Tensor rest, Tensor master) = 0;
  virtual void join(Tensor master, Tensor compute, Tensor rest) = 0;

  // ---- decoding
  // y = linear(norm(...)) and y = linear(glu): one kernel each where rows are few. What lies
  // between (in.normed, h) may be left unwritten.
  virtual void norm_linear_forward(Tensor y, const NormInput& in, Tensor w, Tensor b);
  virtual void glu_linear_forward(Tensor y, Tensor h, Tensor gu, Act act, Tensor w, Tensor b);
  // One token a row by core/sampling.h, bit for bit the same on every backend. logits (B,Vp)
  // act_dtype(), of which the first `vocab` columns count. tokens (B) i32 =; step (B) i32 numbers
  // the row's draws, += 1; history (R,B) i32: row step % R =; seen (B,Vp) u8, absent where there is
  // no penalty: tokens whose logits are penalised, the drawn one joins them.
  virtual void sample(Tensor tokens, Tensor history, Tensor seen, Tensor step, Tensor logits,
                      int64_t vocab, const Sampling& s) = 0;
  // Runs nothing but keeps `work` for replay(). `work` calls operations on fixed tensors alone (no
  // upload, download, alloc), has run before with the same shapes, and writes no weight. The memory
  // it uses, temporaries included, must stay.
  virtual std::unique_ptr<Recording> record(std::function<void()> work);

  // ---- sequence kernels
  virtual SeqKernel& seq(std::string_view name) = 0;  // "hgru2"; Exit::usage for an unknown one

  // ---- measurement
  // Algorithms of the backend's library for a product of linear layers, each timed on data that no
  // cache holds. Empty where there is no choice.
  virtual std::vector<ProductTrial> time_product(const Product& product, const ProductTrials& what);

 private:
  struct Later {
    alignas(16) unsigned char bytes[kLaterBytes];
    size_t size;
  };
  Later later_[kLaterSlots];
  int64_t laters_ = 0;
};

enum class Device { automatic, cpu, cuda };

// `automatic` becomes cuda where a usable GPU is visible, else cpu.
Device resolve_device(Device device);
// The only place that chooses a backend. precision: "fp32" or "bf16" (on the CPU bf16 is computed
// in fp32, and the log says so). local_rank: which of the machine's GPUs.
std::unique_ptr<Ops> open_ops(Device device, std::string_view precision, int local_rank = 0);

// Factories that the kernels libraries define; src/ never includes kernels/.
std::unique_ptr<Ops> make_cpu_ops(DType dtype);  // f32, or f64 for gradient checks
std::unique_ptr<Ops> make_cuda_ops(DType act_dtype, int local_rank);
bool cuda_available();    // a usable GPU is visible; false in a build without CUDA
int cuda_device_count();  // visible GPUs
std::string cuda_versions();

}  // namespace hgrn
