// XXH64 with seed 0, the 64-bit hash of Yann Collet's xxHash (specification: xxhash_spec.md,
// version 0.1.1).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace laclip {

// Incremental: update() any number of times, then digest().
class Xxh64 {
 public:
  Xxh64();
  void update(std::span<const std::byte> bytes);
  std::uint64_t digest() const;

 private:
  std::uint64_t lane_[4];
  std::uint64_t total_ = 0;
  std::byte buffer_[32];
  std::size_t buffered_ = 0;
};

std::uint64_t xxh64(std::span<const std::byte> bytes);

}  // namespace laclip
