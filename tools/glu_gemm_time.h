// The times of glu_gemm_check.cu.
#pragma once
#include <cublas_v2.h>

#include "cuda/glu_gemm.h"

namespace hgrn::glu_cases {

// Prints, for the shapes of the models, medians of 30 launches: cuBLAS and the elementwise pass,
// and the fused kernels.
void time_models(cublasHandle_t handle, const glu_gemm::Options& options);

}  // namespace hgrn::glu_cases
