#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace hgrn {
namespace {

constexpr uint64_t kNone = ~uint64_t(0);
constexpr size_t kShort = 48;  // bytes of a word up to which scanning all pairs beats a heap

// Words seen before and their tokens. Direct-mapped: a new word takes the place of an old one, so
// that memory is bounded. An entry holds words below `KeyBytes` bytes and up to `Tokens` tokens.
template <size_t KeyBytes, size_t Tokens>
class WordCache {
 public:
  static constexpr size_t kLongest = KeyBytes - 1;
  struct Entry {
    char key[KeyBytes];  // the bytes, zeros, and the length in the last one; length 0: empty
    int32_t tokens[Tokens];
    int32_t count;
  };
  explicit WordCache(int log2_entries)
      : entries_(size_t(1) << log2_entries, Entry{}), shift_(64 - log2_entries) {}

  Entry& entry(const char (&key)[KeyBytes]) {
    uint64_t h = 0, part;
    for (size_t i = 0; i < KeyBytes; i += 8) {
      std::memcpy(&part, key + i, 8);
      h = (std::rotl(h, 29) ^ part) * 0x9e3779b97f4a7c15u;
    }
    return entries_[(h ^ h >> 32) * 0xd6e8feb86659fd93u >> shift_];
  }

 private:
  std::vector<Entry> entries_;
  int shift_;
};

}  // namespace

struct Bpe::Scratch::Impl {
  WordCache<16, 3> short_words{15};  // 32 bytes each: 1 MiB
  WordCache<64, 15> long_words{12};  // 128 bytes each: 512 KiB
  struct Symbol {
    int32_t id;
    bool gone;  // merged into the one before it
    int64_t prev, next;
  };
  std::vector<Symbol> symbols;
  struct Candidate {
    uint32_t rank;
    int32_t result;
    int64_t at;
    bool operator<(const Candidate& o) const {  // of a heap whose top is the least
      return rank != o.rank ? rank > o.rank : at > o.at;
    }
  };
  std::vector<Candidate> heap;
};

Bpe::Scratch::Scratch() : impl_(std::make_unique<Impl>()) {}
Bpe::Scratch::~Scratch() = default;

Bpe::Bpe(std::vector<std::string> vocab, const int32_t (&byte_ids)[256], std::vector<Merge> merges,
         const std::vector<int32_t>& whole_words)
    : vocab_(std::move(vocab)), merges_(std::move(merges)) {
  std::copy_n(byte_ids, 256, byte_ids_);
  const size_t size = std::bit_ceil(std::max<size_t>(16, 2 * merges_.size()));
  slots_.resize(size);
  mask_ = size - 1;
  shift_ = 64 - std::countr_zero(size);
  for (size_t rank = 0; rank < merges_.size(); ++rank) {
    const Merge& m = merges_[rank];
    const uint64_t pair = key(m.left, m.right);
    size_t at = size_t(pair * 0x9e3779b97f4a7c15u >> shift_);
    while (slots_[at].pair != kNone && slots_[at].pair != pair) at = (at + 1) & mask_;
    slots_[at] = {pair, uint32_t(rank), m.result};  // of equal pairs the last one counts
  }
  for (int32_t id : whole_words) by_bytes_.emplace(vocab_[size_t(id)], id);
}

const Bpe::Slot* Bpe::find(int32_t left, int32_t right) const {
  const uint64_t pair = key(left, right);
  for (size_t at = size_t(pair * 0x9e3779b97f4a7c15u >> shift_);; at = (at + 1) & mask_) {
    const Slot& slot = slots_[at];
    if (slot.pair == pair) return &slot;
    if (slot.pair == kNone) return nullptr;
  }
}

void Bpe::encode(std::string_view word, const char* readable_end, Scratch& scratch,
                 std::vector<int32_t>& out) const {
  Scratch::Impl& s = *scratch.impl_;
  const auto cached = [&](auto& cache, auto& key) {
    auto& entry = cache.entry(key);
    if (std::memcmp(entry.key, key, sizeof key) == 0) {
      out.insert(out.end(), entry.tokens, entry.tokens + entry.count);
      return;
    }
    const size_t start = out.size();
    merge(word, s, out);
    const size_t count = out.size() - start;
    if (count > std::size(entry.tokens)) return;
    std::memcpy(entry.key, key, sizeof key);
    std::copy_n(out.data() + start, count, entry.tokens);
    entry.count = int32_t(count);
  };
  if (word.size() <= s.short_words.kLongest) {
    char key[16];
    if (readable_end - word.data() >= 16) {
      uint64_t half[2];
      std::memcpy(half, word.data(), 16);
      const size_t bits = 8 * word.size();  // 8 to 120
      if (bits <= 64) {
        half[0] &= ~uint64_t(0) >> (64 - bits);
        half[1] = 0;
      } else {
        half[1] &= ~uint64_t(0) >> (128 - bits);
      }
      std::memcpy(key, half, 16);
    } else {
      std::memset(key, 0, sizeof key);
      std::memcpy(key, word.data(), word.size());
    }
    key[15] = char(word.size());
    cached(s.short_words, key);
  } else if (word.size() <= s.long_words.kLongest) {
    char key[64] = {};
    std::memcpy(key, word.data(), word.size());
    key[63] = char(word.size());
    cached(s.long_words, key);
  } else {
    merge(word, s, out);
  }
}

void Bpe::merge(std::string_view word, Scratch::Impl& s, std::vector<int32_t>& out) const {
  if (!by_bytes_.empty())
    if (const auto found = by_bytes_.find(word); found != by_bytes_.end()) {
      out.push_back(found->second);
      return;
    }
  if (word.size() <= kShort)
    merge_short(word, s, out);
  else
    merge_long(word, s, out);
}

void Bpe::merge_short(std::string_view word, Scratch::Impl&, std::vector<int32_t>& out) const {
  constexpr uint32_t kNoRank = ~uint32_t(0);
  int32_t ids[kShort], results[kShort];
  uint32_t ranks[kShort];  // of the pair (i, i+1)
  size_t n = word.size();
  const auto look_up = [&](size_t i) {
    const Slot* slot = find(ids[i], ids[i + 1]);
    ranks[i] = slot ? slot->rank : kNoRank;
    if (slot) results[i] = slot->result;
  };
  for (size_t i = 0; i < n; ++i) ids[i] = byte_ids_[static_cast<unsigned char>(word[i])];
  for (size_t i = 0; i + 1 < n; ++i) look_up(i);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i)
      if (ranks[i] < ranks[best]) best = i;
    if (ranks[best] == kNoRank) break;
    ids[best] = results[best];
    --n;
    for (size_t i = best + 1; i < n; ++i) ids[i] = ids[i + 1];
    for (size_t i = best + 1; i + 1 < n; ++i) ranks[i] = ranks[i + 1], results[i] = results[i + 1];
    if (best + 1 < n) look_up(best);
    if (best > 0) look_up(best - 1);
  }
  out.insert(out.end(), ids, ids + n);
}

// O(n log n): a linked list of symbols and a heap of pairs, in which outdated pairs stay until they
// come up. A pair is outdated where its result is no longer what its two symbols make: as each
// symbol only grows, an equal result means the same two symbols.
void Bpe::merge_long(std::string_view word, Scratch::Impl& s, std::vector<int32_t>& out) const {
  auto& symbols = s.symbols;
  auto& heap = s.heap;
  const int64_t n = int64_t(word.size());
  symbols.clear();
  heap.clear();
  for (int64_t i = 0; i < n; ++i)
    symbols.push_back(
        {byte_ids_[static_cast<unsigned char>(word[size_t(i)])], false, i - 1, i + 1});
  const auto at = [&](int64_t i) -> Scratch::Impl::Symbol& { return symbols[size_t(i)]; };
  const auto push = [&](int64_t i) {
    const int64_t j = at(i).next;
    if (j >= n) return false;
    const Slot* slot = find(at(i).id, at(j).id);
    if (slot) heap.push_back({slot->rank, slot->result, i});
    return slot != nullptr;
  };
  for (int64_t i = 0; i < n; ++i) push(i);
  std::make_heap(heap.begin(), heap.end());
  while (!heap.empty()) {
    const auto top = heap.front();
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    auto& left = at(top.at);
    if (left.gone || left.next >= n) continue;
    auto& right = at(left.next);
    const Slot* slot = find(left.id, right.id);
    if (!slot || slot->result != top.result) continue;
    left.id = top.result;
    right.gone = true;
    left.next = right.next;
    if (left.next < n) at(left.next).prev = top.at;
    if (left.prev >= 0 && push(left.prev)) std::push_heap(heap.begin(), heap.end());
    if (push(top.at)) std::push_heap(heap.begin(), heap.end());
  }
  for (int64_t i = 0; i < n; i = at(i).next) out.push_back(at(i).id);
  constexpr size_t kKeep = size_t(1) << 16;  // a huge word must not hold its memory for good
  if (symbols.capacity() > kKeep) symbols = {};
  if (heap.capacity() > kKeep) heap = {};
}

}  // namespace hgrn
