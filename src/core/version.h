#pragma once
namespace hgrn {
const char* version();  // "0.1.0 (commit)"
}
