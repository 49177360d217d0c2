#include "resize.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

namespace laclip {
namespace {

// The arithmetic is that of Pillow's libImaging/Resample.c: weights in 22 bits, results of each
// pass rounded to 8 bits. Here columns always come first, one row of the result after the other;
// Pillow chooses by the shape, so that roundings differ, by less than 0.2 levels in the mean.
constexpr int kBits = 32 - 8 - 2;
constexpr std::int32_t kHalf = 1 << (kBits - 1);

double weight(Filter filter, double x) {
  x = std::abs(x);
  if (filter == Filter::kLinear) return x < 1 ? 1 - x : 0;
  constexpr double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// What the places [first, first + count) of a line of `to` get from a line of `from`.
struct Weights {
  std::size_t taps;                  // room for each place
  std::vector<std::uint32_t> begin;  // first source of each place
  std::vector<std::uint32_t> size;   // number of sources
  std::vector<std::int32_t> values;  // [count, taps]

  Weights(Filter filter, std::uint32_t from, std::uint32_t to, std::uint32_t first,
          std::uint32_t count) {
    const double scale = static_cast<double>(from) / to;
    const double stretch = std::max(scale, 1.0);
    const double support = (filter == Filter::kLinear ? 1.0 : 2.0) * stretch;
    taps = static_cast<std::size_t>(std::ceil(support)) * 2 + 1;
    values.resize(count * taps);
    std::vector<double> line(taps);
    for (std::uint32_t place = first; place < first + count; ++place) {
      const double centre = (place + 0.5) * scale;
      const auto low = static_cast<std::int64_t>(centre - support + 0.5);
      const auto high = static_cast<std::int64_t>(centre + support + 0.5);
      const auto from_here = static_cast<std::uint32_t>(std::max<std::int64_t>(low, 0));
      const auto to_here = static_cast<std::uint32_t>(std::min<std::int64_t>(high, from));
      double sum = 0;
      for (std::uint32_t i = from_here; i < to_here; ++i) {
        line[i - from_here] = weight(filter, (i - centre + 0.5) / stretch);
        sum += line[i - from_here];
      }
      for (std::uint32_t i = 0; i < to_here - from_here; ++i) {
        const double scaled = line[i] / sum * (1 << kBits);
        values[(place - first) * taps + i] =
            static_cast<std::int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
      }
      begin.push_back(from_here);
      size.push_back(to_here - from_here);
    }
  }
};

using Bytes4 = std::uint8_t __attribute__((vector_size(4)));
using Ints4 = std::int32_t __attribute__((vector_size(16)));

inline std::uint8_t to_level(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kBits, 0, 255));
}

// One image; `work` is scratch memory.
[[gnu::always_inline]] inline void resize_image(const Pixels& image, const ResizeOptions& options,
                                                float* out, std::vector<std::uint8_t>& work,
                                                std::vector<std::int32_t>& sums) {
  const std::uint32_t size = options.size;
  std::uint32_t width = size, height = size, left = 0, top = 0;
  if (options.centre) {
    const auto shorter = std::min(image.width, image.height);
    const auto scaled = [&](std::uint64_t side) {
      return static_cast<std::uint32_t>(size * side / shorter);
    };
    const auto half_to_even = [](std::uint32_t gap) { return gap / 2 + (gap & 1 & (gap / 2)); };
    width = scaled(image.width);
    height = scaled(image.height);
    left = half_to_even(width - size);
    top = half_to_even(height - size);
  }
  const Weights columns(options.filter, image.width, width, left, size);
  const Weights rows(options.filter, image.height, height, top, size);
  const std::size_t source = 3 * std::size_t{image.width};
  const std::size_t line = 3 * std::size_t{size};
  work.resize(source + 4 + line);
  sums.resize(source);
  std::uint8_t* const tall = work.data();  // a row, and room to read four bytes at its end
  std::uint8_t* const row = tall + source + 4;
  std::int32_t* const sum = sums.data();
  float scale[3], offset[3];
  for (int c = 0; c < 3; ++c) {
    scale[c] = 1 / options.std[c];
    offset[c] = -options.mean[c] / options.std[c];
  }
  for (std::uint32_t y = 0; y < size; ++y) {
    std::fill_n(sum, source, kHalf);
    for (std::uint32_t i = 0; i < rows.size[y]; ++i) {
      const std::int32_t value = rows.values[y * rows.taps + i];
      const std::uint8_t* const from = image.data + (rows.begin[y] + i) * source;
      for (std::size_t x = 0; x < source; ++x) sum[x] += from[x] * value;
    }
    for (std::size_t x = 0; x < source; ++x) tall[x] = to_level(sum[x]);
    for (std::uint32_t x = 0; x < size; ++x) {
      const std::int32_t* const values = columns.values.data() + x * columns.taps;
      const std::uint8_t* const from = tall + 3 * std::size_t{columns.begin[x]};
      Ints4 pixel_sum = {kHalf, kHalf, kHalf, 0};
      for (std::uint32_t i = 0; i < columns.size[x]; ++i) {
        Bytes4 pixel;
        std::memcpy(&pixel, from + 3 * i, 4);
        pixel_sum += __builtin_convertvector(pixel, Ints4) * values[i];
      }
      const std::uint32_t place = image.mirror ? size - 1 - x : x;
      for (int c = 0; c < 3; ++c)
        row[3 * place + static_cast<unsigned>(c)] = to_level(pixel_sum[c]);
    }
    for (std::size_t c = 0; c < 3; ++c) {
      float* const to = out + (c * size + y) * size;
      for (std::size_t x = 0; x < size; ++x) {
        to[x] = static_cast<float>(row[3 * x + c]) * scale[c] + offset[c];
      }
    }
  }
}

using Resize = void (*)(const Pixels&, const ResizeOptions&, float*, std::vector<std::uint8_t>&,
                        std::vector<std::int32_t>&);

void resize_plainly(const Pixels& image, const ResizeOptions& options, float* out,
                    std::vector<std::uint8_t>& work, std::vector<std::int32_t>& sums) {
  resize_image(image, options, out, work, sums);
}

#ifdef __x86_64__
[[gnu::target("avx2")]] void resize_avx2(const Pixels& image, const ResizeOptions& options,
                                         float* out, std::vector<std::uint8_t>& work,
                                         std::vector<std::int32_t>& sums) {
  resize_image(image, options, out, work, sums);
}
#endif

Resize fastest() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2")) return resize_avx2;
#endif
  return resize_plainly;
}

}  // namespace

void resize_images(std::span<const Pixels> images, const ResizeOptions& options,
                   std::span<float> out, unsigned threads) {
  const Resize resize = fastest();
  const std::size_t stride = 3 * std::size_t{options.size} * options.size;
  std::atomic<std::size_t> next = 0;
  const auto run = [&] {
    std::vector<std::uint8_t> work;
    std::vector<std::int32_t> sums;
    for (std::size_t i = next++; i < images.size(); i = next++) {
      resize(images[i], options, out.data() + i * stride, work, sums);
    }
  };
  std::vector<std::jthread> others;
  for (unsigned i = 1; i < std::min<std::size_t>(threads, images.size()); ++i) {
    others.emplace_back(run);
  }
  run();
}

}  // namespace laclip
