// The order of an epoch: a permutation of all samples in O(shards) memory.
//
// Shards are permuted; consecutive ones form windows of `window_shards`; inside a window a keyed
// bijection (a Feistel network, walked until it lands inside the window) orders the samples of all
// its shards. So training reads from few shards at a time and still draws each sample once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace laclip {

// Purposes of the random numbers: the third word of every Philox counter.
enum class Stream : std::uint64_t {
  kShardOrder = 1,
  kWindowKey = 2,
  kCaption = 3,
  kCrop = 4,
  kSubstitute = 5,
};

struct SamplePlace {
  std::uint32_t shard;  // index in the list of shards
  std::uint32_t index;  // of the sample in its shard
};

// A bijection of [0, size) that depends on `key`.
class KeyedBijection {
 public:
  KeyedBijection(std::uint64_t size, std::uint64_t key0, std::uint64_t key1);
  std::uint64_t operator()(std::uint64_t index) const;

 private:
  std::uint64_t size_;
  unsigned low_bits_;
  unsigned high_bits_;
  std::uint64_t round_key_[6];
};

class EpochOrder {
 public:
  // counts: samples of each shard. Throws std::invalid_argument for a window of 0 shards.
  EpochOrder(std::span<const std::uint64_t> counts, std::uint64_t seed, std::uint64_t epoch,
             std::size_t window_shards);

  std::uint64_t size() const { return shard_begin_.back(); }
  // Where the sample at `position` of this epoch lies; position < size().
  SamplePlace at(std::uint64_t position) const;
  // Where the samples from `position` on lie; position + out.size() <= size().
  void places(std::uint64_t position, std::span<SamplePlace> out) const;

  std::size_t windows() const { return window_.size(); }
  std::size_t window_of(std::uint64_t position) const;
  std::span<const std::uint32_t> shards_of(std::size_t window) const;

 private:
  std::size_t shard_at(std::size_t first, std::size_t last, std::uint64_t position) const;

  std::size_t window_shards_;
  std::vector<std::uint32_t> shard_;        // shards in this epoch's order
  std::vector<std::uint64_t> shard_begin_;  // first position of each, and the end
  std::vector<KeyedBijection> window_;
};

}  // namespace laclip
