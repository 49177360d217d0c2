// Preloaded into a process (LD_PRELOAD): the first FAIL_READS calls of pread fail with EIO, as on a
// network file system whose server is away for a while.
#include <dlfcn.h>
#include <sys/types.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>

namespace {

using Read = ssize_t (*)(int, void*, std::size_t, off_t);

ssize_t read_or_fail(const char* name, int fd, void* out, std::size_t size, off_t offset) {
  static std::atomic<int> left{std::atoi(std::getenv("FAIL_READS"))};
  if (left.fetch_sub(1) > 0) {
    errno = EIO;
    return -1;
  }
  return reinterpret_cast<Read>(dlsym(RTLD_NEXT, name))(fd, out, size, offset);
}

}  // namespace

extern "C" ssize_t pread(int fd, void* out, std::size_t size, off_t offset) {
  return read_or_fail("pread", fd, out, size, offset);
}

extern "C" ssize_t pread64(int fd, void* out, std::size_t size, off_t offset) {
  return read_or_fail("pread64", fd, out, size, offset);
}
