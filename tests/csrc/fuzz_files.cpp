// Any bytes as a tar and as an image: never a read outside them, never a record that points there.
//
//   clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc
//     tests/csrc/fuzz_files.cpp csrc/{tar,file_source,image_header,checksum}.cpp -o fuzz_files
//   ./fuzz_files -runs=10000000 CORPUS      (any tars and images; the first byte is skipped over)
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "image_header.hpp"
#include "tar.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

constexpr std::size_t kBlock = 512;

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "fuzz_files: %s\n", what);
    std::abort();
  }
}

class MemorySource : public laclip::ByteSource {
 public:
  explicit MemorySource(std::span<const std::byte> bytes) : bytes_(bytes) {}
  std::uint64_t size() const override { return bytes_.size(); }
  std::span<const std::byte> view(std::uint64_t offset, std::size_t bytes) override {
    if (offset >= bytes_.size()) return {};
    return bytes_.subspan(offset, std::min<std::uint64_t>(bytes, bytes_.size() - offset));
  }

 private:
  std::span<const std::byte> bytes_;
};

void check_tar(std::span<const std::byte> bytes) {
  MemorySource source(bytes);
  try {
    const laclip::TarScan scan = laclip::scan_tar(source);
    require(scan.records.size() == scan.key_end.size(), "keys without records");
    std::uint32_t begin = 0;
    for (std::uint32_t end : scan.key_end) {
      require(begin < end && end <= scan.keys.size(), "keys out of order");
      begin = end;
    }
    for (const laclip::SampleRecord& record : scan.records) {
      require(record.offset + record.bytes <= bytes.size(), "an image outside the tar");
      require(((record.flags & laclip::kBad) != 0) == (record.reason != laclip::kNotBad),
              "bad without a reason");
      require(record.reason != laclip::kNotBad || (record.width > 0 && record.height > 0),
              "a good image without a size");
      require(record.orientation >= 1 && record.orientation <= 8, "no such orientation");
    }
  } catch (const laclip::TarError&) {
  }
  try {
    const laclip::TarTexts texts = laclip::read_tar_texts(source, "txt", 100);
    require(texts.keys.size() == texts.end.size(), "texts without keys");
  } catch (const laclip::TarError&) {
  }
}

void check_image(std::span<const std::byte> bytes) {
  const laclip::ImageHeader whole = laclip::parse_image_header(bytes);
  laclip::find_damage(whole, bytes);
  require(whole.reason != laclip::kNotBad || (whole.width > 0 && whole.height > 0), "no size");
  require(whole.orientation >= 1 && whole.orientation <= 8, "no such orientation");
  // What a prefix tells, the whole confirms, unless the header is cut.
  const laclip::ImageHeader prefix = laclip::parse_image_header(bytes.first(bytes.size() / 2));
  if (prefix.reason == laclip::kNotBad) {
    require(prefix.width == whole.width && prefix.height == whole.height, "prefix disagrees");
  }
}

// Random bytes never get past a header's checksum: put the right one into every header.
void mend_checksums(std::uint8_t* data, std::size_t size) {
  for (std::size_t at = 0; at + kBlock <= size; at += kBlock) {
    std::uint8_t* block = data + at;
    if (std::memcmp(block + 257, "ustar", 5) != 0) continue;
    std::memset(block + 148, ' ', 8);
    unsigned sum = 0;
    for (std::size_t i = 0; i < kBlock; ++i) sum += block[i];
    char text[9];
    std::snprintf(text, sizeof text, "%06o", sum & 0777777);
    std::memcpy(block + 148, text, 7);
  }
}

}  // namespace

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  const std::size_t grown = LLVMFuzzerMutate(data, size, max_size);
  if (seed % 8 != 0 && grown > 1) mend_checksums(data + 1, grown - 1);
  return grown;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  // A copy of just this size: a read one byte too far is seen.
  const auto* begin = reinterpret_cast<const std::byte*>(data);
  const std::vector<std::byte> copy(begin + 1, begin + size);
  if (data[0] & 1) {
    check_image(copy);
  } else {
    check_tar(copy);
  }
  return 0;
}
