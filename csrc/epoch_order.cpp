#include "epoch_order.hpp"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "philox.hpp"

namespace laclip {
namespace {

// Finalizer of MurmurHash3 (Austin Appleby, public domain): mixes all 64 bits.
std::uint64_t mix(std::uint64_t word) {
  word = (word ^ (word >> 33)) * 0xFF51AFD7ED558CCDu;
  word = (word ^ (word >> 33)) * 0xC4CEB9FE1A85EC53u;
  return word ^ (word >> 33);
}

}  // namespace

KeyedBijection::KeyedBijection(std::uint64_t size, std::uint64_t key0, std::uint64_t key1)
    : size_(size) {
  const unsigned bits =
      std::max(2u, size > 1 ? static_cast<unsigned>(std::bit_width(size - 1)) : 0u);
  low_bits_ = bits / 2;
  high_bits_ = bits - low_bits_;
  const PhiloxBlock first = philox({0, 0, 0, 0}, key0, key1);
  const PhiloxBlock second = philox({1, 0, 0, 0}, key0, key1);
  std::copy(first.begin(), first.end(), round_key_);
  std::copy_n(second.begin(), 2, round_key_ + 4);
}

std::uint64_t KeyedBijection::operator()(std::uint64_t index) const {
  const std::uint64_t low_mask = (std::uint64_t{1} << low_bits_) - 1;
  const std::uint64_t high_mask = (std::uint64_t{1} << high_bits_) - 1;
  // The network permutes the smallest power of two that holds the window, so that a walk takes
  // fewer than two steps on average.
  do {
    std::uint64_t high = index >> low_bits_;
    std::uint64_t low = index & low_mask;
    for (int round = 0; round < 6; round += 2) {
      high = (high ^ mix(low ^ round_key_[round])) & high_mask;
      low = (low ^ mix(high ^ round_key_[round + 1])) & low_mask;
    }
    index = (high << low_bits_) | low;
  } while (index >= size_);
  return index;
}

EpochOrder::EpochOrder(std::span<const std::uint64_t> counts, std::uint64_t seed,
                       std::uint64_t epoch, std::size_t window_shards)
    : window_shards_(window_shards) {
  if (window_shards == 0) throw std::invalid_argument("window_shards must be at least 1");
  shard_.resize(counts.size());
  std::iota(shard_.begin(), shard_.end(), 0u);
  for (std::size_t i = counts.size(); i > 1; --i) {
    const auto word =
        philox({i, epoch, static_cast<std::uint64_t>(Stream::kShardOrder), 0}, seed, 0)[0];
    std::swap(shard_[i - 1], shard_[to_below(word, i)]);
  }
  shard_begin_.reserve(counts.size() + 1);
  shard_begin_.push_back(0);
  for (std::uint32_t shard : shard_) shard_begin_.push_back(shard_begin_.back() + counts[shard]);
  for (std::size_t first = 0; first < counts.size(); first += window_shards) {
    const std::size_t last = std::min(counts.size(), first + window_shards);
    const PhiloxBlock key = philox(
        {first / window_shards, epoch, static_cast<std::uint64_t>(Stream::kWindowKey), 0}, seed, 0);
    window_.emplace_back(shard_begin_[last] - shard_begin_[first], key[0], key[1]);
  }
}

SamplePlace EpochOrder::at(std::uint64_t position) const {
  SamplePlace place{};
  places(position, {&place, 1});
  return place;
}

void EpochOrder::places(std::uint64_t position, std::span<SamplePlace> out) const {
  std::size_t done = 0;
  while (done < out.size()) {
    const std::size_t window = window_of(position + done);
    const std::size_t first = window * window_shards_;
    const std::size_t last = first + shards_of(window).size();
    const std::uint64_t left = shard_begin_[last] - (position + done);
    const std::size_t end = done + static_cast<std::size_t>(std::min(left, out.size() - done));
    for (; done < end; ++done) {
      const std::uint64_t shuffled =
          shard_begin_[first] + window_[window](position + done - shard_begin_[first]);
      const std::size_t found = shard_at(first, last, shuffled);
      out[done] = {shard_[found], static_cast<std::uint32_t>(shuffled - shard_begin_[found])};
    }
  }
}

std::size_t EpochOrder::window_of(std::uint64_t position) const {
  return shard_at(0, shard_.size(), position) / window_shards_;
}

std::span<const std::uint32_t> EpochOrder::shards_of(std::size_t window) const {
  const std::size_t first = window * window_shards_;
  return std::span(shard_).subspan(first, std::min(window_shards_, shard_.size() - first));
}

// Which of the shards [first, last) of this epoch holds a position.
std::size_t EpochOrder::shard_at(std::size_t first, std::size_t last,
                                 std::uint64_t position) const {
  const auto begin = shard_begin_.begin();
  const auto after = std::upper_bound(begin + static_cast<std::ptrdiff_t>(first),
                                      begin + static_cast<std::ptrdiff_t>(last + 1), position);
  return static_cast<std::size_t>(after - begin) - 1;
}

}  // namespace laclip
