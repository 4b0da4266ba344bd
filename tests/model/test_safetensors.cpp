#include "model/safetensors.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "catch.h"
#include "temp_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::string file_bytes(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

template <class T>
std::string raw(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

TensorInfo declare(const std::string& name, const std::string& dtype, const Shape& shape) {
  TensorInfo t;
  t.name = name, t.dtype = dtype, t.shape = shape;
  return t;
}

void write_one(const std::string& path, const std::string& name, const Shape& shape,
               const std::vector<float>& values) {
  SafetensorsWriter out(path, {declare(name, "F32", shape)}, {});
  out.write(values.data(), values.size() * 4);
  out.finish();
}

}  // namespace

TEST_CASE("a safetensors file comes back as written", "[model]") {
  TempFolder tmp;
  const std::string path = tmp / "m.safetensors";
  const std::vector<float> a = {1, -0.0f, 3.5f, std::numeric_limits<float>::denorm_min(), 5, 6};
  const std::vector<double> b = {M_PI};
  const std::vector<uint8_t> c = {1, 2, 3};
  SafetensorsWriter out(path,
                        {declare("z.first", "F32", {2, 3}), declare("scalar", "F64", {}),
                         declare("bytes", "U8", {3}), declare("nothing", "F32", {0, 7})},
                        {{"format", "pt"}, {"quote\"", "\xc3\xa9\n"}});
  out.write(a.data(), 8);
  out.write(a.data() + 2, 16);
  out.write(b.data(), 8);
  out.write(c.data(), 3);
  out.finish();
  CHECK(out.hash() == xxh3_file(path));
  CHECK(out.size() == file_size(path));

  const SafetensorsReader in(path);
  CHECK(in.metadata().at("format") == "pt");
  CHECK(in.metadata().at("quote\"") == "\xc3\xa9\n");
  REQUIRE(in.tensors().size() == 4);
  REQUIRE(in.find("z.first"));
  CHECK(in.find("z.first")->shape == Shape{2, 3});
  CHECK(in.find("absent") == nullptr);
  std::vector<float> got(6);
  in.read_f32(*in.find("z.first"), got.data());
  CHECK(raw(got) == raw(a));  // bits, so -0.0 counts
  float two[2];
  in.read_f32(*in.find("z.first"), two, 3, 2);
  CHECK(two[0] == a[3]);
  CHECK(two[1] == a[4]);
  double pi = 0;
  in.read_f64(*in.find("scalar"), &pi);
  CHECK(pi == M_PI);
  uint8_t three[3];
  in.read_raw(*in.find("bytes"), three);
  CHECK(three[2] == 3);
  in.read_f32(*in.find("nothing"), nullptr);
  CHECK(thrown_by([&] { in.read_f32(*in.find("bytes"), got.data()); }).code == Exit::data);
  CHECK(thrown_by([&] { in.read_f32(*in.find("z.first"), got.data(), 5, 2); }).code ==
        Exit::failed);
}

TEST_CASE("the written bytes are those of the format", "[model]") {
  TempFolder tmp;
  write_one(tmp / "m", "w", {2}, {1.0f, 2.0f});
  const std::string header = R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  const std::string padded = header + std::string((8 - header.size() % 8) % 8, ' ');
  CHECK(slurp(tmp / "m") == file_bytes(padded, raw<float>({1, 2})));
}

TEST_CASE("16-bit and double tensors are converted", "[model]") {
  TempFolder tmp;
  const std::string header = R"({"bf":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]},)"
                             R"("h":{"dtype":"F16","shape":[5],"data_offsets":[8,18]},)"
                             R"("d":{"dtype":"F64","shape":[1],"data_offsets":[18,26]}})";
  const std::vector<uint16_t> bf = {0x3f80, 0xc000, 0x7fc0, 0x0001};
  const std::vector<uint16_t> half = {0x3c00, 0x0001, 0x7c00, 0xfbff, 0x3555};
  spill(tmp / "m", file_bytes(header, raw(bf) + raw(half) + raw<double>({0.1})));
  const SafetensorsReader in(tmp / "m");
  float f[5];
  double d[5];
  in.read_f32(*in.find("bf"), f);
  CHECK(f[0] == 1.0f);
  CHECK(f[1] == -2.0f);
  CHECK(std::isnan(f[2]));
  CHECK(f[3] == std::ldexp(1.0f, -133));
  in.read_f64(*in.find("h"), d);
  CHECK(d[0] == 1.0);
  CHECK(d[1] == std::ldexp(1.0, -24));
  CHECK(std::isinf(d[2]));
  CHECK(d[3] == -65504.0);
  CHECK(d[4] == 1365.0 / 4096.0);
  in.read_f32(*in.find("d"), f);
  CHECK(f[0] == 0.1f);
  in.read_f32(*in.find("h"), f, 3, 1);
  CHECK(f[0] == -65504.0f);
}

TEST_CASE("a conversion longer than its buffer is seamless", "[model]") {
  TempFolder tmp;
  std::vector<uint16_t> values(700001);
  for (size_t i = 0; i < values.size(); ++i) values[i] = uint16_t(i * 7919);
  SafetensorsWriter out(tmp / "m", {declare("w", "BF16", {int64_t(values.size())})}, {});
  out.write(values.data(), values.size() * 2);
  out.finish();
  const SafetensorsReader in(tmp / "m");
  std::vector<double> got(values.size());
  in.read_f64(*in.find("w"), got.data());
  size_t wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double want = bf16_to_float(values[i]);
    wrong += !(got[i] == want || (std::isnan(got[i]) && std::isnan(want)));
  }
  CHECK(wrong == 0);
}

TEST_CASE("a header that lies is refused", "[model]") {
  struct Lie {
    const char* header;
    size_t data;
    const char* message;
  };
  const std::vector<Lie> lies = {
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4, "tensor a"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 12, "follow the last tensor"},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8, "needs 12 bytes"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, "data_offsets [8, 0]"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, "a hole"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[5],"data_offsets":[3,8]}})",
       8, "overlap"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[3],"data_offsets":[5,8]}})",
       8, "a hole"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
       8, "tensor a is described twice"},
      {R"({"a":{"dtype":"U8","shape":[8],"shape":[8],"data_offsets":[0,8]}})", 8, "shape twice"},
      {R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8, "negative number -2"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0,
       "overflows 64 bits"},
      {R"({"a":{"dtype":"XX","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0,
       "overflows 64 bits"},
      {R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,0]}})", 0, "axis of"},
      {R"({"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,0]}})", 0,
       "fraction"},
      {R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1],"data_offsets":[0,1]}})", 1, "more than 5 axes"},
      {R"({"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", 1, "fraction"},
      {R"({"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}})", 1, "a string"},
      {R"({"a":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}})", 1, "an array"},
      {R"({"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})", 1, "a number"},
      {R"({"a":{"dtype":1,"shape":[1],"data_offsets":[0,1]}})", 1, "a number"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, "lacks"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}})", 1, "more than two"},
      {R"({"a":{"dtype":"U8","shape":[1]}})", 1, "lacks"},
      {R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1, "lacks"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}})", 1, "unknown field"},
      {R"({"a":7})", 0, "a number"},
      {R"({"__metadata__":{"a":{}}})", 0, "an object"},
      {R"({"__metadata__":{"a":1}})", 0, "a number"},
      {R"({"__metadata__":{"a":"1","a":"2"}})", 0, "twice"},
      {R"({"a":)", 0, "not valid JSON"},
      {R"({} {})", 0, "not valid JSON"},
      {R"([])", 0, "does not start"},
      {"", 0, "does not start"},
      {R"(null)", 0, "does not start"},
  };
  TempFolder tmp;
  for (const Lie& lie : lies) {
    INFO(lie.header);
    spill(tmp / "m", file_bytes(lie.header, std::string(lie.data, 'x')));
    const Thrown t = thrown_by([&] { SafetensorsReader in(tmp / "m"); });
    CHECK(t.code == Exit::data);
    CHECK(t.has(tmp / "m"));
    INFO(t.text);
    CHECK(t.has(lie.message));
  }
}

TEST_CASE("lengths beyond the file, and deep JSON, are refused before they cost memory",
          "[model]") {
  TempFolder tmp;
  const auto refused = [&](const std::string& bytes, const char* message) {
    spill(tmp / "m", bytes);
    const Thrown t = thrown_by([&] { SafetensorsReader in(tmp / "m"); });
    INFO(t.text);
    CHECK(t.code == Exit::data);
    CHECK(t.has(message));
  };
  refused("", "too few");
  refused("1234567", "too few");
  refused(std::string(8, '\xff'), "at most 100000000");
  refused(raw<uint64_t>({100'000'001}) + "{}", "at most 100000000");
  refused(raw<uint64_t>({3}) + "{}", "cut short");
  refused(file_bytes("{\"a\":" + std::string(200000, '['), ""), "an array");
  std::string objects;
  for (int i = 0; i < 50000; ++i) objects += "{\"a\":";
  refused(file_bytes(objects, ""), "unknown field");
  refused(file_bytes("{\"a\":{\"shape\":{", ""), "an object");
  CHECK(thrown_by([&] { SafetensorsReader in(tmp / "none"); }).code == Exit::data);
}

TEST_CASE("an unknown dtype is only an error when it is read", "[model]") {
  TempFolder tmp;
  spill(tmp / "m", file_bytes(R"({"q":{"dtype":"F4","shape":[5],"data_offsets":[0,3]}})", "abc"));
  const SafetensorsReader in(tmp / "m");
  float f[5];
  const Thrown t = thrown_by([&] { in.read_f32(*in.find("q"), f); });
  CHECK(t.code == Exit::data);
  CHECK(t.has("tensor q is F4"));
}

TEST_CASE("every truncation of a file is refused, and no changed byte does harm", "[model]") {
  TempFolder tmp;
  write_one(tmp / "m", "layer.weight", {3, 2}, {1, 2, 3, 4, 5, 6});
  const std::string good = slurp(tmp / "m");
  for (size_t n = 0; n < good.size(); ++n) {
    spill(tmp / "cut", good.substr(0, n));
    CHECK(thrown_by([&] { SafetensorsReader in(tmp / "cut"); }).code == Exit::data);
  }
  for (size_t i = 0; i < good.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[i] = char(bad[i] ^ (1 << bit));
      spill(tmp / "flip", bad);
      const Thrown t = thrown_by([&] {
        const SafetensorsReader in(tmp / "flip");
        std::vector<float> out(64);
        for (const TensorInfo& info : in.tensors())
          if (info.shape.numel() <= 64) in.read_f32(info, out.data());
      });
      if (t.code != Exit::ok && t.code != Exit::data) FAIL("byte " << i << ": " << t.text);
    }
}

TEST_CASE("the writer holds its caller to what was declared", "[model]") {
  TempFolder tmp;
  CHECK(thrown_by([&] {
          SafetensorsWriter out(tmp / "a", {declare("w", "F32", {2})}, {});
          out.write("12345678", 8);
          out.write("9", 1);
        }).has("more data"));
  CHECK(thrown_by([&] {
          SafetensorsWriter out(tmp / "a", {declare("w", "F32", {2})}, {});
          out.finish();
        }).has("0 bytes written"));
  CHECK(thrown_by([&] {
          SafetensorsWriter out(tmp / "a", {declare("w", "U8", {}), declare("w", "U8", {})}, {});
        }).has("twice"));
  CHECK(thrown_by([&] {
          SafetensorsWriter out(tmp / "a", {declare("w", "F5", {})}, {});
        }).has("unknown dtype"));
  CHECK(thrown_by([&] {
          SafetensorsWriter out(tmp / "a", {declare("\xff", "U8", {})}, {});
        }).has("UTF-8"));
  CHECK_FALSE(exists(tmp / "a"));
}

TEST_CASE("a model folder is one file or shards with an index", "[model]") {
  TempFolder tmp;
  const auto values = [](const ModelFolder& m, const char* name) {
    std::vector<float> out(2);
    m.read_f32(name, {2}, out.data());
    return out;
  };
  SECTION("one file") {
    write_one(tmp / "model.safetensors", "w", {2}, {1, 2});
    const ModelFolder m(tmp.path());
    CHECK(m.names() == std::vector<std::string>{"w"});
    CHECK(values(m, "w") == std::vector<float>{1, 2});
    const Thrown shape = thrown_by([&] { m.read_f32("w", {2, 1}, nullptr); });
    CHECK(shape.code == Exit::data);
    CHECK(shape.has("tensor w has shape (2), (2, 1) is expected"));
    CHECK(thrown_by([&] { m.read_f32("v", {2}, nullptr); }).has("tensor v is missing"));
  }
  SECTION("shards") {
    write_one(tmp / "model-00001-of-00002.safetensors", "a", {2}, {1, 2});
    write_one(tmp / "model-00002-of-00002.safetensors", "b", {2}, {3, 4});
    const std::string index = tmp / "model.safetensors.index.json";
    spill(index, R"({"metadata":{"total_size":16},"weight_map":{
      "b":"model-00002-of-00002.safetensors","a":"model-00001-of-00002.safetensors"}})");
    {
      const ModelFolder m(tmp.path());
      CHECK(m.names() == std::vector<std::string>{"a", "b"});
      CHECK(values(m, "a") == std::vector<float>{1, 2});
      CHECK(values(m, "b") == std::vector<float>{3, 4});
    }
    const auto refused = [&](const char* text, const char* message) {
      spill(index, text);
      const Thrown t = thrown_by([&] { ModelFolder m(tmp.path()); });
      INFO(t.text);
      CHECK(t.code == Exit::data);
      CHECK(t.has(message));
    };
    refused(R"({"weight_map":{"a":"model-00002-of-00002.safetensors"}})", "a is not in");
    refused(R"({"weight_map":{"a":"none.safetensors"}})", "No such file");
    refused(R"({"weight_map":{"a":"../x.safetensors"}})", "not a file name");
    refused(R"({"weight_map":{"a":1}})", "not a string");
    refused(R"({"weight_map":[]})", "weight_map");
    refused(R"([])", "weight_map");
    refused("", "JSON");
  }
  SECTION("neither") {
    CHECK(thrown_by([&] { ModelFolder m(tmp.path()); }).code == Exit::data);
    CHECK(thrown_by([&] { ModelFolder m(tmp / "none"); }).code == Exit::data);
  }
}
