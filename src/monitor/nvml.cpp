#include "monitor/nvml.h"

#include <dlfcn.h>

namespace hgrn {
namespace {

// What is used of nvml.h, which the distribution does not carry; NVIDIA keeps it stable.
using Device = void*;
constexpr int kSuccess = 0;
constexpr int kTemperatureGpu = 0;  // NVML_TEMPERATURE_GPU
struct Memory {                     // nvmlMemory_t
  unsigned long long total, free, used;
};
struct Utilization {  // nvmlUtilization_t, percent
  unsigned gpu, memory;
};

template <class F>
void find(void* handle, F& function, const char* name) {
  function = reinterpret_cast<F>(::dlsym(handle, name));
}

}  // namespace

struct Nvml::Library {
  void* handle = nullptr;
  Device device = nullptr;
  bool ready = false;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*by_bus_id)(const char*, Device*) = nullptr;
  int (*memory)(Device, Memory*) = nullptr;
  int (*power)(Device, unsigned*) = nullptr;        // milliwatts
  int (*power_limit)(Device, unsigned*) = nullptr;  // milliwatts
  int (*temperature)(Device, int, unsigned*) = nullptr;
  int (*utilization)(Device, Utilization*) = nullptr;

  explicit Library(const std::string& name) : handle(::dlopen(name.c_str(), RTLD_NOW)) {
    if (!handle) return;
    find(handle, init, "nvmlInit_v2");
    find(handle, shutdown, "nvmlShutdown");
    find(handle, by_bus_id, "nvmlDeviceGetHandleByPciBusId_v2");
    find(handle, memory, "nvmlDeviceGetMemoryInfo");
    find(handle, power, "nvmlDeviceGetPowerUsage");
    find(handle, power_limit, "nvmlDeviceGetEnforcedPowerLimit");
    find(handle, temperature, "nvmlDeviceGetTemperature");
    find(handle, utilization, "nvmlDeviceGetUtilizationRates");
    ready = init && shutdown && by_bus_id && init() == kSuccess;
  }
  ~Library() {
    if (ready) shutdown();
    if (handle) ::dlclose(handle);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
};

Nvml::Nvml(const std::string& pci_bus_id, const std::string& library) {
  if (pci_bus_id.empty()) return;
  auto opened = std::make_unique<Library>(library);
  if (opened->ready && opened->by_bus_id(pci_bus_id.c_str(), &opened->device) == kSuccess)
    library_ = std::move(opened);
}

Nvml::~Nvml() = default;

std::optional<GpuStatus> Nvml::read() const {
  if (!library_) return std::nullopt;
  const Library& l = *library_;
  GpuStatus s;
  Memory m{};
  Utilization u{};
  unsigned v = 0;
  if (l.memory && l.memory(l.device, &m) == kSuccess)
    s.memory_used = double(m.used), s.memory_total = double(m.total);
  if (l.power && l.power(l.device, &v) == kSuccess) s.power_w = v / 1e3;
  if (l.power_limit && l.power_limit(l.device, &v) == kSuccess) s.power_limit_w = v / 1e3;
  if (l.temperature && l.temperature(l.device, kTemperatureGpu, &v) == kSuccess)
    s.temperature_c = double(v);
  if (l.utilization && l.utilization(l.device, &u) == kSuccess) s.utilization = u.gpu / 100.0;
  return s;
}

}  // namespace hgrn
