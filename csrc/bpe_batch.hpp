// Batches of texts to token ids, with a cache of words, on the threads that the caller asks for.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "bpe.hpp"
#include "text_clean.hpp"

namespace laclip {

enum class TextForm { kRaw, kWords };  // kWords: cleaned, one space between words (copy_words)

struct RaggedTokens {
  std::vector<Bpe::Token> tokens;
  std::vector<std::int64_t> lengths;  // per text
  std::vector<std::int64_t> unclean;  // numbers of the texts that clean_text refused; length 0
};

// Ids without special tokens, at most `max_tokens` per text.
RaggedTokens encode_ragged(const Bpe& bpe, const CharacterTable* table, std::span<const Text> texts,
                           TextForm form, std::size_t max_tokens, unsigned threads);

// Row i of `rows` [texts, context_length] becomes start of text, ids, end of text, zeros; ids that
// do not fit are cut. Returns the numbers of the texts that clean_text refused, whose rows hold no
// ids. `context_length` is at least 2.
std::vector<std::int64_t> encode_padded(const Bpe& bpe, const CharacterTable* table,
                                        std::span<const Text> texts, TextForm form,
                                        std::size_t context_length, std::int32_t* rows,
                                        unsigned threads);

}  // namespace laclip
