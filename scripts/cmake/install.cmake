# cmake --install and CPack: programs, the C++ API with its CMake package, configs, completions, the
# manual, documents. docs/packaging.md lists what lies where.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

if(HGRN_WITH_CUDA)  # CUDA's libraries lie outside of the linker's own folders
  foreach(target hgrn hgrn-bench hgrn_api)
    if(TARGET ${target})
      set_target_properties(${target} PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
    endif()
  endforeach()
endif()
install(TARGETS hgrn RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
if(TARGET hgrn-bench)
  install(TARGETS hgrn-bench RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

if(TARGET hgrn_api)
  set(HGRN_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/hgrn)
  install(TARGETS hgrn_api EXPORT hgrnTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(FILES src/api/hgrn.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/hgrn)
  install(EXPORT hgrnTargets NAMESPACE hgrn:: DESTINATION ${HGRN_CMAKE_DIR})
  configure_package_config_file(scripts/cmake/hgrnConfig.cmake.in
    ${PROJECT_BINARY_DIR}/cmake/hgrnConfig.cmake INSTALL_DESTINATION ${HGRN_CMAKE_DIR})
  # Before 1.0 a minor version may change the API.
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/cmake/hgrnConfigVersion.cmake
    COMPATIBILITY SameMinorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/cmake/hgrnConfig.cmake
    ${PROJECT_BINARY_DIR}/cmake/hgrnConfigVersion.cmake DESTINATION ${HGRN_CMAKE_DIR})
endif()

# The program writes its own manual and completions.
if(TARGET hgrn_api)  # not in builds for tests alone
  set(HGRN_HELP ${PROJECT_BINARY_DIR}/help)
  file(MAKE_DIRECTORY ${HGRN_HELP})
  add_custom_command(OUTPUT ${HGRN_HELP}/hgrn.1 ${HGRN_HELP}/hgrn ${HGRN_HELP}/_hgrn ${HGRN_HELP}/hgrn.fish
    COMMAND hgrn completion man > ${HGRN_HELP}/hgrn.1
    COMMAND hgrn completion bash > ${HGRN_HELP}/hgrn
    COMMAND hgrn completion zsh > ${HGRN_HELP}/_hgrn
    COMMAND hgrn completion fish > ${HGRN_HELP}/hgrn.fish
    DEPENDS hgrn VERBATIM)
  add_custom_target(hgrn_help ALL DEPENDS ${HGRN_HELP}/hgrn.1)
  install(FILES ${HGRN_HELP}/hgrn.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
  install(FILES ${HGRN_HELP}/hgrn DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions)
  install(FILES ${HGRN_HELP}/_hgrn DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/vendor-completions)
  install(FILES ${HGRN_HELP}/hgrn.fish DESTINATION ${CMAKE_INSTALL_DATADIR}/fish/vendor_completions.d)
endif()

install(DIRECTORY configs DESTINATION ${CMAKE_INSTALL_DATADIR}/hgrn)
install(FILES scripts/slurm/train.sbatch DESTINATION ${CMAKE_INSTALL_DATADIR}/hgrn/slurm)
install(FILES README.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR} RENAME copyright)
install(DIRECTORY docs/ DESTINATION ${CMAKE_INSTALL_DOCDIR}/docs)
install(DIRECTORY tools/example/ DESTINATION ${CMAKE_INSTALL_DOCDIR}/example)

set(CPACK_GENERATOR DEB TGZ)
set(CPACK_PACKAGE_NAME hgrn)
set(CPACK_PACKAGE_VENDOR "the hgrn authors")
set(CPACK_PACKAGE_CONTACT "the hgrn authors <hgrn@localhost>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "Trainer for HGRN2 language models")
set(CPACK_PACKAGE_DESCRIPTION "Pretrains, evaluates and samples HGRN2 language models on CPUs and NVIDIA GPUs,
with exact resume and checkpoints in the Hugging Face layout. Includes the
shared library and header of the C++ API.")
set(CPACK_RESOURCE_FILE_LICENSE ${PROJECT_SOURCE_DIR}/LICENSE)
set(CPACK_PACKAGE_CHECKSUM SHA256)
set(CPACK_STRIP_FILES ON)
set(CPACK_SYSTEM_NAME ${CMAKE_SYSTEM_NAME}-${CMAKE_SYSTEM_PROCESSOR})
set(CPACK_PACKAGE_DIRECTORY ${PROJECT_BINARY_DIR}/packages)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_PACKAGE_PRIORITY optional)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_GENERATE_SHLIBS ON)
include(CPack)
