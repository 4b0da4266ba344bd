// CUDA calls that fail become hgrn::Error with file, line and statement.
#pragma once
#include <cuda_runtime.h>

#include "core/check.h"

#define CUDA_CHECK(statement)                                                            \
  do {                                                                                   \
    const cudaError_t cuda_check_error = (statement);                                    \
    if (cuda_check_error != cudaSuccess)                                                 \
      ::hgrn::fail(::hgrn::Exit::failed, "{}:{}: {} failed: {}", __FILE__, __LINE__,     \
                   #statement, cudaGetErrorString(cuda_check_error));                    \
  } while (0)
