// The only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "batch_reader.hpp"
#include "bpe_batch.hpp"
#include "checksum.hpp"
#include "epoch_order.hpp"
#include "philox.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const std::byte> as_bytes(const Bytes& array) {
  return {reinterpret_cast<const std::byte*>(array.data()), array.size()};
}

// A NumPy view of memory that `owner` keeps alive.
template <typename T>
nb::ndarray<nb::numpy, T> view(nb::handle owner, T* data,
                               std::initializer_list<std::size_t> shape) {
  return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

laclip::CaptionPolicy caption_policy(const std::string& name) {
  using laclip::CaptionPolicy;
  if (name == "uniform") return CaptionPolicy::kUniform;
  if (name == "weights") return CaptionPolicy::kWeights;
  if (name == "original") return CaptionPolicy::kOriginal;
  if (name == "multi") return CaptionPolicy::kMulti;
  throw std::invalid_argument("captions: expected uniform, weights, original or multi, found '" +
                              name + "'");
}

void bind_reader(nb::module_& module) {
  using laclip::Batch;
  using laclip::BatchReader;
  using laclip::EpochOrder;
  using laclip::ReaderOptions;
  using laclip::ShardFiles;

  nb::class_<EpochOrder>(module, "EpochOrder", "The order of an epoch; see csrc/epoch_order.hpp.")
      .def(
          "__init__",
          [](EpochOrder* self, const std::vector<std::uint64_t>& counts, std::uint64_t seed,
             std::uint64_t epoch, std::size_t window_shards) {
            new (self) EpochOrder(counts, seed, epoch, window_shards);
          },
          "counts"_a, "seed"_a, "epoch"_a, "window_shards"_a)
      .def("__len__", &EpochOrder::size)
      .def("__getitem__", [](const EpochOrder& self, std::uint64_t position) {
        if (position >= self.size()) throw nb::index_error();
        const laclip::SamplePlace place = self.at(position);
        return std::pair(place.shard, place.index);
      });

  nb::class_<ShardFiles>(module, "ShardFiles")
      .def(
          "__init__",
          [](ShardFiles* self, std::string tar, std::string samples, std::string captions,
             std::string tokenizer, std::uint64_t count, std::uint32_t variants,
             std::uint64_t samples_checksum, std::uint64_t captions_checksum) {
            new (self) ShardFiles{tar,   samples,  captions,         tokenizer,
                                  count, variants, samples_checksum, captions_checksum};
          },
          nb::kw_only(), "tar"_a, "samples"_a, "captions"_a, "tokenizer"_a, "count"_a, "variants"_a,
          "samples_checksum"_a, "captions_checksum"_a);

  nb::class_<ReaderOptions>(module, "ReaderOptions")
      .def(nb::init<>())
      .def_rw("seed", &ReaderOptions::seed)
      .def_rw("global_batch_size", &ReaderOptions::global_batch_size)
      .def_rw("rank", &ReaderOptions::rank)
      .def_rw("world_size", &ReaderOptions::world_size)
      .def_rw("window_shards", &ReaderOptions::window_shards)
      .def_rw("threads", &ReaderOptions::threads)
      .def_rw("prefetch", &ReaderOptions::prefetch)
      .def_prop_rw(
          "captions", [](const ReaderOptions& self) { return static_cast<int>(self.policy); },
          [](ReaderOptions& self, const std::string& name) { self.policy = caption_policy(name); })
      .def_rw("weights", &ReaderOptions::weights)
      .def_rw("context_length", &ReaderOptions::context_length)
      .def_rw("sot_token", &ReaderOptions::sot_token)
      .def_rw("eot_token", &ReaderOptions::eot_token)
      .def_rw("scale_low", &ReaderOptions::scale_low)
      .def_rw("scale_high", &ReaderOptions::scale_high)
      .def_rw("ratio_low", &ReaderOptions::ratio_low)
      .def_rw("ratio_high", &ReaderOptions::ratio_high)
      .def_rw("flip", &ReaderOptions::flip)
      .def_rw("max_pixels", &ReaderOptions::max_pixels);

  nb::class_<Batch>(module, "Batch",
                    "One rank's part of a global batch; see csrc/batch_reader.hpp.")
      .def_ro("index", &Batch::index)
      .def_ro("size", &Batch::size)
      .def_ro("variants", &Batch::variants)
      .def_ro("substitutes", &Batch::substitutes)
      .def_prop_ro("samples",
                   [](nb::handle self) {
                     auto& batch = nb::cast<Batch&>(self);
                     return view(self, batch.sample.data(), {batch.size});
                   })
      .def_prop_ro("epochs",
                   [](nb::handle self) {
                     auto& batch = nb::cast<Batch&>(self);
                     return view(self, batch.epoch.data(), {batch.size});
                   })
      .def_prop_ro("drawn_variants",
                   [](nb::handle self) {
                     auto& batch = nb::cast<Batch&>(self);
                     return view(self, batch.variant.data(), {batch.size});
                   })
      .def_prop_ro("windows",
                   [](nb::handle self) {
                     auto& batch = nb::cast<Batch&>(self);
                     return view(self, batch.window.data(), {batch.size, 4});
                   })
      .def_prop_ro("mirrors",
                   [](nb::handle self) {
                     auto& batch = nb::cast<Batch&>(self);
                     return view(self, batch.mirror.data(), {batch.size});
                   })
      .def_prop_ro(
          "token_ids",
          [](nb::handle self) {
            auto& batch = nb::cast<Batch&>(self);
            const std::size_t length = batch.token_ids.size() / (batch.variants * batch.size);
            return view(self, batch.token_ids.data(), {batch.variants, batch.size, length});
          })
      .def_prop_ro("begins",
                   [](nb::handle self) {
                     auto& batch = nb::cast<Batch&>(self);
                     return view(self, batch.begin.data(), {batch.size + 1});
                   })
      .def_prop_ro("bytes", [](nb::handle self) {
        auto& batch = nb::cast<Batch&>(self);
        return view(self, reinterpret_cast<std::uint8_t*>(batch.bytes.data()),
                    {batch.bytes.size()});
      });

  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<BatchReader>(module, "BatchReader", "Reads batches ahead; see csrc/batch_reader.hpp.")
      .def(nb::init<std::vector<ShardFiles>, ReaderOptions>(), "shards"_a, "options"_a)
      .def("__len__", &BatchReader::samples)
      .def("seek", &BatchReader::seek, "index"_a, Release())
      .def("next", &BatchReader::next, Release())
      .def("read", &BatchReader::read, "index"_a, Release())
      .def("mark_bad", &BatchReader::mark_bad, "samples"_a)
      .def("name", &BatchReader::name, "sample"_a);
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
      texts.push_back(
          {PyUnicode_DATA(string), static_cast<std::size_t>(PyUnicode_GET_LENGTH(string)),
           static_cast<std::uint8_t>(PyUnicode_KIND(string)), PyUnicode_IS_ASCII(string) != 0});
    }
    return texts;
  }

  void bind_tokenizer(nb::module_ & module) {
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
  bind_reader(module);

  bind_tokenizer(module);
}
