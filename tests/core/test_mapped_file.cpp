#include "core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <utility>
#include <vector>

#include "catch.h"
#include "text/shard_files.h"

using namespace hgrn;
using namespace hgrn::test;

TEST_CASE("a mapped file gives the bytes of any range and refuses others", "[core]") {
  TempFolder folder;
  std::string bytes(10'000, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = char(i * 31 >> 3);
  write_bytes(folder / "a", bytes);
  const MappedFile file(folder / "a");
  CHECK(file.size() == 10'000);
  for (int64_t at : {0, 1, 4095, 4096, 9999, 10'000})
    for (int64_t n : {0, 1, 5000}) {
      std::string out(size_t(n), '?');
      const Error error = error_of([&] { file.copy(out.data(), at, n); });
      INFO(at << " " << n);
      CHECK(error.code() == (at + n <= 10'000 ? Exit::ok : Exit::data));
      if (at + n <= 10'000) CHECK(out == bytes.substr(size_t(at), size_t(n)));
    }
  char c;
  CHECK(error_of([&] { file.copy(&c, -1, 1); }).code() == Exit::data);
  CHECK(error_of([&] { file.copy(&c, INT64_MAX, 1); }).code() == Exit::data);
  CHECK(error_of([&] { file.copy(&c, 1, INT64_MAX); }).code() == Exit::data);
}

TEST_CASE("mapped files move, and may be empty", "[core]") {
  TempFolder folder;
  write_bytes(folder / "a", "abc");
  write_bytes(folder / "b", "");
  MappedFile a(folder / "a"), b(folder / "b");
  CHECK(b.size() == 0);
  b.copy(nullptr, 0, 0);
  MappedFile moved(std::move(a));
  char out[3];
  moved.copy(out, 0, 3);
  CHECK(std::string(out, 3) == "abc");
  b = std::move(moved);
  CHECK(b.path() == folder / "a");
  b.copy(out, 1, 2);
  CHECK(out[1] == 'c');
}

// The guard stands for copy() alone: another SIGBUS must still end the program, as before.
TEST_CASE("a SIGBUS that is not copy()'s goes to the handler that was there", "[core]") {
  TempFolder folder;
  write_bytes(folder / "a", std::string(8192, 'x'));
  const MappedFile installs_the_guard(folder / "a");
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    if (const int quiet = ::open("/dev/null", O_WRONLY); quiet >= 0) ::dup2(quiet, 2);
    const int fd = ::open((folder / "a").c_str(), O_RDWR);
    void* data = ::mmap(nullptr, 8192, PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED || ::ftruncate(fd, 0) != 0) ::_exit(0);
    (void)*static_cast<volatile char*>(data);
    ::_exit(0);  // reached only where the fault was swallowed
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  INFO("status " << status);
  // A sanitizer's own handler reports and exits; without one the signal itself ends the child.
  const bool ended = WIFSIGNALED(status) ? WTERMSIG(status) == SIGBUS || WTERMSIG(status) == SIGABRT
                                         : WEXITSTATUS(status) != 0;
  CHECK(ended);
}
