// Twin of Ops' copies between host and device (kernels/*/cuda_ops.cu, elementwise.cpp): every size
// around the one up to which an upload travels another way, at every place in memory.
#include <algorithm>
#include <array>

#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

TEST_CASE("memory: small uploads write what they should and nothing beside", "[ops][gpu]") {
  constexpr int64_t kRoom = 100;
  for (const Backend& backend : backends()) {
    Bench b(backend.open());
    const Tensor room = b.empty({kRoom}, DType::u8);
    for (int64_t size : {0, 1, 3, 8, 63, 64, 65, 80})
      for (int64_t at : {0, 1, 4, 15}) {
        INFO(backend.name << ", " << size << " bytes at " << at);
        std::array<uint8_t, kRoom> want, got, sent;
        want.fill(7);
        b->upload(room, want.data());
        for (size_t i = 0; i < size_t(size); ++i) sent[i] = want[size_t(at) + i] = uint8_t(100 + i);
        b->upload(room.slice(at, size), sent.data());
        sent.fill(0);  // the caller may change it at once
        b->download(got.data(), room);
        CHECK(got == want);
      }
  }
}
