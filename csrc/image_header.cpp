#include "image_header.hpp"

#include <cstring>
#include <string_view>

namespace laclip {
namespace {

// A cursor that never leaves its bytes: a read past the end gives zero and sets `failed`.
class Cursor {
 public:
  explicit Cursor(std::span<const std::byte> bytes, bool big_endian = true)
      : bytes_(bytes), big_endian_(big_endian) {}

  bool failed() const { return failed_; }
  std::size_t at() const { return at_; }
  std::size_t left() const { return bytes_.size() - at_; }

  std::uint32_t take(std::size_t count) {
    if (left() < count) {
      fail();
      return 0;
    }
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const auto byte = std::to_integer<std::uint32_t>(bytes_[at_ + i]);
      value |= byte << (8 * (big_endian_ ? count - 1 - i : i));
    }
    at_ += count;
    return value;
  }

  bool take(std::string_view expected) {
    if (left() < expected.size() ||
        std::memcmp(bytes_.data() + at_, expected.data(), expected.size()) != 0) {
      return false;
    }
    at_ += expected.size();
    return true;
  }

  void skip(std::size_t count) {
    if (left() < count) {
      fail();
    } else {
      at_ += count;
    }
  }

  std::span<const std::byte> rest(std::size_t count) const {
    return bytes_.subspan(at_, count < left() ? count : left());
  }

 private:
  void fail() {
    failed_ = true;
    at_ = bytes_.size();
  }

  std::span<const std::byte> bytes_;
  bool big_endian_;
  std::size_t at_ = 0;
  bool failed_ = false;
};

// Orientation (tag 0x0112) of a TIFF structure's first directory; 1 where there is none. What
// counts here is that it be the one by which DALI turns the image.
std::uint8_t tiff_orientation(std::span<const std::byte> tiff) {
  Cursor order(tiff);
  const bool big_endian = order.take("MM");
  if (!big_endian && !order.take("II")) return 1;
  Cursor cursor(tiff, big_endian);
  cursor.skip(2);
  if (cursor.take(2) != 42) return 1;
  const std::uint32_t directory = cursor.take(4);
  if (directory < 8) return 1;
  cursor.skip(directory - 8);
  const std::uint32_t entries = cursor.take(2);
  for (std::uint32_t i = 0; i < entries && !cursor.failed(); ++i) {
    const std::uint32_t tag = cursor.take(2);
    cursor.skip(6);  // type and count, at which DALI does not look
    const std::uint32_t value = cursor.take(2);
    if (tag == 0x0112 && value >= 1 && value <= 8) return static_cast<std::uint8_t>(value);
    if (tag == 0x0112) return 1;
    cursor.skip(2);
  }
  return 1;
}

ImageHeader parse_jpeg(Cursor cursor) {
  ImageHeader header{.format = kJpeg, .reason = kBrokenHeader};
  while (!cursor.failed()) {
    if (cursor.take(1) != 0xFF) return header;
    std::uint32_t marker = 0xFF;
    while (marker == 0xFF && !cursor.failed()) marker = cursor.take(1);  // fill bytes
    if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD7)) continue;  // stand-alone markers
    if (marker == 0 || marker == 0xD8 || marker == 0xD9 || marker == 0xDA) return header;
    const std::uint32_t length = cursor.take(2);
    if (length < 2 || cursor.failed()) return header;
    const std::span<const std::byte> segment = cursor.rest(length - 2);
    if (segment.size() < length - 2) return header;
    cursor.skip(length - 2);
    if (marker == 0xE1) {
      Cursor exif(segment);
      if (exif.take(std::string_view("Exif\0\0", 6))) {
        header.orientation = tiff_orientation(exif.rest(exif.left()));
      }
    }
    // Start of frame: C0 to CF but DHT (C4), JPG (C8) and DAC (CC).
    if (marker < 0xC0 || marker > 0xCF || marker == 0xC4 || marker == 0xC8 || marker == 0xCC) {
      continue;
    }
    Cursor frame(segment);
    const std::uint32_t precision = frame.take(1);
    header.height = frame.take(2);
    header.width = frame.take(2);
    const std::uint32_t components = frame.take(1);
    if (frame.failed() || frame.left() < 3 * components) return header;
    // Lossless and hierarchical frames (SOF3, SOF5 and up but SOF9 and SOF10) have no decoder.
    const bool progressive = marker == 0xC2 || marker == 0xCA;
    if (!progressive && marker != 0xC0 && marker != 0xC1 && marker != 0xC9) {
      header.reason = kUnsupportedImage;
      return header;
    }
    if (components != 1 && components != 3 && components != 4) return header;
    if (progressive) header.flags |= kProgressive;
    if (precision > 8) header.flags |= kSixteenBit;
    if (components == 1) header.flags |= kGrayscale;
    if (components == 4) header.flags |= kCmyk;
    header.frame_end = cursor.at();
    header.reason = kNotBad;
    return header;
  }
  return header;
}

// From the frame header at `at` on: scans and segments up to the first end of image, behind which
// some files carry other data. Costs a hundredth of decoding it.
BrokenReason jpeg_damage(std::string_view text, std::size_t at) {
  while (true) {
    at = text.find_first_not_of('\xFF', text.find('\xFF', at));  // behind the data of a scan
    if (at == text.npos) return kCutShort;
    const auto marker = static_cast<unsigned char>(text[at++]);
    if (marker == 0xD9) return kSound;
    if (marker <= 0x01 || (marker >= 0xD0 && marker <= 0xD7)) continue;  // data, stand-alone marks
    // Tables, scans, line counts, application data and comments; no second frame or image.
    const bool known = marker == 0xC4 || marker == 0xCC || (marker >= 0xDA && marker <= 0xDD) ||
                       (marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE;
    if (!known) return kBrokenData;
    if (text.size() - at < 2) return kCutShort;
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
    const std::size_t length = byte(0) * 256u + byte(1);
    if (length < 2) return kBrokenData;
    at += length;
  }
}

ImageHeader parse_png(Cursor cursor) {
  ImageHeader header{.format = kPng, .reason = kBrokenHeader};
  if (cursor.take(4) != 13 || !cursor.take("IHDR")) return header;
  header.width = cursor.take(4);
  header.height = cursor.take(4);
  const std::uint32_t depth = cursor.take(1);
  const std::uint32_t colour = cursor.take(1);
  cursor.skip(3 + 4);  // compression, filter, interlace; CRC
  if (cursor.failed() || colour > 6 || colour == 1 || colour == 5) return header;
  if (depth > 8) header.flags |= kSixteenBit;
  if (colour == 0 || colour == 4) header.flags |= kGrayscale;
  if (colour == 4 || colour == 6) header.flags |= kAlpha;
  header.reason = kNotBad;
  // tRNS stands between the header and the pixels, eXIf anywhere.
  while (!cursor.failed()) {
    const std::uint32_t length = cursor.take(4);
    const std::span<const std::byte> name = cursor.rest(4);
    cursor.skip(4);
    if (cursor.failed()) break;
    auto is = [&name](const char* chunk) { return std::memcmp(name.data(), chunk, 4) == 0; };
    if (is("IEND")) break;
    if (is("tRNS")) header.flags |= kAlpha;
    if (is("eXIf")) header.orientation = tiff_orientation(cursor.rest(length));
    cursor.skip(length);
    cursor.skip(4);
  }
  return header;
}

// Of the EXIF chunk, which stands behind the picture; 1 where `chunks` does not hold it.
std::uint8_t webp_orientation(Cursor chunks) {
  while (!chunks.failed()) {
    const bool exif = chunks.take("EXIF");
    if (!exif) chunks.skip(4);
    const std::uint32_t length = chunks.take(4);
    if (exif) {
      return tiff_orientation(chunks.rest(length));  // none where a writer kept JPEG's prefix
    }
    chunks.skip(std::size_t{length} + (length & 1));
  }
  return 1;
}

ImageHeader parse_webp(Cursor cursor) {
  ImageHeader header{.format = kWebp, .reason = kBrokenHeader};
  if (cursor.take("VP8 ")) {
    cursor.skip(4);
    const std::uint32_t tag = cursor.take(3);
    if ((tag & 1) != 0 || cursor.take(3) != 0x2A019D) return header;
    header.width = cursor.take(2) & 0x3FFF;
    header.height = cursor.take(2) & 0x3FFF;
  } else if (cursor.take("VP8L")) {
    cursor.skip(4);
    if (cursor.take(1) != 0x2F) return header;
    const std::uint32_t bits = cursor.take(4);
    header.width = (bits & 0x3FFF) + 1;
    header.height = ((bits >> 14) & 0x3FFF) + 1;
    if ((bits >> 28) & 1) header.flags |= kAlpha;
    if ((bits >> 29) != 0) return header;
  } else if (cursor.take("VP8X")) {
    const std::uint32_t length = cursor.take(4);
    const std::uint32_t features = cursor.take(4);
    header.width = cursor.take(3) + 1;
    header.height = cursor.take(3) + 1;
    if (length != 10) return header;
    if (features & 0x10) header.flags |= kAlpha;
    if (features & 0x02) header.reason = kUnsupportedImage;  // animated
    if (features & 0x08) header.orientation = webp_orientation(cursor);
  } else {
    return header;
  }
  if (cursor.failed()) return header;
  if (header.reason == kBrokenHeader) header.reason = kNotBad;
  return header;
}

}  // namespace

ImageHeader parse_image_header(std::span<const std::byte> bytes) {
  if (bytes.empty()) return {.reason = kEmptyImage};
  ImageHeader header{.reason = kUnsupportedImage};
  Cursor cursor(bytes);
  Cursor riff(bytes, false);
  if (cursor.take("\xFF\xD8")) {
    header = parse_jpeg(cursor);
  } else if (cursor.take("\x89PNG\r\n\x1A\n")) {
    header = parse_png(cursor);
  } else if (riff.take("RIFF")) {
    riff.skip(4);
    if (riff.take("WEBP")) header = parse_webp(riff);
  }
  if (header.reason == kNotBad) {
    if (header.width == 0 || header.height == 0) header.reason = kBrokenHeader;
    if (std::uint64_t{header.width} * header.height > kMaxPixels) header.reason = kTooLarge;
  }
  return header;
}

BrokenReason find_damage(const ImageHeader& header, std::span<const std::byte> bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  bool whole = false;
  if (header.format == kJpeg) return jpeg_damage(text, header.frame_end);
  if (header.format == kPng) whole = text.rfind("IEND") != text.npos;
  if (header.format == kWebp) {
    Cursor riff(bytes, false);
    riff.skip(4);
    whole = std::uint64_t{riff.take(4)} + 8 <= bytes.size();
  }
  return whole ? kSound : kCutShort;
}

}  // namespace laclip
