// Reading tars (POSIX ustar and pax, GNU long names, old v7) and finding the samples in them.
//
// Formats: POSIX.1-2017 "pax"; GNU tar manual, "Basic Tar Format". Names are keys and never paths:
// nothing is ever written or followed, so links, devices and names with ".." are only skipped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "checksum.hpp"
#include "sidecar.hpp"

namespace laclip {

// What is wrong with a tar, and where. The caller adds the file's name.
class TarError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Bytes by position. A view may be shorter than asked for (the end of the file) and is valid until
// the next call.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual std::uint64_t size() const = 0;
  virtual std::span<const std::byte> view(std::uint64_t offset, std::size_t bytes) = 0;
};

// A file read by pread. With `hash`, every byte is read once, in order, and hashed on its way
// (views must move forward); without, only what is asked for is read.
class FileSource : public ByteSource {
 public:
  FileSource(const std::string& path, bool hash);
  ~FileSource() override;
  FileSource(const FileSource&) = delete;
  FileSource& operator=(const FileSource&) = delete;

  std::uint64_t size() const override { return size_; }
  std::span<const std::byte> view(std::uint64_t offset, std::size_t bytes) override;
  std::uint64_t checksum();  // reads the rest; needs `hash`

 private:
  void read(std::uint64_t offset, std::span<std::byte> into);
  void advance(std::uint64_t end);  // reads and hashes up to `end`

  int file_ = -1;
  std::uint64_t size_ = 0;
  bool hashing_;
  Xxh64 hash_;
  std::vector<std::byte> buffer_;
  std::uint64_t begin_ = 0;  // buffer_ holds [begin_, end_) of the file
  std::uint64_t end_ = 0;
};

struct TarMember {
  std::string name;
  std::uint64_t offset = 0;  // of its first byte
  std::uint64_t bytes = 0;
};

class TarReader {
 public:
  explicit TarReader(ByteSource& source) : source_(source) {}
  // The next regular file; false after the last. Throws TarError.
  bool next(TarMember& member);

 private:
  ByteSource& source_;
  std::uint64_t at_ = 0;
  bool ended_ = false;
};

// The samples of a tar as they go into a .samples file. A sample is a run of members with one key:
// the name up to the first dot of its last component, without a leading "./".
struct TarScan {
  std::vector<SampleRecord> records;
  std::vector<std::uint32_t> key_end;
  std::string keys;
  std::uint64_t other_members = 0;  // files that belong to no sample (neither image nor caption)
};
TarScan scan_tar(ByteSource& source);

// All members NAME.`extension` of a tar, in order: their keys, and their bytes end to end. A member
// longer than `max_bytes` is cut there.
struct TarTexts {
  std::vector<std::string> keys;
  std::vector<std::uint64_t> end;
  std::string bytes;
};
TarTexts read_tar_texts(ByteSource& source, std::string_view extension, std::size_t max_bytes);

}  // namespace laclip
