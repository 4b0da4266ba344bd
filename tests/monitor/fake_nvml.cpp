// Stands for libnvidia-ml.so.1 in tests: one GPU, 0000:1B:00.0, with fixed readings.
#include <cstring>

extern "C" {

struct FakeMemory {
  unsigned long long total, free, used;
};
struct FakeUtilization {
  unsigned gpu, memory;
};
static int opened = 0;
static char the_gpu;

int nvmlInit_v2() {
  ++opened;
  return 0;
}
int nvmlShutdown() {
  --opened;
  return 0;
}
int fake_nvml_opened() {
  return opened;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** device) {
  *device = &the_gpu;
  return std::strcmp(id, "0000:1B:00.0") == 0 ? 0 : 6;  // NVML_ERROR_NOT_FOUND
}
int nvmlDeviceGetMemoryInfo(void*, FakeMemory* m) {
  *m = {150ull << 30, 89ull << 30, 61ull << 30};
  return 0;
}
int nvmlDeviceGetPowerUsage(void*, unsigned* milliwatts) {
  *milliwatts = 612345;
  return 0;
}
int nvmlDeviceGetEnforcedPowerLimit(void*, unsigned* milliwatts) {
  *milliwatts = 700000;
  return 0;
}
int nvmlDeviceGetTemperature(void*, int sensor, unsigned* celsius) {
  *celsius = 61;
  return sensor == 0 ? 0 : 2;
}
int nvmlDeviceGetUtilizationRates(void*, FakeUtilization*) {
  return 3;  // NVML_ERROR_NOT_SUPPORTED, as on a MIG slice
}
}
