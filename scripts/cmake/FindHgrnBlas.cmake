# Hgrn::Blas: OpenBLAS with its cblas.h. Prefers Debian's OpenMP build: the pthread one has a thread
# pool of its own that fights with OpenMP for the cores.
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
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(HgrnBlas
  REASON_FAILURE_MESSAGE "OpenBLAS is missing: apt-get install libopenblas-openmp-dev, or run scripts/setup.sh"
  REQUIRED_VARS HGRN_BLAS_LIBRARY HGRN_BLAS_INCLUDE)
if(HgrnBlas_FOUND AND NOT TARGET Hgrn::Blas)
  add_library(Hgrn::Blas INTERFACE IMPORTED)
  target_include_directories(Hgrn::Blas INTERFACE ${HGRN_BLAS_INCLUDE})
  target_link_libraries(Hgrn::Blas INTERFACE ${HGRN_BLAS_LIBRARY})
  if(HGRN_STATIC_DEPS)  # the archive holds LAPACK's Fortran too; its runtime goes in statically
    target_link_libraries(Hgrn::Blas INTERFACE -l:libgfortran.a -l:libquadmath.a -lm)
  endif()
endif()
