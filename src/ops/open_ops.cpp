#include "core/log.h"
#include "ops/ops.h"

namespace hgrn {

#ifndef HGRN_WITH_CUDA
bool cuda_available() {
  return false;
}
int cuda_device_count() {
  return 0;
}
std::string cuda_versions() {
  return "none (built without CUDA)";
}
std::unique_ptr<Ops> make_cuda_ops(DType, int) {
  fail(Exit::usage,
       "--device cuda: this hgrn was built without CUDA; build with -DHGRN_CUDA=ON where nvcc is, "
       "or use --device cpu");
}
#endif

Device resolve_device(Device device) {
  if (device != Device::automatic) return device;
  return cuda_available() ? Device::cuda : Device::cpu;
}

std::unique_ptr<Ops> open_ops(Device device, std::string_view precision, int local_rank) {
  const bool bf16 = precision == "bf16";
  if (resolve_device(device) == Device::cuda)
    return make_cuda_ops(bf16 ? DType::bf16 : DType::f32, local_rank);
  if (bf16) log_info("the CPU computes train.precision bf16 in fp32");
  return make_cpu_ops(DType::f32);
}

}  // namespace hgrn
