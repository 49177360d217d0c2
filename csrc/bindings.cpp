// The only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include "checksum.hpp"
#include "philox.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const std::byte> as_bytes(const Bytes& array) {
  return {reinterpret_cast<const std::byte*>(array.data()), array.size()};
}

}  // namespace

NB_MODULE(_native, module) {
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
}
