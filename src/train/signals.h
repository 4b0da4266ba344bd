// SIGTERM, SIGINT and SIGUSR1 ask for a save at the next step and exit code 75. A second SIGINT
// ends the process at once; the last complete checkpoint is untouched by that.
#pragma once

namespace hgrn {

class StopSignals {
 public:
  StopSignals();   // installs the handlers
  ~StopSignals();  // restores what was there
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
  int received() const;  // the first signal's number, 0 if none
};

}  // namespace hgrn
