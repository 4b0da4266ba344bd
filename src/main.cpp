// Errors to one line and an exit code; the command line itself is src/cli.
#include <cstdio>
#include <new>

#include "cli/command.h"
#include "core/log.h"
#include "core/thread_wait.h"

int main(int argc, char** argv) {
  hgrn::spin_briefly(argv);
  hgrn::log_init(/*rank=*/0, /*world_size=*/1);
  try {
    return hgrn::run_command_line(argc, argv);
  } catch (const hgrn::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return int(e.code());
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "error: out of memory; lower train.micro_batch or close other programs\n");
    return int(hgrn::Exit::failed);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return int(hgrn::Exit::failed);
  }
}
