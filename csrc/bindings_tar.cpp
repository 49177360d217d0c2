#include <cerrno>
#include <system_error>

#include "bindings.hpp"
#include "image_header.hpp"
#include "tar.hpp"

namespace {

nb::bytes to_bytes(const void* data, std::size_t size) { return nb::bytes(data, size); }

// Errors of a tar become ValueError with the file's name in front, those of the system OSError.
template <typename Function>
auto with_tar(const std::string& path, bool hash, Function function) {
  try {
    nb::gil_scoped_release release;
    laclip::FileSource source(path, hash);
    return function(source);
  } catch (const laclip::TarError& error) {
    throw std::invalid_argument(path + ": " + error.what());
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
    throw nb::python_error();
  }
}

}  // namespace

void bind_tar(nb::module_& module) {
  module.def(
      "scan_tar",
      [](const std::string& path) {
        std::uint64_t bytes = 0, checksum = 0;
        const laclip::TarScan scan = with_tar(path, true, [&](laclip::FileSource& source) {
          laclip::TarScan found = laclip::scan_tar(source);
          bytes = source.size();
          checksum = source.checksum();
          return found;
        });
        nb::dict result;
        result["records"] =
            to_bytes(scan.records.data(), scan.records.size() * sizeof scan.records[0]);
        result["key_end"] =
            to_bytes(scan.key_end.data(), scan.key_end.size() * sizeof scan.key_end[0]);
        result["keys"] = to_bytes(scan.keys.data(), scan.keys.size());
        result["count"] = scan.records.size();
        result["other_members"] = scan.other_members;
        result["shard_bytes"] = bytes;
        result["shard_checksum"] = checksum;
        return result;
      },
      "path"_a,
      "The samples of a tar in the layout of a .samples file, its size and its XXH64. Raises "
      "ValueError for a broken tar.");
  module.def(
      "read_tar_texts",
      [](const std::string& path, const std::string& extension, std::size_t max_bytes) {
        const laclip::TarTexts texts = with_tar(path, false, [&](laclip::FileSource& source) {
          return laclip::read_tar_texts(source, extension, max_bytes);
        });
        nb::list result;
        std::uint64_t begin = 0;
        for (std::size_t i = 0; i < texts.keys.size(); ++i) {
          result.append(nb::make_tuple(nb::str(texts.keys[i].c_str(), texts.keys[i].size()),
                                       to_bytes(texts.bytes.data() + begin, texts.end[i] - begin)));
          begin = texts.end[i];
        }
        return result;
      },
      "path"_a, "extension"_a, "max_bytes"_a,
      "[(key, bytes)] of the members KEY.extension of a tar, each cut at max_bytes.");
  module.def(
      "hash_slices",
      [](const Bytes& bytes,
         nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> ends) {
        auto hashes = std::make_unique<std::uint64_t[]>(ends.size());
        std::uint32_t begin = 0;
        for (std::size_t i = 0; i < ends.size(); ++i) {
          const std::uint32_t end = ends.data()[i];
          if (end < begin || end > bytes.size()) throw std::invalid_argument("slices out of order");
          hashes[i] = laclip::xxh64(as_bytes(bytes).subspan(begin, end - begin));
          begin = end;
        }
        const std::uint64_t* data = hashes.get();
        nb::capsule owner(hashes.release(),
                          [](void* p) noexcept { delete[] static_cast<std::uint64_t*>(p); });
        return nb::ndarray<nb::numpy, const std::uint64_t, nb::ndim<1>>(data, {ends.size()}, owner);
      },
      "bytes"_a, "ends"_a, "XXH64 of bytes[0:ends[0]], bytes[ends[0]:ends[1]], ...");
  module.def(
      "parse_image_header",
      [](const Bytes& bytes) {
        const laclip::ImageHeader header = laclip::parse_image_header(as_bytes(bytes));
        return nb::make_tuple(static_cast<int>(header.format), header.width, header.height,
                              header.flags, header.orientation,
                              static_cast<std::uint32_t>(header.reason));
      },
      "bytes"_a, "(format, width, height, flags, orientation, reason) of an encoded image.");
  module.def(
      "find_damage",
      [](const Bytes& bytes) {
        const auto image = as_bytes(bytes);
        return static_cast<int>(laclip::find_damage(laclip::parse_image_header(image), image));
      },
      "bytes"_a, "BrokenReason of an encoded image whose header is sound.");
}
