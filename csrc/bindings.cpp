// The only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <memory>

#include "bpe_batch.hpp"
#include "checksum.hpp"
#include "image_header.hpp"
#include "philox.hpp"
#include "tar.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const std::byte> as_bytes(const Bytes& array) {
  return {reinterpret_cast<const std::byte*>(array.data()), array.size()};
}

nb::bytes to_bytes(const void* data, std::size_t size) { return nb::bytes(data, size); }

// Errors of a tar become ValueError with the file's name in front.
template <typename Function>
auto with_tar(const std::string& path, bool hash, Function function) {
  nb::gil_scoped_release release;
  try {
    laclip::FileSource source(path, hash);
    return function(source);
  } catch (const laclip::TarError& error) {
    throw std::invalid_argument(path + ": " + error.what());
  }
}

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
}

// --- tokenizer

// A vector as a NumPy array that owns it.
template <typename T>
auto to_numpy(std::vector<T> values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owned->data();
  const std::size_t size = owned->size();
  nb::capsule owner(owned.release(),
                    [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(data, {size}, owner);
}

// Views of the strings of a tuple, valid as long as the tuple, which cannot change.
std::vector<laclip::Text> as_texts(const nb::tuple& strings) {
  std::vector<laclip::Text> texts;
  texts.reserve(strings.size());
  for (std::size_t i = 0; i < strings.size(); ++i) {
    PyObject* string = PyTuple_GET_ITEM(strings.ptr(), static_cast<Py_ssize_t>(i));
    if (!PyUnicode_Check(string)) {
      const std::string found =
          nb::cast<std::string>(nb::str(nb::type_name(nb::handle(string).type())));
      throw nb::type_error(
          ("text " + std::to_string(i) + " is a " + found + ", expected a str").c_str());
    }
#if PY_VERSION_HEX < 0x030c0000
    if (PyUnicode_READY(string) != 0) throw nb::python_error();
#endif
    texts.push_back({PyUnicode_DATA(string), static_cast<std::size_t>(PyUnicode_GET_LENGTH(string)),
                     static_cast<std::uint8_t>(PyUnicode_KIND(string)),
                     PyUnicode_IS_ASCII(string) != 0});
  }
  return texts;
}

void bind_tokenizer(nb::module_& module) {
  using laclip::Bpe;
  using Rows = nb::ndarray<std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  const auto form = [](bool words) {
    return words ? laclip::TextForm::kWords : laclip::TextForm::kRaw;
  };
  nb::class_<Bpe>(module, "Bpe", "Byte-pair encoding; laclip.tokenizer is its face.")
      .def(
          "__init__",
          [](Bpe* self, const nb::bytes& merges) {
            new (self) Bpe(std::string_view(merges.c_str(), merges.size()));
          },
          "merges"_a)
      .def(
          "encode_ragged",
          [form](const Bpe& bpe, const nb::tuple& strings, bool words, std::size_t max_tokens,
                 unsigned threads) {
            const auto texts = as_texts(strings);
            laclip::RaggedTokens ragged;
            {
              nb::gil_scoped_release release;
              ragged = encode_ragged(bpe, texts, form(words), max_tokens, threads);
            }
            return nb::make_tuple(to_numpy(std::move(ragged.tokens)),
                                  to_numpy(std::move(ragged.lengths)),
                                  to_numpy(std::move(ragged.unclean)));
          },
          "texts"_a, "words"_a, "max_tokens"_a, "num_threads"_a,
          "Tokens, the number of each text's, and the numbers of the texts to clean first.")
      .def(
          "encode_padded",
          [form](const Bpe& bpe, const nb::tuple& strings, bool words, const Rows& out,
                 unsigned threads) {
            if (out.shape(0) != strings.size() || out.shape(1) < 2) {
              throw nb::value_error("out does not have one row of two or more ids per text");
            }
            const auto texts = as_texts(strings);
            std::vector<std::int64_t> unclean;
            {
              nb::gil_scoped_release release;
              unclean = encode_padded(bpe, texts, form(words), out.shape(1), out.data(), threads);
            }
            return to_numpy(std::move(unclean));
          },
          "texts"_a, "words"_a, "out"_a.noconvert(), "num_threads"_a,
          "Fills `out` and returns the numbers of the texts to clean first.")
      .def(
          "bytes_of",
          [](const Bpe& bpe, std::size_t token) {
            if (token >= Bpe::kVocabularySize) throw nb::index_error("no such token");
            const std::string& bytes = bpe.bytes_of(static_cast<Bpe::Token>(token));
            return nb::bytes(bytes.data(), bytes.size());
          },
          "token"_a, "The bytes of a token; the last token of a word ends in </w>.");
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

  bind_tar(module);

  bind_tokenizer(module);
}
