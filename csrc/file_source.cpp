#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "tar.hpp"

namespace laclip {
namespace {

constexpr std::uint64_t kReadBytes = 1 << 20;  // fits the second-level cache: hashed while warm
constexpr std::uint64_t kHeaderReadBytes = 4096;

}  // namespace

FileSource::FileSource(const std::string& path, bool hash) : hashing_(hash) {
  file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (file_ < 0 || ::fstat(file_, &status) != 0) {
    throw std::system_error(errno, std::generic_category(), "cannot open " + path);
  }
  if (!S_ISREG(status.st_mode)) throw TarError("not a regular file");
  size_ = static_cast<std::uint64_t>(status.st_size);
}

FileSource::~FileSource() {
  if (file_ >= 0) ::close(file_);
}

void FileSource::read(std::uint64_t offset, std::span<std::byte> into) {
  while (!into.empty()) {
    const ssize_t got = ::pread(file_, into.data(), into.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw std::system_error(errno, std::generic_category(), "read error");
    if (got == 0) throw TarError("the file became shorter while it was read");
    into = into.subspan(static_cast<std::size_t>(got));
    offset += static_cast<std::uint64_t>(got);
  }
}

void FileSource::advance(std::uint64_t end) {
  while (end_ < end) {
    const std::uint64_t take = std::min(kReadBytes, size_ - end_);
    const std::size_t kept = end_ - begin_;
    if (buffer_.size() < kept + take) buffer_.resize(kept + take);
    const std::span<std::byte> fresh = std::span(buffer_).subspan(kept, take);
    read(end_, fresh);
    hash_.update(fresh);
    end_ += take;
  }
}

std::span<const std::byte> FileSource::view(std::uint64_t offset, std::size_t bytes) {
  if (offset >= size_) return {};
  const std::uint64_t end = offset + std::min<std::uint64_t>(bytes, size_ - offset);
  if (!hashing_) {
    if (offset < begin_ || end > end_) {
      begin_ = offset;
      end_ = std::min(size_, std::max(end, offset + kHeaderReadBytes));
      if (buffer_.size() < end_ - begin_) buffer_.resize(end_ - begin_);
      read(begin_, std::span(buffer_).first(end_ - begin_));
    }
    return std::span(buffer_).subspan(offset - begin_, end - offset);
  }
  // Payloads that nobody looks at go by in blocks; what lies before `offset` is dropped.
  while (end_ < offset) {
    begin_ = end_;
    advance(std::min(offset, end_ + kReadBytes));
  }
  if (end > end_) {
    std::memmove(buffer_.data(), buffer_.data() + (offset - begin_), end_ - offset);
    begin_ = offset;
    advance(end);
  }
  return std::span(buffer_).subspan(offset - begin_, end - offset);
}

std::uint64_t FileSource::checksum() {
  while (end_ < size_) {
    begin_ = end_;
    advance(std::min(size_, end_ + kReadBytes));
  }
  return hash_.digest();
}

}  // namespace laclip
