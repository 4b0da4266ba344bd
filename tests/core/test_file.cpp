#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <vector>

#include "catch.h"
#include "core/fault.h"
#include "core/file.h"
#include "core/json_text.h"
#include "temp_folder.h"

#include <nlohmann/json.hpp>

using namespace hgrn;
using namespace hgrn::test;

namespace {
size_t entries(const std::string& folder) {
  return size_t(std::distance(std::filesystem::directory_iterator(folder), {}));
}
}  // namespace

TEST_CASE("files come back as written, and replacing one leaves nothing else", "[core]") {
  TempFolder tmp;
  const std::string path = tmp / "a file \xc3\xa9.bin";
  const std::string bytes("x\0y\n\xff", 5);
  for (const std::string& content : {bytes, std::string(), std::string(3 << 20, 'z')}) {
    write_file_atomic(path, content);
    CHECK(read_file(path, 10 << 20) == content);
    CHECK(file_size(path) == content.size());
    CHECK(entries(tmp.path()) == 1);
  }
  copy_file_synced(path, tmp / "copy");
  CHECK(slurp(tmp / "copy") == slurp(path));
}

TEST_CASE("reading what is not there is an error that names it", "[core]") {
  TempFolder tmp;
  const Thrown missing = thrown_by([&] { read_file(tmp / "none", 10); });
  CHECK(missing.code == Exit::data);
  CHECK(missing.has(tmp / "none"));
  CHECK(missing.has("No such file"));
  CHECK(thrown_by([&] { read_file(tmp.path(), 10); }).has("folder"));
  write_file_atomic(tmp / "ten", "0123456789");
  CHECK(read_file(tmp / "ten", 10).size() == 10);
  CHECK(read_file(tmp / "ten", UINT64_MAX).size() == 10);
  CHECK(thrown_by([&] { read_file(tmp / "ten", 9); }).code == Exit::data);
  CHECK(thrown_by([&] { xxh3_file(tmp / "none"); }).code == Exit::data);
  const Fd fd = open_for_read(tmp / "ten");
  char out[20];
  const Thrown cut = thrown_by([&] { pread_exact(fd, "ten", out, 8, 5); });
  CHECK(cut.code == Exit::data);
  CHECK(cut.has("ends at byte 10"));
}

TEST_CASE("checksums are XXH3 with 64 bits", "[core]") {
  CHECK(hex16(xxh3("", 0)) == "2d06800538d394c2");
  CHECK(hex16(xxh3("a", 1)) == "e6c632b61e964e1f");
  CHECK(hex16(xxh3("abc", 3)) == "78af5f94892f3950");
  TempFolder tmp;
  std::string big((5 << 20) + 13, '\0');
  for (size_t i = 0; i < big.size(); ++i) big[i] = char(i * 2654435761u >> 13);
  spill(tmp / "big", big);
  CHECK(xxh3_file(tmp / "big") == xxh3(big.data(), big.size()));
  FileWriter out(tmp / "stream");
  for (size_t at = 0; at < big.size(); at += 99991)
    out.write(big.data() + at, std::min<size_t>(99991, big.size() - at));
  out.finish();
  CHECK(out.hash() == xxh3_file(tmp / "stream"));
  CHECK(out.size() == big.size());
}

TEST_CASE("an unfinished stream leaves no file, and none is overwritten", "[core]") {
  TempFolder tmp;
  {
    FileWriter out(tmp / "part");
    out.write("abc", 3);
    CHECK(exists(tmp / "part"));
  }
  CHECK_FALSE(exists(tmp / "part"));
  spill(tmp / "there", "old");
  CHECK(thrown_by([&] { FileWriter again(tmp / "there"); }).code == Exit::failed);
  CHECK(slurp(tmp / "there") == "old");
}

TEST_CASE("a file that cannot grow is an error, and the old one stays", "[core]") {
  TempFolder tmp;
  write_file_atomic(tmp / "f", "old");
  const Child child = run_in_child([&] {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100000, 100000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    write_file_atomic(tmp / "f", std::string(200000, 'x'));
  });
  REQUIRE(child.exited());
  CHECK(child.thrown.code == Exit::failed);
  CHECK(child.thrown.has("File too large"));
  CHECK(slurp(tmp / "f") == "old");
  CHECK(entries(tmp.path()) == 1);
}

TEST_CASE("a full disk is named as such, with the bytes needed", "[core]") {
  TempFolder tmp;
  const Child child = run_in_child([&] {
    // A mount of our own, which ends with this process.
    if (::unshare(CLONE_NEWNS) != 0 || ::mount("", "/", "", MS_REC | MS_PRIVATE, nullptr) != 0 ||
        ::mount("tmpfs", tmp.path().c_str(), "tmpfs", 0, "size=1m") != 0)
      fail(Exit::usage, "no tmpfs");
    write_file_atomic(tmp / "f", "old");
    const Thrown t = thrown_by([&] { write_file_atomic(tmp / "f", std::string(2000000, 'x')); });
    check(slurp(tmp / "f") == "old" && entries(tmp.path()) == 1, "the old file was touched");
    throw Error(t.code, t.text);
  });
  REQUIRE(child.exited());
  if (child.thrown.code == Exit::usage) {
    WARN("skipped: no right to mount a tmpfs");
    return;
  }
  CHECK(child.thrown.code == Exit::failed);
  CHECK(child.thrown.has("disk is full"));
  CHECK(child.thrown.has("2000000 bytes needed"));
}

TEST_CASE("a read-only folder is an error that names it", "[core]") {
  TempFolder tmp;
  ::chmod(tmp.path().c_str(), 0555);
  const Child child = run_in_child([&] {
    if (::geteuid() == 0) check(::setuid(65534) == 0, "cannot become an ordinary user");
    write_file_atomic(tmp / "f", "x");
  });
  ::chmod(tmp.path().c_str(), 0755);
  CHECK(child.thrown.code == Exit::failed);
  CHECK(child.thrown.has("Permission denied"));
  CHECK(child.thrown.has(tmp.path()));
}

namespace {

void one_writer(FileLock::Method method) {
  TempFolder tmp;
  {
    FileLock lock(tmp.path(), method);
    const Child second = run_in_child([&] { FileLock other(tmp.path(), method); });
    REQUIRE(second.exited());
    CHECK(second.thrown.code == Exit::failed);
    CHECK(second.thrown.has("process " + std::to_string(::getpid()) + " on "));
    CHECK(second.thrown.has("--out"));
    CHECK(thrown_by([&] { FileLock same_process(tmp.path(), method); }).code == Exit::failed);
  }
  CHECK(run_in_child([&] { FileLock next(tmp.path(), method); }).thrown.code == Exit::ok);
  CHECK(entries(tmp.path()) <= 1);
}

void dead_owner(FileLock::Method method) {
  TempFolder tmp;
  const Child dead = run_in_child([&] {
    FileLock lock(tmp.path(), method);
    ::kill(::getpid(), SIGKILL);
  });
  REQUIRE(dead.killed());
  REQUIRE(exists(tmp / ".lock"));
  CHECK(thrown_by([&] { FileLock lock(tmp.path(), method); }).code == Exit::ok);
  if (method == FileLock::Method::pid) {
    char host[256] = {};
    ::gethostname(host, sizeof host - 1);
    const std::string alive = "pid " + std::to_string(::getppid()) + "\nhost ";
    spill(tmp / ".lock", alive + host + "\nstarted then\n");  // alive, birth unknown
    CHECK(thrown_by([&] { FileLock lock(tmp.path(), method); }).code == Exit::failed);
    spill(tmp / ".lock", alive + host + "\nstarted then\nborn 1\n");  // the pid was reused
    CHECK(thrown_by([&] { FileLock lock(tmp.path(), method); }).code == Exit::ok);
    spill(tmp / ".lock", alive + "elsewhere\nstarted then\nborn 1\n");
    const Thrown elsewhere = thrown_by([&] { FileLock lock(tmp.path(), method); });
    CHECK(elsewhere.code == Exit::failed);
    CHECK(elsewhere.has("remove the file"));
  }
}

}  // namespace

TEST_CASE("a run folder has one writer", "[core]") {
  one_writer(FileLock::Method::flock);
  one_writer(FileLock::Method::pid);
}

TEST_CASE("the lock of a dead process does not hold", "[core]") {
  dead_owner(FileLock::Method::flock);
  dead_owner(FileLock::Method::pid);
}

TEST_CASE("a run folder that cannot be locked is an error", "[core]") {
  TempFolder tmp;
  CHECK(thrown_by([&] { FileLock lock(tmp / "none"); }).code == Exit::failed);
}

TEST_CASE("fault points kill at the wanted passage only", "[core]") {
  const auto run = [](const char* fault, int passages) {
    return run_in_child([&] {
      ::setenv("HGRN_FAULT", fault, 1);
      for (int i = 0; i < passages; ++i) fault_point("here");
      check(!fault_switch("here") && fault_switch("odd") == (std::string(fault) == "x,+odd"),
            "switches and points are mixed up");
    });
  };
  CHECK(run("here", 1).killed());
  CHECK(run("there,here", 1).killed());
  CHECK(run("here:3", 3).killed());
  for (const char* fault : {"here:3", "her", "here2", "", "+here2", "x,+odd"}) {
    const Child c = run(fault, 2);
    CHECK(c.exited());
    CHECK(c.thrown.code == Exit::ok);
  }
}

TEST_CASE("JSON is read strictly", "[core]") {
  CHECK(parse_json(R"({"a": {"a": 1}, "b": [1, {"a": 2}]})", "f")["b"][1]["a"] == 2);
  CHECK(parse_json("{} // why", "f", /*comments=*/true).empty());
  const Thrown twice = thrown_by([] { parse_json(R"({"a": 1, "b": {"c": 1, "c": 2}})", "f"); });
  CHECK(twice.code == Exit::data);
  CHECK(twice.has("\"c\" appears twice"));
  for (const std::string& bad :
       {std::string("{"), std::string(), std::string("{} x"), std::string("[1e999]"),
        std::string("\"\xff\""), std::string("{} // no"), std::string(100000, '['),
        std::string(65, '[') + std::string(65, ']')})
    CHECK(thrown_by([&] { parse_json(bad, "f"); }).code == Exit::data);
  CHECK(parse_json(std::string(64, '[') + std::string(64, ']'), "f").size() == 1);
}
