#include "cpu/cpu_ops.h"

#include <sys/mman.h>

#include <cstdlib>
#include <fstream>

#include "cpu/blas.h"
#include "cpu/hgru2.h"
#include "cpu/narrow_gemm.h"

namespace hgrn {

CpuOps::CpuOps(DType dtype) : dtype_(dtype) {
  check(dtype == DType::f32 || dtype == DType::f64,
        "the CPU backend computes in f32 or f64, not in {}", name_of(dtype));
  cpu::set_blas_threads(cpu::max_threads());
  seq_["hgru2_plain"] = cpu::make_hgru2_plain(dtype);
  seq_["hgru2"] = dtype == DType::f32 ? cpu::make_hgru2_chunked() : cpu::make_hgru2_plain(dtype);
}

std::string CpuOps::describe() const {
  const int threads = cpu::max_threads();
  const std::string how = dtype_ == DType::f32 ? cpu::best_narrow_gemm().how : "";
  return fmt::format("cpu {}, {} thread{}, {}{}{}", dtype_ == DType::f32 ? "fp32" : "fp64", threads,
                     threads == 1 ? "" : "s", cpu::blas_name(), how.empty() ? "" : ", ", how);
}

int64_t CpuOps::mark() {
  marks_.push_back(std::chrono::steady_clock::now());
  return int64_t(marks_.size()) - 1;
}

double CpuOps::elapsed_ms(int64_t from, int64_t to) {
  const std::chrono::duration<double, std::milli> span = marks_[size_t(to)] - marks_[size_t(from)];
  return span.count();
}

MemoryInfo CpuOps::memory() const {
  MemoryInfo info;
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  for (size_t kib; file >> key >> kib; std::getline(file, unit)) {
    if (key == "MemTotal:") info.total = kib * 1024;
    if (key == "MemAvailable:") info.free = kib * 1024;
  }
  return info;
}

// What is large lies in huge pages where the kernel gives them: products and norms go through tens
// of megabytes a step, and a row of activations touches several small pages.
void* CpuOps::alloc(size_t bytes, std::string_view what) {
  constexpr size_t kHuge = size_t(2) << 20;
  const size_t align = bytes >= kHuge ? kHuge : 256;
  const size_t padded = bytes > SIZE_MAX - align ? 0 : (bytes + align - 1) / align * align;
  void* p = bytes && !padded ? nullptr : std::aligned_alloc(align, padded ? padded : align);
  check(p != nullptr,
        "cannot allocate {} bytes for {}; lower train.micro_batch or the sequence length", bytes,
        what);
  if (align == kHuge) ::madvise(p, padded, MADV_HUGEPAGE);  // a hint: without it all works as well
  return p;
}

void CpuOps::free(void* p) {
  std::free(p);
}

SeqKernel& CpuOps::seq(std::string_view name) {
  const auto found = seq_.find(name);
  if (found == seq_.end()) {
    std::string known;
    for (const auto& [key, kernel] : seq_) known += (known.empty() ? "" : ", ") + key;
    fail(Exit::usage, "no sequence kernel is called {}; the CPU backend has {}", name, known);
  }
  return *found->second;
}

std::unique_ptr<Ops> make_cpu_ops(DType dtype) {
  return std::make_unique<CpuOps>(dtype);
}

}  // namespace hgrn
