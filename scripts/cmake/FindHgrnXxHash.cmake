# Hgrn::XxHash: the XXH3 checksums of checkpoints.
find_path(HGRN_XXHASH_INCLUDE xxhash.h)
if(HGRN_STATIC_DEPS)
  set(_hgrn_xxhash_names libxxhash.a)
else()
  set(_hgrn_xxhash_names xxhash)
endif()
find_library(HGRN_XXHASH_LIBRARY NAMES ${_hgrn_xxhash_names})
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(HgrnXxHash
  REASON_FAILURE_MESSAGE "xxHash is missing: apt-get install libxxhash-dev, or run scripts/setup.sh"
  REQUIRED_VARS HGRN_XXHASH_LIBRARY HGRN_XXHASH_INCLUDE)
if(HgrnXxHash_FOUND AND NOT TARGET Hgrn::XxHash)
  add_library(Hgrn::XxHash INTERFACE IMPORTED)
  target_include_directories(Hgrn::XxHash INTERFACE ${HGRN_XXHASH_INCLUDE})
  target_link_libraries(Hgrn::XxHash INTERFACE ${HGRN_XXHASH_LIBRARY})
endif()
