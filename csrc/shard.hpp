// A shard as training reads it: the tar open for pread, its two sidecars mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sidecar.hpp"

namespace laclip {

// What dataset.json says of a shard; every opened file is held against it.
struct ShardFiles {
  std::string tar;
  std::string samples;
  std::string captions;
  std::string tokenizer;  // fingerprint
  std::uint64_t count = 0;
  std::uint32_t variants = 0;
  std::uint64_t samples_checksum = 0;
  std::uint64_t captions_checksum = 0;
};

// A whole file, mapped read-only.
class MappedFile {
 public:
  // Mapped, and asked of the disk: what is read next is in memory soon.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

class Shard {
 public:
  // Throws std::runtime_error that names the file, what was found and what was expected.
  explicit Shard(const ShardFiles& files);
  ~Shard();
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;

  const SampleRecord& record(std::uint32_t index) const { return records_[index]; }
  std::string_view key(std::uint32_t index) const;
  std::uint32_t variants() const { return variants_; }
  // Entry of a caption: its flags (kCaptionMissing, kCaptionShort) and its place.
  std::uint32_t caption_entry(std::uint32_t index, std::uint32_t variant) const {
    return entries_[static_cast<std::size_t>(index) * variants_ + variant];
  }
  // Copies the first tokens of a caption, at most out.size(); returns how many.
  std::size_t caption(std::uint32_t index, std::uint32_t variant,
                      std::span<std::int32_t> out) const;
  // Reads the encoded image; out.size() == record(index).bytes. Read errors are retried.
  void read_image(std::uint32_t index, std::span<std::byte> out) const;

  // Asks for what is about to be read, in this order: memory and disks answer many such requests at
  // once, but a reader that waits for each only one at a time.
  void expect_sample(std::uint32_t index) const;
  void expect_caption(std::uint32_t index, std::uint32_t variant) const;
  void expect_image(std::uint32_t index) const;

 private:
  std::string tar_;
  std::string captions_path_;
  MappedFile samples_;
  MappedFile captions_;
  const SampleRecord* records_ = nullptr;
  const std::uint32_t* key_end_ = nullptr;
  const char* keys_ = nullptr;
  const std::uint32_t* entries_ = nullptr;
  const std::byte* tokens_ = nullptr;
  std::uint32_t variants_ = 0;
  std::uint32_t token_bytes_ = 0;
  std::uint32_t token_count_ = 0;
  std::uint32_t keys_bytes_ = 0;
  int tar_fd_ = -1;
};

// Opened shards, the least recently used closed first. Thread-safe.
class ShardCache {
 public:
  ShardCache(std::vector<ShardFiles> files, std::size_t capacity);
  std::shared_ptr<const Shard> open(std::uint32_t shard);
  const ShardFiles& files(std::uint32_t shard) const { return files_[shard]; }

 private:
  std::shared_ptr<const Shard> find(std::uint32_t shard);

  using Entry = std::pair<std::uint32_t, std::shared_ptr<const Shard>>;
  std::vector<ShardFiles> files_;
  std::size_t capacity_;
  std::mutex mutex_;
  std::list<Entry> recent_;  // newest first
  std::unordered_map<std::uint32_t, std::list<Entry>::iterator> place_;
};

}  // namespace laclip
