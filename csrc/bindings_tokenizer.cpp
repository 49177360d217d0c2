#include <memory>

#include "bindings.hpp"
#include "bpe_batch.hpp"

namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

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

}  // namespace

void bind_tokenizer(nb::module_& module) {
  using laclip::Bpe;
  using laclip::CharacterTable;
  const auto as_span = [](const auto& array) { return std::span(array.data(), array.size()); };
  nb::class_<CharacterTable>(module, "CharacterTable", "Made by laclip.text_clean.")
      .def(
          "__init__",
          [as_span](CharacterTable* self, const Array<std::uint32_t>& entries,
                    const Array<std::uint8_t>& combining, const Array<std::uint16_t>& suspicious,
                    const Array<std::uint64_t>& compositions) {
            new (self) CharacterTable(as_span(entries), as_span(combining), as_span(suspicious),
                                      as_span(compositions));
          },
          "entries"_a, "combining"_a, "suspicious"_a, "compositions"_a);
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
          [form](const Bpe& bpe, const CharacterTable* table, const nb::tuple& strings, bool words,
                 std::size_t max_tokens, unsigned threads) {
            const auto texts = as_texts(strings);
            laclip::RaggedTokens ragged;
            {
              nb::gil_scoped_release release;
              ragged = encode_ragged(bpe, table, texts, form(words), max_tokens, threads);
            }
            return nb::make_tuple(to_numpy(std::move(ragged.tokens)),
                                  to_numpy(std::move(ragged.lengths)),
                                  to_numpy(std::move(ragged.unclean)));
          },
          "table"_a.none(), "texts"_a, "words"_a, "max_tokens"_a, "num_threads"_a,
          "Tokens, the number of each text's, and the numbers of the texts to clean first.")
      .def(
          "encode_padded",
          [form](const Bpe& bpe, const CharacterTable* table, const nb::tuple& strings, bool words,
                 const Rows& out, unsigned threads) {
            if (out.shape(0) != strings.size() || out.shape(1) < 2) {
              throw nb::value_error("out does not have one row of two or more ids per text");
            }
            const auto texts = as_texts(strings);
            std::vector<std::int64_t> unclean;
            {
              nb::gil_scoped_release release;
              unclean =
                  encode_padded(bpe, table, texts, form(words), out.shape(1), out.data(), threads);
            }
            return to_numpy(std::move(unclean));
          },
          "table"_a.none(), "texts"_a, "words"_a, "out"_a.noconvert(), "num_threads"_a,
          "Fills `out` and returns the numbers of the texts to clean first.")
      .def(
          "bytes_of",
          [](const Bpe& bpe, std::size_t token) {
            if (token >= Bpe::kVocabularySize) throw nb::index_error("no such token");
            const std::string_view bytes = bpe.bytes_of(static_cast<Bpe::Token>(token));
            return nb::bytes(bytes.data(), bytes.size());
          },
          "token"_a, "The bytes of a token; the last token of a word ends in </w>.");
}
