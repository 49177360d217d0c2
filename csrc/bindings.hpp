// What the files that know Python share: one for each subject, and bindings.cpp for the module.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace nb = nanobind;
using namespace nb::literals;

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

inline std::span<const std::byte> as_bytes(const Bytes& array) {
  return {reinterpret_cast<const std::byte*>(array.data()), array.size()};
}

void bind_reader(nb::module_& module);
void bind_resize(nb::module_& module);
void bind_tar(nb::module_& module);
void bind_tokenizer(nb::module_& module);
