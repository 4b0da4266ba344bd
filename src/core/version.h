#pragma once
namespace hgrn {
const char* version();  // "0.1.0 (commit)", "0.1.0" where no commit is known
}
