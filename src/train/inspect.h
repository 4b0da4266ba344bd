// `hgrn inspect`: what a checkpoint, run folder, shard, metrics or safetensors file holds.
#pragma once
#include <string>

namespace hgrn {

// verify: checksums of checkpoints, all tokens of shards readable. Exit::data where it is damaged.
std::string inspect(const std::string& path, bool verify);

}  // namespace hgrn
