// libFuzzer: any bytes as the sidecars of a shard. Reading every record, key and caption of what
// opens must stay inside the mapping (ASan) and end in std::runtime_error at worst.
//
// The input is cut in two: a .samples and a .captions file. What dataset.json would expect of them
// is taken from the bytes themselves, so that the fuzzer gets past those comparisons.
//
//   cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER=clang++ -DLACLIP_PYTHON=OFF -DLACLIP_TESTS=ON \
//     -DLACLIP_LIBFUZZER=ON -DLACLIP_SANITIZE=address,undefined
//   cmake --build build/fuzz --target fuzz_shard && build/fuzz/tests/csrc/fuzz_shard -runs=1000000
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "shard.hpp"

namespace {

// A file in memory that can be opened by path.
class MemoryFile {
 public:
  explicit MemoryFile(const char* name) : fd_(::memfd_create(name, 0)) {}
  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }
  void fill(const std::uint8_t* data, std::size_t size) const {
    if (::ftruncate(fd_, 0) != 0 || ::pwrite(fd_, data, size, 0) != static_cast<ssize_t>(size)) {
      throw std::logic_error("memfd cannot be written");
    }
  }
  void resize(std::uint64_t size) const {
    if (::ftruncate(fd_, static_cast<off_t>(size)) != 0) throw std::logic_error("no memory");
  }

 private:
  int fd_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const MemoryFile samples("samples"), captions("captions"), tar("tar");
  if (size < 1) return 0;
  // The first byte says where the cut is, in sixteen-byte steps after the first header.
  const std::size_t cut = std::min<std::size_t>(size - 1, 64 + 16 * std::size_t{data[0]});
  const std::uint8_t* first = data + 1;
  std::vector<std::uint8_t> head(first, first + cut);
  std::vector<std::uint8_t> rest(first + cut, data + size);
  laclip::ShardFiles files;
  files.tar = tar.path();
  files.samples = samples.path();
  files.captions = captions.path();
  if (head.size() >= sizeof(laclip::SamplesHeader)) {
    laclip::SamplesHeader header;
    std::memcpy(&header, head.data(), sizeof header);
    files.count = header.count;
    files.samples_checksum = header.checksum;
    if (header.shard_bytes <= (1 << 20)) tar.resize(header.shard_bytes);
  }
  if (rest.size() >= sizeof(laclip::CaptionsHeader)) {
    laclip::CaptionsHeader header;
    std::memcpy(&header, rest.data(), sizeof header);
    header.samples_checksum = files.samples_checksum;
    std::memcpy(rest.data(), &header, sizeof header);
    files.variants = header.variants;
    files.captions_checksum = header.checksum;
    files.tokenizer.assign(header.tokenizer, ::strnlen(header.tokenizer, sizeof header.tokenizer));
  }
  samples.fill(head.data(), head.size());
  captions.fill(rest.data(), rest.size());
  try {
    const laclip::Shard shard(files);
    std::int32_t tokens[77];
    std::uint64_t sum = 0;
    for (std::uint32_t i = 0; i < files.count; ++i) {
      sum += shard.record(i).bytes + shard.key(i).size();
      for (char c : shard.key(i)) sum += static_cast<unsigned char>(c);
      for (std::uint32_t variant = 0; variant < shard.variants(); ++variant) {
        try {
          const std::size_t taken = shard.caption(i, variant, tokens);
          for (std::size_t t = 0; t < taken; ++t) sum += static_cast<std::uint64_t>(tokens[t]);
        } catch (const std::runtime_error&) {
        }
      }
    }
    static volatile std::uint64_t sink;
    sink = sum;
  } catch (const std::runtime_error&) {
  }
  return 0;
}
