// The few socket calls that the rendezvous needs. Errors are Exit::failed with address and reason.
#pragma once
#include <string>

#include "core/file.h"

namespace hgrn {

// Listens on that address alone; port 0: any free one.
Fd listen_on(const std::string& address, int port);
int port_of(const Fd& socket);  // the local one
// One attempt at each address behind the name. An empty Fd where nobody answers; `why` says so.
Fd connect_to(const std::string& address, int port, double timeout_s, std::string& why);
std::string local_address(const Fd& socket);  // numeric, of this end

// Non-blocking. False: the connection is over.
bool receive_some(const Fd& socket, std::string& in);
bool send_some(const Fd& socket, std::string& out);  // takes from the front what was sent

std::string host_name();
double monotonic_s();

}  // namespace hgrn
