#include "draws.hpp"

#include <algorithm>
#include <cmath>

namespace laclip {
namespace {

constexpr int kCropTries = 10;  // as torchvision's RandomResizedCrop

}  // namespace

std::uint32_t draw_variant(const DrawOptions& options, std::uint32_t variants, std::uint64_t sample,
                           std::uint64_t epoch) {
  if (variants == 1 || options.policy == CaptionPolicy::kOriginal) return 0;
  const std::uint64_t word = draw(options.seed, Stream::kCaption, sample, epoch, 0)[0];
  if (options.policy != CaptionPolicy::kWeights) {
    return static_cast<std::uint32_t>(to_below(word, variants));
  }
  double total = 0;
  for (double weight : options.weights) total += weight;
  double left = to_unit(word) * total;
  std::uint32_t variant = 0;
  while (variant + 1 < variants && left >= options.weights[variant]) {
    left -= options.weights[variant++];
  }
  return variant;
}

void draw_window(const DrawOptions& options, std::uint32_t width, std::uint32_t height,
                 std::uint64_t sample, std::uint64_t epoch, std::span<std::int32_t, 4> window) {
  const double area = static_cast<double>(width) * height;
  const double log_low = std::log(options.ratio_low);
  const double log_high = std::log(options.ratio_high);
  for (std::uint64_t attempt = 0; attempt < kCropTries; ++attempt) {
    const PhiloxBlock words = draw(options.seed, Stream::kCrop, sample, epoch, attempt);
    const double share =
        options.scale_low + to_unit(words[0]) * (options.scale_high - options.scale_low);
    const double ratio = std::exp(log_low + to_unit(words[1]) * (log_high - log_low));
    const double w = std::round(std::sqrt(area * share * ratio));
    const double h = std::round(std::sqrt(area * share / ratio));
    if (w >= 1 && w <= width && h >= 1 && h <= height) {
      const auto columns = static_cast<std::uint64_t>(w);
      const auto rows = static_cast<std::uint64_t>(h);
      window[0] = static_cast<std::int32_t>(to_below(words[2], width - columns + 1));
      window[1] = static_cast<std::int32_t>(to_below(words[3], height - rows + 1));
      window[2] = static_cast<std::int32_t>(columns);
      window[3] = static_cast<std::int32_t>(rows);
      return;
    }
  }
  double w = width;
  double h = height;
  if (w / h < options.ratio_low) h = std::round(w / options.ratio_low);
  if (w / height > options.ratio_high) w = std::round(h * options.ratio_high);
  w = std::clamp(w, 1.0, static_cast<double>(width));
  h = std::clamp(h, 1.0, static_cast<double>(height));
  window[0] = static_cast<std::int32_t>((width - w) / 2);
  window[1] = static_cast<std::int32_t>((height - h) / 2);
  window[2] = static_cast<std::int32_t>(w);
  window[3] = static_cast<std::int32_t>(h);
}

std::uint8_t draw_mirror(const DrawOptions& options, std::uint64_t sample, std::uint64_t epoch) {
  if (!options.flip) return 0;
  const PhiloxBlock words = draw(options.seed, Stream::kCrop, sample, epoch, kCropTries);
  return static_cast<std::uint8_t>(words[0] >> 63);
}

}  // namespace laclip
