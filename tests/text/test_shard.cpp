#include "text/shard.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <thread>

#include "catch.h"
#include "fuzz/shard_target.h"
#include "text/shard_files.h"
#include "text/shard_format.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::vector<int32_t> read_all(const Shard& shard, int64_t vocab_size = 0) {
  std::vector<int32_t> tokens(static_cast<size_t>(shard.count()));
  shard.read(0, shard.count(), tokens.data(), vocab_size);
  return tokens;
}

void write_tokens(const std::string& path, bool wide, const std::vector<int32_t>& tokens) {
  ShardWriter writer(path, wide);
  writer.append(tokens);
  REQUIRE(writer.finish() == int64_t(tokens.size()));
}

}  // namespace

TEST_CASE("a narrow shard has exactly the bytes of the format", "[text]") {
  TempFolder folder;
  write_tokens(folder / "a.bin", false, {0, 1, 256, 65535});
  const std::string bytes = read_bytes(folder / "a.bin");
  CHECK(bytes == narrow_bytes({0, 1, 256, 65535}));
  REQUIRE(bytes.size() == 1024 + 8);
  CHECK(bytes.substr(0, 12) == std::string("\x88\xd8\x34\x01\x01\0\0\0\x04\0\0\0", 12));
  CHECK(bytes.substr(1024) == std::string("\0\0\1\0\0\1\xff\xff", 8));
  CHECK(folder.files() == 1);
}

TEST_CASE("a wide shard has exactly the bytes of the format", "[text]") {
  TempFolder folder;
  write_tokens(folder / "a.bin", true, {7, 65536, 0x7fffffff});
  CHECK(read_bytes(folder / "a.bin") == shard_bytes<uint32_t>({7, 65536, 0x7fffffff}, 20240801, 7));
  const Shard shard(folder / "a.bin");
  CHECK(shard.wide());
  CHECK(read_all(shard) == std::vector<int32_t>{7, 65536, 0x7fffffff});
}

TEST_CASE("shards in llm.c's format load, any range of them", "[text]") {
  TempFolder folder;
  write_range(folder / "a.bin", 100, 5000);
  const Shard shard(folder / "a.bin");
  CHECK(shard.count() == 5000);
  CHECK_FALSE(shard.wide());
  for (int64_t first : {0, 1, 511, 4999, 5000})
    for (int64_t count : {0, 1, 2, 1000}) {
      if (first + count > 5000) continue;
      std::vector<int32_t> out(size_t(count) + 1, -7);
      shard.read(first, count, out.data());
      for (int64_t i = 0; i < count; ++i) REQUIRE(out[size_t(i)] == 100 + first + i);
      CHECK(out.back() == -7);  // nothing behind the range is touched
    }
  std::vector<int32_t> out(8);
  CHECK(error_of([&] { shard.read(4999, 2, out.data()); }).code() == Exit::failed);
  CHECK(error_of([&] { shard.read(-1, 1, out.data()); }).code() == Exit::failed);
  CHECK(error_of([&] { shard.read(INT64_MAX, 1, out.data()); }).code() == Exit::failed);
  CHECK(error_of([&] { shard.read(1, INT64_MAX, out.data()); }).code() == Exit::failed);
}

TEST_CASE("a shard may be empty", "[text]") {
  TempFolder folder;
  write_tokens(folder / "a.bin", false, {});
  CHECK(Shard(folder / "a.bin").count() == 0);
}

TEST_CASE("the writer takes tokens in pieces larger than its buffer", "[text]") {
  TempFolder folder;
  std::vector<int32_t> all;
  {
    ShardWriter writer(folder / "a.bin", false);
    for (int piece = 0; piece < 9; ++piece) {
      std::vector<int32_t> tokens(100'003);
      for (size_t i = 0; i < tokens.size(); ++i)
        tokens[i] = int32_t((i * 7 + size_t(piece)) % 65536);
      writer.append(tokens);
      all.insert(all.end(), tokens.begin(), tokens.end());
    }
    CHECK(writer.finish() == 9 * 100'003);
  }
  CHECK(read_all(Shard(folder / "a.bin")) == all);
}

TEST_CASE("an unfinished writer leaves the old file and nothing else", "[text]") {
  TempFolder folder;
  write_bytes(folder / "a.bin", "the old one");
  {
    ShardWriter writer(folder / "a.bin", false);
    writer.append(std::vector<int32_t>{1, 2, 3});
    CHECK(folder.files() == 2);
  }
  CHECK(folder.files() == 1);
  CHECK(read_bytes(folder / "a.bin") == "the old one");
  write_tokens(folder / "a.bin", false, {5});
  CHECK(read_all(Shard(folder / "a.bin")) == std::vector<int32_t>{5});
}

TEST_CASE("the writer refuses tokens that do not fit and folders that are not there", "[text]") {
  TempFolder folder;
  {
    ShardWriter writer(folder / "a.bin", false);
    CHECK(has(error_of([&] { writer.append(std::vector<int32_t>{65536}); }), "65536"));
    CHECK(has(error_of([&] { writer.append(std::vector<int32_t>{-1}); }), "-1"));
  }
  const Error error = error_of([&] { ShardWriter(folder / "no/a.bin", false); });
  CHECK(error.code() == Exit::failed);
  CHECK(has(error, "no/a.bin"));
}

TEST_CASE("a full disk is an error with the file's name, and no shard appears", "[text]") {
  // /dev/full answers every write with ENOSPC.
  TempFolder folder;
  const std::string temp = fmt::format("{}.tmp-{}", folder / "a.bin", ::getpid());
  if (::symlink("/dev/full", temp.c_str()) != 0 || ::access("/dev/full", W_OK) != 0) {
    WARN("no /dev/full here: skipped");
    return;
  }
  ShardWriter writer(folder / "a.bin", false);
  writer.append(std::vector<int32_t>{1, 2, 3});
  const Error error = error_of([&] { writer.finish(); });
  CHECK(error.code() == Exit::failed);
  CHECK(has(error, "No space left"));
  CHECK(has(error, "a.bin"));
  CHECK_FALSE(std::filesystem::exists(folder / "a.bin"));
}

TEST_CASE("counts above 2^31 tokens are 64-bit all the way", "[text]") {
  TempFolder folder;
  for (const bool wide : {false, true}) {
    const std::string path = folder / (wide ? "wide.bin" : "narrow.bin");
    const int64_t count = (int64_t(1) << 32) + 12345, at = (int64_t(1) << 32) + 100;
    if (!write_sparse(path, count, wide)) {
      WARN("the file system holds no sparse file of " << count << " tokens: skipped");
      return;
    }
    const int32_t token = wide ? 100'000 : 40'000;
    const int fd = ::open(path.c_str(), O_WRONLY);
    REQUIRE(fd >= 0);
    const int64_t size = shard_format::token_bytes(wide);
    REQUIRE(::pwrite(fd, &token, size_t(size), 1024 + at * size) == size);
    ::close(fd);

    const Shard shard(path);
    CHECK(shard.count() == count);
    std::vector<int32_t> out(3);
    shard.read(at - 1, 3, out.data());
    CHECK(out == std::vector<int32_t>{0, token, 0});
    const Error error = error_of([&] { shard.read(at - 1, 3, out.data(), token); });
    CHECK(error.code() == Exit::data);
    CHECK(has(error, fmt::format("token {} ", at)));
    CHECK(has(error, fmt::format("offset {}", 1024 + at * size)));
  }
}

TEST_CASE("damaged shards are refused with file and offset", "[text]") {
  TempFolder folder;
  const std::string good = narrow_bytes({1, 2, 3, 4});
  const auto with_count = [&](int64_t count) {
    std::string bytes = good;
    std::memcpy(bytes.data() + 8, &count, 8);
    return bytes;
  };
  const auto with_byte = [&](size_t at, char value) {
    std::string bytes = good;
    bytes[at] = value;
    return bytes;
  };
  struct Case {
    std::string bytes, says;
  };
  std::vector<Case> cases = {
      {"", "offset 0"},
      {good.substr(0, 1023), "offset 1023"},
      {with_byte(0, 'x'), "offset 0"},
      {with_byte(4, 2), "version 2 at offset 4"},
      {good.substr(0, good.size() - 2), "truncated"},
      {good.substr(0, good.size() - 1), "offset 8"},
      {good + "??", "too long"},
      {good + "?", "offset 8"},
      {with_count(-1), "offset 8"},
      {with_count(INT64_MAX), "truncated"},
      {with_count(INT64_MIN + 4), "offset 8"},
      {with_count(INT64_MAX - 507), "offset 8"},
      {with_count((int64_t(1) << 32) + 4), "4294967300 tokens"},
  };
  for (const Case& c : cases) {
    write_bytes(folder / "bad.bin", c.bytes);
    const Error error = error_of([&] { Shard(folder / "bad.bin"); });
    INFO(error.what());
    CHECK(error.code() == Exit::data);
    CHECK(has(error, "bad.bin"));
    CHECK(has(error, c.says));
  }
  CHECK(error_of([&] { Shard(folder / "absent.bin"); }).code() == Exit::data);
  const Error error = error_of([&] { Shard(folder / ""); });  // the folder itself
  CHECK(error.code() == Exit::data);
  CHECK(has(error, "not a regular file"));
}

TEST_CASE("a token outside the vocabulary is refused with its place", "[text]") {
  TempFolder folder;
  write_bytes(folder / "a.bin", narrow_bytes({1, 2, 300, 4, 500}));
  const Shard shard(folder / "a.bin");
  std::vector<int32_t> out(5);
  shard.read(0, 5, out.data(), 501);
  shard.read(0, 2, out.data(), 3);
  const Error error = error_of([&] { shard.read(1, 4, out.data(), 300); });
  CHECK(error.code() == Exit::data);
  for (const char* part : {"a.bin", "token 2 ", "offset 1028", " 300", "vocabulary of 300"}) {
    INFO(error.what());
    CHECK(has(error, part));
  }
  // An id that int32 cannot hold, with and without a vocabulary.
  write_bytes(folder / "w.bin", shard_bytes<uint32_t>({5, 0x80000000u}, 20240801, 7));
  const Shard wide(folder / "w.bin");
  CHECK(error_of([&] { wide.read(0, 2, out.data()); }).code() == Exit::data);
  CHECK(has(error_of([&] { wide.read(0, 2, out.data(), 100'000); }), "2147483648"));
}

TEST_CASE("the shard fuzzer's corpus keeps the reader's promises", "[text]") {
  int replayed = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(HGRN_SOURCE_DIR "/tests/fuzz/corpus/shard")) {
    const std::string bytes = read_bytes(entry.path().string());
    fuzz::shard(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());  // aborts if not
    ++replayed;
  }
  CHECK(replayed >= 11);
}

TEST_CASE("a shard that shrinks while it is mapped is an error, not a signal", "[text]") {
  TempFolder folder;
  constexpr int kCount = 60'000;
  for (const int64_t left : {int64_t(0), int64_t(1024 + 2 * 1000), int64_t(1024 + 2 * 59'990)}) {
    write_range(folder / "a.bin", 0, kCount);
    const Shard shard(folder / "a.bin");
    std::vector<int32_t> out(kCount);
    shard.read(0, kCount, out.data());
    REQUIRE(::truncate((folder / "a.bin").c_str(), left) == 0);
    // Twice, and from another thread: the guard is left in order.
    for (int time = 0; time < 2; ++time) {
      const Error error = error_of([&] { shard.read(0, kCount, out.data()); });
      INFO(error.what());
      CHECK(error.code() == Exit::data);
      CHECK(has(error, "a.bin shrank while it was read"));
    }
    Error other(Exit::ok, "");
    std::thread([&] { other = error_of([&] { shard.read(59'995, 5, out.data()); }); }).join();
    CHECK(other.code() == Exit::data);
    if (left > 1024) shard.read(0, 1000, out.data());  // what is still there can be read
  }
}

TEST_CASE("a shard replaced or removed under its name is still read whole", "[text]") {
  TempFolder folder;
  write_range(folder / "a.bin", 0, 3000);
  const Shard shard(folder / "a.bin");
  write_range(folder / "b.bin", 7, 10);
  std::filesystem::rename(folder / "b.bin", folder / "a.bin");
  std::vector<int32_t> out(3000);
  shard.read(0, 3000, out.data());
  CHECK(out[2999] == 2999);
  std::filesystem::remove(folder / "a.bin");
  shard.read(0, 3000, out.data());
  CHECK(out[2999] == 2999);
}

TEST_CASE("many threads read one shard at once", "[text]") {
  TempFolder folder;
  write_range(folder / "a.bin", 0, 65'536);
  const Shard shard(folder / "a.bin");
  std::vector<int> wrong(4, -1);
  std::vector<std::thread> threads;
  for (size_t k = 0; k < 4; ++k)
    threads.emplace_back([&, k] {
      std::vector<int32_t> out(64);
      int bad = 0;
      for (int i = 0; i < 2000; ++i) {
        const int64_t first = (i * 31 + int64_t(k) * 977) % (65'536 - 64);
        shard.read(first, 64, out.data());
        bad += out[0] != first || out[63] != first + 63;
      }
      wrong[k] = bad;
    });
  for (std::thread& t : threads) t.join();
  CHECK(wrong == std::vector<int>(4, 0));
}

TEST_CASE("globs are sorted, and one without a match names its key", "[text]") {
  TempFolder folder;
  for (const char* name : {"b_2.bin", "b_10.bin", "a.bin", "B.bin", "c[1].bin", "b_3.bin.tmp-9"})
    write_bytes(folder / name, "");
  const auto in = [&](std::vector<std::string> names) {
    for (std::string& name : names) name = folder / name;
    return names;
  };
  CHECK(expand_glob(folder / "*.bin", "k") ==
        in({"B.bin", "a.bin", "b_10.bin", "b_2.bin", "c[1].bin"}));
  CHECK(expand_glob(folder / "{a,B}.bin", "k") == in({"B.bin", "a.bin"}));
  CHECK(expand_glob(folder / "c[1].bin", "k") == in({"c[1].bin"}));  // it exists as it is
  const Error error = error_of([&] { expand_glob(folder / "z*.bin", "data.train"); });
  CHECK(error.code() == Exit::data);
  CHECK(has(error, "z*.bin"));
  CHECK(has(error, "data.train"));
}
