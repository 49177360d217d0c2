#include "shard.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace laclip {
namespace {

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error("'" + path + "' " + what);
}

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

std::string system_error(int code) { return std::strerror(code); }

// A system call, up to 5 times within 3 seconds: network file systems recover from short outages; a
// disk that is gone, or a file, does not.
template <typename Call>
auto patiently(Call call) {
  for (int failures = 0;;) {
    const auto result = call();
    if (result >= 0 || errno == ENOENT) return result;
    if (errno == EINTR) continue;
    if (++failures == 5) return result;
    std::this_thread::sleep_for(std::chrono::milliseconds(100 << failures));
  }
}

int open_file(const std::string& path) {
  const int fd = patiently([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC); });
  const int code = errno;
  const char* help = code == ENOENT ? ". Put it back, or run: laclip index, laclip tokenize" : "";
  if (fd < 0) fail(path, "cannot be opened: " + system_error(code) + help);
  return fd;
}

std::uint64_t file_size(int fd, const std::string& path) {
  struct stat info{};
  if (::fstat(fd, &info) != 0) fail(path, "cannot be examined: " + system_error(errno));
  return static_cast<std::uint64_t>(info.st_size);
}

template <typename Header>
const Header& header_of(const MappedFile& file, const std::string& path, const char (&magic)[8],
                        const char* command) {
  const auto bytes = file.bytes();
  if (bytes.size() < sizeof(Header)) {
    fail(path, "is " + std::to_string(bytes.size()) + " bytes long, its header alone is " +
                   std::to_string(sizeof(Header)) + ". Run: " + command);
  }
  const auto& header = *reinterpret_cast<const Header*>(bytes.data());
  if (std::memcmp(header.magic, magic, sizeof magic) != 0) {
    fail(path, std::string("does not begin with ") + std::string(magic, 8) + ". Run: " + command);
  }
  if (header.version != kSidecarVersion || header.header_bytes != sizeof(Header)) {
    fail(path, "has format version " + std::to_string(header.version) + ", expected " +
                   std::to_string(kSidecarVersion) + ". Run: " + command);
  }
  return header;
}

void expect(const std::string& path, const char* what, const std::string& found,
            const std::string& expected, const char* command) {
  if (found != expected) {
    fail(path,
         std::string("has ") + what + " " + found + ", expected " + expected + ". Run: " + command);
  }
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const int fd = open_file(path);
  const std::uint64_t size = file_size(fd, path);
  void* at = nullptr;
  if (size > 0) at = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  const int code = errno;
  ::close(fd);
  if (at == MAP_FAILED) fail(path, "cannot be mapped: " + system_error(code));
  bytes_ = {static_cast<const std::byte*>(at), size};
  if (size > 0) ::madvise(at, size, MADV_WILLNEED);
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

Shard::Shard(const ShardFiles& files)
    : tar_(files.tar),
      captions_path_(files.captions),
      samples_(files.samples),
      captions_(files.captions) {
  const auto& samples =
      header_of<SamplesHeader>(samples_, files.samples, kSamplesMagic, "laclip index");
  expect(files.samples, "sample count", std::to_string(samples.count), std::to_string(files.count),
         "laclip index");
  expect(files.samples, "checksum", hex(samples.checksum), hex(files.samples_checksum),
         "laclip index");
  const std::uint64_t count = files.count;
  const std::uint64_t most = samples_.bytes().size() / sizeof(SampleRecord);
  if (count > most || samples.keys_bytes > samples_.bytes().size()) {
    fail(files.samples, "counts " + std::to_string(count) + " samples, its size holds at most " +
                            std::to_string(most) + ". Run: laclip index");
  }
  const std::uint64_t samples_bytes = sizeof(SamplesHeader) + count * sizeof(SampleRecord) +
                                      count * sizeof(std::uint32_t) + samples.keys_bytes;
  expect(files.samples, "size in bytes", std::to_string(samples_.bytes().size()),
         std::to_string(samples_bytes), "laclip index");
  const std::byte* at = samples_.bytes().data() + sizeof(SamplesHeader);
  records_ = reinterpret_cast<const SampleRecord*>(at);
  key_end_ = reinterpret_cast<const std::uint32_t*>(records_ + count);
  keys_ = reinterpret_cast<const char*>(key_end_ + count);

  const auto& captions =
      header_of<CaptionsHeader>(captions_, files.captions, kCaptionsMagic, "laclip tokenize");
  const std::string tokenizer(captions.tokenizer, ::strnlen(captions.tokenizer, 64));
  expect(files.captions, "tokenizer", tokenizer, files.tokenizer, "laclip tokenize");
  expect(files.captions, "checksum", hex(captions.checksum), hex(files.captions_checksum),
         "laclip tokenize");
  expect(files.captions, "checksum of the samples", hex(captions.samples_checksum),
         hex(files.samples_checksum), "laclip tokenize");
  expect(files.captions, "sample count", std::to_string(captions.count), std::to_string(count),
         "laclip tokenize");
  expect(files.captions, "variant count", std::to_string(captions.variants),
         std::to_string(files.variants), "laclip tokenize");
  if (captions.token_bytes != 2 && captions.token_bytes != 4) {
    fail(files.captions, "has " + std::to_string(captions.token_bytes) +
                             "-byte tokens, expected 2 or 4. Run: laclip tokenize");
  }
  const std::uint64_t words = captions_.bytes().size() / sizeof(std::uint32_t);
  if (captions.tokens > caption_position(~0u) || samples.keys_bytes > ~0u ||
      (captions.variants > 0 && count > words / captions.variants)) {
    fail(files.captions, "counts " + std::to_string(captions.tokens) + " tokens and " +
                             std::to_string(captions.variants) +
                             " variants, more than it holds. Run: laclip tokenize");
  }
  variants_ = captions.variants;
  token_bytes_ = captions.token_bytes;
  token_count_ = static_cast<std::uint32_t>(captions.tokens);
  keys_bytes_ = static_cast<std::uint32_t>(samples.keys_bytes);
  const std::uint64_t entries = count * variants_ + 1;
  const std::uint64_t captions_bytes =
      sizeof(CaptionsHeader) + entries * sizeof(std::uint32_t) + captions.tokens * token_bytes_;
  expect(files.captions, "size in bytes", std::to_string(captions_.bytes().size()),
         std::to_string(captions_bytes), "laclip tokenize");
  at = captions_.bytes().data() + sizeof(CaptionsHeader);
  entries_ = reinterpret_cast<const std::uint32_t*>(at);
  tokens_ = at + entries * sizeof(std::uint32_t);

  tar_fd_ = open_file(files.tar);
  try {
    expect(files.tar, "size in bytes", std::to_string(file_size(tar_fd_, files.tar)),
           std::to_string(samples.shard_bytes), "laclip index");
  } catch (...) {
    ::close(tar_fd_);
    throw;
  }
}

Shard::~Shard() { ::close(tar_fd_); }

std::string_view Shard::key(std::uint32_t index) const {
  const std::uint32_t begin = index == 0 ? 0 : key_end_[index - 1];
  const std::uint32_t end = key_end_[index];
  if (end < begin || end > keys_bytes_) return "(damaged key)";
  return {keys_ + begin, end - begin};
}

std::size_t Shard::caption(std::uint32_t index, std::uint32_t variant,
                           std::span<std::int32_t> out) const {
  const std::size_t entry = static_cast<std::size_t>(index) * variants_ + variant;
  const std::uint32_t begin = caption_position(entries_[entry]);
  const std::uint32_t end = caption_position(entries_[entry + 1]);
  if (end < begin || end > token_count_) {
    fail(captions_path_, "is damaged at sample " + std::string(key(index)) +
                             ": its entry points outside the tokens. Run: laclip verify");
  }
  const std::size_t take = std::min<std::size_t>(end - begin, out.size());
  if (token_bytes_ == 2) {
    const auto* tokens = reinterpret_cast<const std::uint16_t*>(tokens_) + begin;
    std::copy_n(tokens, take, out.begin());
  } else {
    const auto* tokens = reinterpret_cast<const std::int32_t*>(tokens_) + begin;
    std::copy_n(tokens, take, out.begin());
  }
  return take;
}

void Shard::expect_sample(std::uint32_t index) const {
  __builtin_prefetch(records_ + index);
  const std::uint32_t* first = entries_ + static_cast<std::size_t>(index) * variants_;
  __builtin_prefetch(first);
  __builtin_prefetch(first + variants_);
}

void Shard::expect_caption(std::uint32_t index, std::uint32_t variant) const {
  const std::byte* first =
      tokens_ + std::size_t{caption_position(caption_entry(index, variant))} * token_bytes_;
  __builtin_prefetch(first);
  __builtin_prefetch(first + 64);  // 32 tokens more
}

void Shard::expect_image(std::uint32_t index) const {
  const SampleRecord& sample = record(index);
  ::posix_fadvise(tar_fd_, static_cast<off_t>(sample.offset), sample.bytes, POSIX_FADV_WILLNEED);
}

void Shard::read_image(std::uint32_t index, std::span<std::byte> out) const {
  const SampleRecord& sample = record(index);
  for (std::size_t done = 0; done < out.size();) {
    const ssize_t got = patiently([&] {
      return ::pread(tar_fd_, out.data() + done, out.size() - done,
                     static_cast<off_t>(sample.offset + done));
    });
    const int code = errno;
    if (got < 0) {
      fail(tar_, "cannot be read at sample " + std::string(key(index)) +
                     " after 5 tries: " + system_error(code));
    }
    if (got == 0) {
      fail(tar_, "ends inside sample " + std::string(key(index)) +
                     ": it was cut short since it was indexed. Run: laclip index");
    }
    done += static_cast<std::size_t>(got);
  }
}

ShardCache::ShardCache(std::vector<ShardFiles> files, std::size_t capacity)
    : files_(std::move(files)), capacity_(std::max<std::size_t>(1, capacity)) {}

std::shared_ptr<const Shard> ShardCache::open(std::uint32_t shard) {
  if (auto opened = find(shard)) return opened;
  // Not under the lock: a file system that is slow to open holds up nobody who needs another shard.
  auto opened = std::make_shared<const Shard>(files_[shard]);
  const std::lock_guard lock(mutex_);
  if (place_.contains(shard)) return place_[shard]->second;  // another thread was faster
  recent_.emplace_front(shard, opened);
  place_[shard] = recent_.begin();
  if (recent_.size() > capacity_) {
    place_.erase(recent_.back().first);
    recent_.pop_back();
  }
  return opened;
}

std::shared_ptr<const Shard> ShardCache::find(std::uint32_t shard) {
  const std::lock_guard lock(mutex_);
  const auto found = place_.find(shard);
  if (found == place_.end()) return nullptr;
  recent_.splice(recent_.begin(), recent_, found->second);
  return found->second->second;
}

}  // namespace laclip
