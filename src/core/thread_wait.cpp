#include "core/thread_wait.h"

#include <unistd.h>

#include <climits>
#include <cstdlib>

namespace hgrn {

void spin_briefly(char** argv) {
#ifdef _OPENMP
  if (std::getenv("GOMP_SPINCOUNT") || std::getenv("OMP_WAIT_POLICY")) return;
  char program[PATH_MAX];
  const ssize_t n = ::readlink("/proc/self/exe", program, sizeof program - 1);
  if (n <= 0) return;
  program[n] = '\0';
  if (::setenv("GOMP_SPINCOUNT", "10000", 0) == 0) ::execv(program, argv);
    // Where it cannot be started again it goes on as it is.
#else
  (void)argv;
#endif
}

}  // namespace hgrn
