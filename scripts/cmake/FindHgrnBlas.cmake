# Hgrn::Blas: the BLAS that HGRN_BLAS names.
include(FindPackageHandleStandardArgs)

if(HGRN_BLAS STREQUAL "OpenBLAS")
  # With its cblas.h. Prefers Debian's OpenMP build: the pthread one has a thread pool of its own that
  # fights with OpenMP for the cores.
  find_path(HGRN_BLAS_INCLUDE cblas.h
    PATH_SUFFIXES x86_64-linux-gnu/openblas-openmp aarch64-linux-gnu/openblas-openmp openblas-openmp
                  x86_64-linux-gnu/openblas-pthread x86_64-linux-gnu openblas)
  if(HGRN_STATIC_DEPS)
    set(_hgrn_blas_names libopenblas.a)
  else()
    set(_hgrn_blas_names openblas)
  endif()
  find_library(HGRN_BLAS_LIBRARY NAMES ${_hgrn_blas_names}
    PATH_SUFFIXES x86_64-linux-gnu/openblas-openmp aarch64-linux-gnu/openblas-openmp openblas-openmp
                  x86_64-linux-gnu/openblas-pthread openblas)
  find_package_handle_standard_args(HgrnBlas
    REASON_FAILURE_MESSAGE "OpenBLAS is missing: apt-get install libopenblas-openmp-dev, or run scripts/setup.sh"
    REQUIRED_VARS HGRN_BLAS_LIBRARY HGRN_BLAS_INCLUDE)
elseif(HGRN_BLAS STREQUAL "MKL")
  # Its archives: 32-bit sizes, no threads of its own (kernels/cpu/gemm.cpp shares the work out). They
  # need each other. pip's mkl-static and mkl-include lie in the environment's lib and include.
  find_path(HGRN_MKL_INCLUDE mkl_cblas.h HINTS ENV MKLROOT PATH_SUFFIXES include include/mkl mkl)
  foreach(_hgrn_layer intel_lp64 sequential core)
    find_library(HGRN_MKL_${_hgrn_layer} libmkl_${_hgrn_layer}.a HINTS ENV MKLROOT
      PATH_SUFFIXES lib lib/intel64)
  endforeach()
  find_package_handle_standard_args(HgrnBlas
    REASON_FAILURE_MESSAGE "MKL is missing: pip install mkl-static mkl-include in a virtual environment and set CMAKE_PREFIX_PATH to its folder, or leave HGRN_BLAS at OpenBLAS"
    REQUIRED_VARS HGRN_MKL_core HGRN_MKL_sequential HGRN_MKL_intel_lp64 HGRN_MKL_INCLUDE)
else()
  message(FATAL_ERROR "HGRN_BLAS=${HGRN_BLAS} is not known: OpenBLAS or MKL")
endif()

if(HgrnBlas_FOUND AND NOT TARGET Hgrn::Blas)
  add_library(Hgrn::Blas INTERFACE IMPORTED)
  if(HGRN_BLAS STREQUAL "MKL")
    target_include_directories(Hgrn::Blas INTERFACE ${HGRN_MKL_INCLUDE})
    target_compile_definitions(Hgrn::Blas INTERFACE HGRN_BLAS_MKL=1)
    target_link_libraries(Hgrn::Blas INTERFACE
      $<LINK_GROUP:RESCAN,${HGRN_MKL_intel_lp64},${HGRN_MKL_sequential},${HGRN_MKL_core}>
      Threads::Threads ${CMAKE_DL_LIBS} -lm)
  else()
    target_include_directories(Hgrn::Blas INTERFACE ${HGRN_BLAS_INCLUDE})
    target_link_libraries(Hgrn::Blas INTERFACE ${HGRN_BLAS_LIBRARY})
    if(HGRN_STATIC_DEPS)  # the archive holds LAPACK's Fortran too; its runtime goes in statically
      target_link_libraries(Hgrn::Blas INTERFACE -l:libgfortran.a -l:libquadmath.a -lm)
    endif()
  endif()
endif()
