// Counter-based random numbers: every draw is a pure function of (key, counter).
//
// Philox4x64-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with
// the constants of the Random123 library; numpy.random.Philox gives the same words.
#pragma once

#include <array>
#include <cstdint>

namespace laclip {

using PhiloxBlock = std::array<std::uint64_t, 4>;

inline PhiloxBlock philox(PhiloxBlock counter, std::uint64_t key0, std::uint64_t key1) {
  constexpr std::uint64_t kMultiplier0 = 0xD2E7470EE14C6C93u;
  constexpr std::uint64_t kMultiplier1 = 0xCA5A826395121157u;
  constexpr std::uint64_t kWeyl0 = 0x9E3779B97F4A7C15u;
  constexpr std::uint64_t kWeyl1 = 0xBB67AE8584CAA73Bu;
  for (int round = 0; round < 10; ++round) {
    __extension__ using uint128 = unsigned __int128;
    const uint128 product0 = static_cast<uint128>(kMultiplier0) * counter[0];
    const uint128 product1 = static_cast<uint128>(kMultiplier1) * counter[2];
    counter = {static_cast<std::uint64_t>(product1 >> 64) ^ counter[1] ^ key0,
               static_cast<std::uint64_t>(product1),
               static_cast<std::uint64_t>(product0 >> 64) ^ counter[3] ^ key1,
               static_cast<std::uint64_t>(product0)};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// Uniform in [0, 1) with 53 random bits.
inline double to_unit(std::uint64_t word) { return static_cast<double>(word >> 11) * 0x1.0p-53; }

// Uniform in [0, bound), bound > 0; the bias is below bound / 2^64.
inline std::uint64_t to_below(std::uint64_t word, std::uint64_t bound) {
  __extension__ using uint128 = unsigned __int128;
  return static_cast<std::uint64_t>((static_cast<uint128>(word) * bound) >> 64);
}

}  // namespace laclip
