// Power, temperature and memory of an NVIDIA GPU through its driver's NVML. The library is opened
// at run time, so that a build needs no NVML and a machine without a GPU runs the same program.
#pragma once
#include <memory>
#include <optional>
#include <string>

#include "monitor/records.h"

namespace hgrn {

class Nvml {
 public:
  // Of the GPU with this PCI bus id ("0000:1B:00.0"). Where library, driver or GPU is missing,
  // read() gives nothing.
  explicit Nvml(const std::string& pci_bus_id, const std::string& library = "libnvidia-ml.so.1");
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  std::optional<GpuStatus> read() const;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
};

}  // namespace hgrn
