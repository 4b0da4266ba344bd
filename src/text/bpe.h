// Byte-pair encoding of one word (Sennrich et al. 2016, arXiv 1508.07909) over bytes: starting from
// single bytes, the pair of neighbours with the lowest rank is merged, the leftmost of equals
// first, until no pair has a rank.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace hgrn {

class Bpe {
 public:
  struct Merge {
    int32_t left, right, result;  // ids; the rank is the place in the list
  };
  // vocab[id]: the token's bytes. byte_ids[b]: the id of the single byte b. whole_words: tokens
  // that a word equal to them becomes without any merge.
  Bpe(std::vector<std::string> vocab, const int32_t (&byte_ids)[256], std::vector<Merge> merges,
      const std::vector<int32_t>& whole_words);

  // Buffers and caches of one thread; bounded.
  class Scratch {
   public:
    Scratch();
    ~Scratch();

   private:
    friend class Bpe;
    struct Impl;
    std::unique_ptr<Impl> impl_;
  };

  // Appends the tokens of `word`, one byte or more. Memory up to `readable_end` may be read.
  void encode(std::string_view word, const char* readable_end, Scratch& scratch,
              std::vector<int32_t>& out) const;

  const std::vector<std::string>& vocab() const { return vocab_; }
  const std::vector<Merge>& merges() const { return merges_; }
  bool has_whole_words() const { return !by_bytes_.empty(); }

 private:
  struct Slot {
    uint64_t pair = ~uint64_t(0);
    uint32_t rank = 0;
    int32_t result = 0;
  };
  static uint64_t key(int32_t left, int32_t right) {
    return uint64_t(uint32_t(left)) << 32 | uint32_t(right);
  }
  const Slot* find(int32_t left, int32_t right) const;
  void merge_short(std::string_view word, Scratch::Impl& s, std::vector<int32_t>& out) const;
  void merge_long(std::string_view word, Scratch::Impl& s, std::vector<int32_t>& out) const;
  void merge(std::string_view word, Scratch::Impl& s, std::vector<int32_t>& out) const;

  std::vector<std::string> vocab_;
  std::vector<Merge> merges_;
  int32_t byte_ids_[256];
  std::vector<Slot> slots_;  // open addressing
  uint64_t mask_ = 0;
  int shift_ = 0;
  std::unordered_map<std::string_view, int32_t> by_bytes_;  // whole_words
};

}  // namespace hgrn
