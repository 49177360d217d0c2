// The two files beside every shard, as they lie on disk: little-endian, memory-mapped, read in
// place. docs/format.md describes them byte by byte; laclip/dataset.py reads the same bytes.
#pragma once

#include <cstdint>

namespace laclip {

inline constexpr std::uint32_t kSidecarVersion = 1;
inline constexpr char kSamplesMagic[8] = {'L', 'A', 'C', 'L', 'I', 'P', 'S', 'M'};
inline constexpr char kCaptionsMagic[8] = {'L', 'A', 'C', 'L', 'I', 'P', 'C', 'P'};

// NAME.samples: SamplesHeader, SampleRecord[count], uint32 key_end[count], char keys[keys_bytes].
// key i is keys[key_end[i - 1] : key_end[i]], UTF-8.
struct SamplesHeader {
  char magic[8];
  std::uint32_t version;
  std::uint32_t header_bytes;    // 64
  std::uint64_t count;           // samples in the shard, flagged ones included
  std::uint64_t shard_bytes;     // size of the tar when it was indexed
  std::uint64_t shard_checksum;  // XXH64 of the tar
  std::uint64_t keys_bytes;
  std::uint64_t rules;     // version of the rules that made the records (laclip/prepare/index.py)
  std::uint64_t checksum;  // XXH64 of the whole file with this field zero
};
static_assert(sizeof(SamplesHeader) == 64);

enum SampleFlag : std::uint16_t {
  kBad = 1,          // never decoded; yields a substitute; `reason` says why
  kProgressive = 2,  // progressive JPEG
  kGrayscale = 4,    // one colour channel
  kCmyk = 8,         // four colour channels
  kAlpha = 16,       // PNG or WebP with alpha
  kSixteenBit = 32,  // more than 8 bits a channel
  kDecoded = 64,     // was decoded in full when it was indexed
};

enum ImageFormat : std::uint8_t { kUnknownFormat = 0, kJpeg = 1, kPng = 2, kWebp = 3 };

struct SampleRecord {
  std::uint64_t offset;  // of the image's first byte in the tar
  std::uint32_t bytes;   // length of the encoded image
  std::uint32_t width;   // in pixels, as stored (before any EXIF rotation)
  std::uint32_t height;
  std::uint32_t row;         // row number that `laclip pack` recorded, or 0xffffffff
  std::uint16_t flags;       // SampleFlag bits
  std::uint8_t format;       // ImageFormat
  std::uint8_t orientation;  // EXIF, 1 to 8; 1 where there is none
  std::uint32_t reason;      // why the sample is bad (table in docs/format.md); 0 if it is not
};
static_assert(sizeof(SampleRecord) == 32);

// NAME.captions: CaptionsHeader, uint32 entry[count * variants + 1], then the tokens (token_bytes
// each). Caption (sample i, variant v) is number i * variants + v; its tokens, without start and
// end of text, are tokens[position(entry[n]) : position(entry[n + 1])].
struct CaptionsHeader {
  char magic[8];
  std::uint32_t version;
  std::uint32_t header_bytes;  // 128
  std::uint64_t count;
  std::uint32_t variants;
  std::uint32_t token_bytes;       // 2, or 4 where the vocabulary needs it
  std::uint64_t tokens;            // tokens in the file, below 2^30
  std::uint64_t samples_checksum;  // `checksum` of the .samples file that it belongs to
  char tokenizer[64];              // fingerprint of the tokenizer, padded with NUL
  std::uint64_t reserved;          // 0
  std::uint64_t checksum;          // XXH64 of the whole file with this field zero
};
static_assert(sizeof(CaptionsHeader) == 128);

inline constexpr std::uint32_t kCaptionMissing = 1u << 31;  // no such variant for this sample
inline constexpr std::uint32_t kCaptionShort = 1u << 30;    // fewer than two words
inline constexpr std::uint32_t caption_position(std::uint32_t entry) { return entry & 0x3fffffffu; }

}  // namespace laclip
