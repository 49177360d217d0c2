// The Python module.
#include "bindings.hpp"

#include "checksum.hpp"
#include "philox.hpp"

NB_MODULE(_native, module) {
  // An error's traceback may keep objects alive until the interpreter is gone; that is no leak.
  nb::set_leak_warnings(false);
  module.doc() = "The C++ core of laclip.";

  module.def(
      "philox",
      [](std::array<std::uint64_t, 4> counter, std::uint64_t key0, std::uint64_t key1) {
        return laclip::philox(counter, key0, key1);
      },
      "counter"_a, "key0"_a, "key1"_a, "Four 64-bit words of Philox4x64-10.");
  module.def(
      "xxh64",
      [](const Bytes& bytes) {
        nb::gil_scoped_release release;
        return laclip::xxh64(as_bytes(bytes));
      },
      "bytes"_a, "XXH64 (seed 0) of a uint8 array.");
  bind_reader(module);
  bind_resize(module);
  bind_tar(module);
  bind_tokenizer(module);
}
