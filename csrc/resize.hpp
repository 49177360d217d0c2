// Resizing on a CPU with Pillow's arithmetic: separable, antialiased, in fixed point.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace laclip {

enum class Filter { kLinear, kCubic };

// An RGB image [height, width, 3] without gaps.
struct Pixels {
  const std::uint8_t* data;
  std::uint32_t width;
  std::uint32_t height;
  bool mirror;
};

struct ResizeOptions {
  std::uint32_t size;  // of the result, a side
  Filter filter;
  // The shorter side becomes `size` and the centre is cut (torchvision's Resize and CenterCrop);
  // otherwise both sides become `size`.
  bool centre;
  float mean[3];  // of the channels, in levels of 255
  float std[3];
};

// out: [images, 3, size, size], (level - mean) / std.
void resize_images(std::span<const Pixels> images, const ResizeOptions& options,
                   std::span<float> out, unsigned threads);

}  // namespace laclip
