#include "train/signals.h"

#include <unistd.h>

#include <atomic>
#include <csignal>

namespace hgrn {
namespace {

constexpr int kSignals[] = {SIGTERM, SIGINT, SIGUSR1};
std::atomic<int> g_received{0};
struct sigaction g_before[3];

void on_signal(int number) {
  int none = 0;
  if (!g_received.compare_exchange_strong(none, number) && number == SIGINT)
    _exit(128 + SIGINT);  // the person means it; the checkpoint folder is safe at any moment
}

}  // namespace

StopSignals::StopSignals() {
  g_received = 0;
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &g_before[i]);
}

StopSignals::~StopSignals() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &g_before[i], nullptr);
}

int StopSignals::received() const {
  return g_received;
}

}  // namespace hgrn
