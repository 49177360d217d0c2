// Size and kind of an encoded image, from its header alone. Nothing is decoded.
//
// Sources: JPEG: ITU-T T.81 annex B, EXIF 2.32 section 4.6; PNG: W3C PNG (third edition);
// WebP: RFC 9649.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "sidecar.hpp"

namespace laclip {

// Why a sample is bad: `reason` in its record.
enum BadReason : std::uint32_t {
  kNotBad = 0,
  kNoImage = 1,           // no image member of that key
  kUnsupportedImage = 2,  // not JPEG, PNG or WebP
  kEmptyImage = 3,        // zero bytes
  kBrokenHeader = 4,      // the header is cut short or contradicts itself
  kTooLarge = 5,          // more than kMaxPixels pixels, or a file of 4 GiB or more
  kNoCaption = 6,         // no .txt member of that key
  kDuplicateKey = 7,      // the key occurs earlier in the shard
  kDecodeFailed = 8,      // found by decoding it
};

// Why an image that was read is not used.
enum BrokenReason : std::uint8_t {
  kSound = 0,
  kHeaderChanged = 1,  // not the header that was indexed: the window may lie outside the image
  kCutShort = 2,
  kBrokenData = 3,
};

// 2^28: twice what Pillow refuses as a decompression bomb.
inline constexpr std::uint64_t kMaxPixels = std::uint64_t{1} << 28;

struct ImageHeader {
  std::uint32_t width = 0;  // as stored
  std::uint32_t height = 0;
  std::uint16_t flags = 0;  // SampleFlag bits
  ImageFormat format = kUnknownFormat;
  std::uint8_t orientation = 1;
  BadReason reason = kNotBad;
  std::size_t frame_end = 0;  // JPEG: where its frame header ends; a thumbnail lies before
};

// `bytes` may be a prefix of the file, as long as it holds the whole header.
ImageHeader parse_image_header(std::span<const std::byte> bytes);

// What is wrong behind a header that is `header`: decoders fail there, or make up the rest.
// kCutShort: the file does not go on to its format's end mark (JPEG: EOI, PNG: IEND, WebP: the
// announced size). kBrokenData: a JPEG holds a marker at which libjpeg gives up.
BrokenReason find_damage(const ImageHeader& header, std::span<const std::byte> bytes);

}  // namespace laclip
