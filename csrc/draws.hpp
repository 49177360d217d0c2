// What is drawn for a sample in an epoch: its caption, its crop window, its flip.
//
// Each is a pure function of (seed, epoch, sample), from counter-based random numbers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "epoch_order.hpp"
#include "philox.hpp"

namespace laclip {

enum class CaptionPolicy { kUniform, kWeights, kOriginal, kMulti };

struct DrawOptions {
  std::uint64_t seed = 0;
  CaptionPolicy policy = CaptionPolicy::kUniform;
  std::vector<double> weights;               // one a variant, for kWeights
  double scale_low = 0.5, scale_high = 1.0;  // share of the image's area
  double ratio_low = 0.75, ratio_high = 4.0 / 3.0;
  bool flip = false;
};

inline PhiloxBlock draw(std::uint64_t seed, Stream stream, std::uint64_t sample,
                        std::uint64_t epoch, std::uint64_t number) {
  return philox({sample, epoch, static_cast<std::uint64_t>(stream), number}, seed, 0);
}

// The caption that a sample of `variants` captions gets; 0 is the original.
std::uint32_t draw_variant(const DrawOptions& options, std::uint32_t variants, std::uint64_t sample,
                           std::uint64_t epoch);

// The crop of torchvision's RandomResizedCrop (v0.26): x, y, width, height in pixels.
void draw_window(const DrawOptions& options, std::uint32_t width, std::uint32_t height,
                 std::uint64_t sample, std::uint64_t epoch, std::span<std::int32_t, 4> window);

// 1: flip left to right.
std::uint8_t draw_mirror(const DrawOptions& options, std::uint64_t sample, std::uint64_t epoch);

}  // namespace laclip
