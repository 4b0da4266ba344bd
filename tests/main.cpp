#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

#include "core/log.h"

int main(int argc, char** argv) {
  hgrn::log_init(/*rank=*/1, /*world_size=*/1);  // warnings only
  return Catch::Session().run(argc, argv);
}
