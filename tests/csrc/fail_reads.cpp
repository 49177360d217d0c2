// Preloaded into a process (LD_PRELOAD): the first FAIL_READS calls of pread, and the first
// FAIL_OPENS calls that open a tar or a sidecar, fail with EIO, as on a network file system whose
// server is away for a while.
#include <dlfcn.h>
#include <sys/types.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdlib>
#include <string_view>

namespace {

using Read = ssize_t (*)(int, void*, std::size_t, off_t);
using Open = int (*)(const char*, int, ...);

bool fails(std::atomic<int>& left) {
  if (left.fetch_sub(1) <= 0) return false;
  errno = EIO;
  return true;
}

ssize_t read_or_fail(const char* name, int fd, void* out, std::size_t size, off_t offset) {
  static std::atomic<int> left{std::atoi(std::getenv("FAIL_READS"))};
  if (fails(left)) return -1;
  return reinterpret_cast<Read>(dlsym(RTLD_NEXT, name))(fd, out, size, offset);
}

int open_or_fail(const char* name, const char* path, int flags, mode_t mode) {
  static std::atomic<int> left{std::atoi(std::getenv("FAIL_OPENS"))};
  const std::string_view text(path);
  for (const char* end : {".tar", ".samples", ".captions"}) {
    if (text.ends_with(end) && fails(left)) return -1;
  }
  return reinterpret_cast<Open>(dlsym(RTLD_NEXT, name))(path, flags, mode);
}

}  // namespace

extern "C" ssize_t pread(int fd, void* out, std::size_t size, off_t offset) {
  return read_or_fail("pread", fd, out, size, offset);
}

extern "C" ssize_t pread64(int fd, void* out, std::size_t size, off_t offset) {
  return read_or_fail("pread64", fd, out, size, offset);
}

extern "C" int open(const char* path, int flags, ...) {
  std::va_list more;
  va_start(more, flags);
  const mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return open_or_fail("open", path, flags, mode);
}

extern "C" int open64(const char* path, int flags, ...) {
  std::va_list more;
  va_start(more, flags);
  const mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return open_or_fail("open64", path, flags, mode);
}
