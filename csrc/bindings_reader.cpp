#include <unistd.h>

#include "batch_reader.hpp"
#include "bindings.hpp"
#include "epoch_order.hpp"

namespace {

// A NumPy view of memory that `owner` keeps alive.
template <typename T>
nb::ndarray<nb::numpy, T> view(nb::handle owner, T* data,
                               std::initializer_list<std::size_t> shape) {
  return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

// A getter of one of a batch's vectors, as a view.
template <typename T>
auto vector_of(std::vector<T> laclip::Batch::* vector) {
  return [vector](nb::handle self) {
    std::vector<T>& values = nb::cast<laclip::Batch&>(self).*vector;
    return view(self, values.data(), {values.size()});
  };
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

}  // namespace

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
      .def_rw("pad_token", &ReaderOptions::pad_token)
      .def_rw("pad_captions", &ReaderOptions::pad_captions)
      .def_rw("scale_low", &ReaderOptions::scale_low)
      .def_rw("scale_high", &ReaderOptions::scale_high)
      .def_rw("ratio_low", &ReaderOptions::ratio_low)
      .def_rw("ratio_high", &ReaderOptions::ratio_high)
      .def_rw("flip", &ReaderOptions::flip)
      .def_rw("max_pixels", &ReaderOptions::max_pixels)
      .def_rw("exif_rotation", &ReaderOptions::exif_rotation);

  nb::class_<Batch>(module, "Batch",
                    "One rank's part of a global batch; see csrc/batch_reader.hpp.")
      .def_ro("index", &Batch::index)
      .def_ro("size", &Batch::size)
      .def_ro("variants", &Batch::variants)
      .def_ro("substitutes", &Batch::substitutes)
      .def_prop_ro("samples", vector_of(&Batch::sample))
      .def_prop_ro("epochs", vector_of(&Batch::epoch))
      .def_prop_ro("drawn_variants", vector_of(&Batch::variant))
      .def_prop_ro("windows",
                   [](nb::handle self) {
                     auto& batch = nb::cast<Batch&>(self);
                     return view(self, batch.window.data(), {batch.size, 4});
                   })
      .def_prop_ro("mirrors", vector_of(&Batch::mirror))
      .def_prop_ro("broken", vector_of(&Batch::broken))
      .def_prop_ro("token_ids",
                   [](nb::handle self) {
                     auto& batch = nb::cast<Batch&>(self);
                     return view(self, batch.token_ids.data(), {batch.captions().size()});
                   })
      .def_prop_ro("cu_seqlens", vector_of(&Batch::cu_seqlens))
      .def_prop_ro("begins", vector_of(&Batch::begin))
      .def_prop_ro("bytes",
                   [](nb::handle self) {
                     auto& batch = nb::cast<Batch&>(self);
                     const auto bytes = batch.buffer.bytes();
                     return view(self, reinterpret_cast<std::uint8_t*>(bytes.data()),
                                 {bytes.size()});
                   })
      .def(
          "images",
          [](nb::handle self) {
            auto& batch = nb::cast<Batch&>(self);
            auto* bytes = reinterpret_cast<std::uint8_t*>(batch.buffer.bytes().data());
            nb::list images;
            for (std::size_t i = 0; i < batch.size; ++i) {
              images.append(nb::ndarray<std::uint8_t>(bytes + batch.begin[i],
                                                      {batch.begin[i + 1] - batch.begin[i]}, self));
            }
            return images;
          },
          "The encoded images, each a DLPack capsule: DALI takes these in half the time of "
          "arrays.");

  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<BatchReader>(module, "BatchReader", "Reads batches ahead; see csrc/batch_reader.hpp.")
      .def(nb::new_([](std::vector<ShardFiles> shards, ReaderOptions options) {
             // A process that fork() made has the reader but not its threads: joining would hang.
             return std::shared_ptr<BatchReader>(
                 new BatchReader(std::move(shards), std::move(options)),
                 [owner = ::getpid()](BatchReader* reader) {
                   if (::getpid() == owner) delete reader;
                 });
           }),
           "shards"_a, "options"_a)
      .def("__len__", &BatchReader::samples)
      .def("seek", &BatchReader::seek, "index"_a, Release())
      .def("next",
           [](BatchReader& self) {
             const auto wait = [&self] {
               const nb::gil_scoped_release release;
               return self.wait(std::chrono::milliseconds(100));
             };
             while (!wait()) {  // Ctrl-C does not wait for a file system that is slow
               if (PyErr_CheckSignals() != 0) throw nb::python_error();
             }
             return self.next();
           })
      .def("read", &BatchReader::read, "index"_a, Release())
      .def("plan", nb::overload_cast<std::uint64_t>(&BatchReader::plan), "index"_a, Release())
      .def("mark_bad", &BatchReader::mark_bad, "samples"_a)
      .def("name", &BatchReader::name, "sample"_a);
}
