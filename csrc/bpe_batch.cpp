#include "bpe_batch.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <exception>
#include <thread>

namespace laclip {
namespace {

// Words of several tokens met before in this call. A fixed number of slots: a full
// neighbourhood forgets its first word, so that memory stays bounded.
class WordCache {
 public:
  static constexpr std::size_t kMaxTokens = 7;
  struct Slot {
    WordKey key;
    std::array<Bpe::Token, kMaxTokens> tokens;
    std::uint16_t count;
  };
  static_assert(sizeof(Slot) == 32);

  explicit WordCache(std::size_t texts)
      : slots_(std::clamp<std::size_t>(std::bit_ceil(texts), 64, 1 << 15)) {}

  // The slot that holds `key`, or the one to overwrite with it.
  Slot& find(const WordKey& key) {
    const std::size_t home = key.hash() >> 20;
    for (std::size_t step = 0; step < 4; ++step) {
      Slot& slot = slots_[(home + step) & (slots_.size() - 1)];
      if (slot.key == key || slot.key.empty()) return slot;
    }
    return slots_[home & (slots_.size() - 1)];
  }

 private:
  std::vector<Slot> slots_;
};

class Encoder {
 public:
  Encoder(const Bpe& bpe, const CharacterTable* table, TextForm form, std::size_t texts)
      : bpe_(bpe), table_(table), form_(form), cache_(texts) {}

  // Appends at most `max_tokens` ids of the text; false where it needs cleaning.
  bool encode(const Text& text, std::size_t max_tokens, std::vector<Bpe::Token>& tokens) {
    if (form_ == TextForm::kWords) {
      copy_words(text, clean_);
    } else if (!clean_text(text, table_, clean_)) {
      return false;
    }
    // Many words are found before any is looked up, so that the misses of their look-ups in the
    // memory's caches overlap.
    const std::size_t begin = tokens.size();
    WordFinder finder(clean_);
    while (tokens.size() - begin < max_tokens) {
      const std::size_t count = finder.next(words_);
      if (count == 0) break;
      for (std::size_t i = 0; i < count; ++i) {
        keys_[i] = make_key(words_[i].data(), std::min(words_[i].size(), WordKey::kMaxBytes));
        bpe_.prefetch(keys_[i]);
      }
      for (std::size_t i = 0; i < count; ++i) encode_word(words_[i], keys_[i], tokens);
    }
    if (tokens.size() - begin > max_tokens) tokens.resize(begin + max_tokens);
    return true;
  }

 private:
  void encode_word(std::string_view word, const WordKey& key, std::vector<Bpe::Token>& tokens) {
    const bool has_nul = form_ == TextForm::kWords && word.find('\0') != std::string_view::npos;
    if (word.size() > WordKey::kMaxBytes || has_nul) return bpe_.encode_word(word, tokens);
    if (const Bpe::Token token = bpe_.whole_word(key); token != Bpe::kNone) {
      tokens.push_back(token);
      return;
    }
    WordCache::Slot& slot = cache_.find(key);
    if (slot.key == key) {
      tokens.insert(tokens.end(), slot.tokens.begin(), slot.tokens.begin() + slot.count);
      return;
    }
    const std::size_t begin = tokens.size();
    bpe_.encode_word(word, tokens);
    const std::size_t count = tokens.size() - begin;
    if (count <= WordCache::kMaxTokens) {
      slot.key = key;
      slot.count = static_cast<std::uint16_t>(count);
      std::copy_n(tokens.end() - static_cast<std::ptrdiff_t>(count), count, slot.tokens.begin());
    }
  }

  const Bpe& bpe_;
  const CharacterTable* table_;
  TextForm form_;
  WordCache cache_;
  CleanText clean_;
  std::array<std::string_view, CleanText::kBlock + 1> words_;
  std::array<WordKey, CleanText::kBlock + 1> keys_;
};

// Calls work(part, begin, end) for contiguous parts of `count` items, each on its own thread.
template <typename Work>
void run_parts(std::size_t count, std::size_t parts, const Work& work) {
  std::vector<std::exception_ptr> errors(parts);
  const auto run = [&](std::size_t part) {
    try {
      work(part, count * part / parts, count * (part + 1) / parts);
    } catch (...) {
      errors[part] = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    for (std::size_t part = 1; part < parts; ++part) others.emplace_back(run, part);
    run(0);
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// A thread for fewer texts costs more than it saves.
std::size_t parts_of(std::size_t texts, unsigned threads) {
  return std::clamp<std::size_t>(texts / 64, 1, std::max(threads, 1u));
}

std::vector<std::int64_t> join(const std::vector<std::vector<std::int64_t>>& parts) {
  std::vector<std::int64_t> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

}  // namespace

RaggedTokens encode_ragged(const Bpe& bpe, const CharacterTable* table, std::span<const Text> texts,
                           TextForm form, std::size_t max_tokens, unsigned threads) {
  const std::size_t parts = parts_of(texts.size(), threads);
  std::vector<std::vector<Bpe::Token>> tokens(parts);
  std::vector<std::vector<std::int64_t>> unclean(parts);
  RaggedTokens result;
  result.lengths.resize(texts.size());
  run_parts(texts.size(), parts, [&](std::size_t part, std::size_t begin, std::size_t end) {
    Encoder encoder(bpe, table, form, end - begin);
    std::vector<Bpe::Token>& out = tokens[part];
    out.reserve(16 * (end - begin));
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t before = out.size();
      if (!encoder.encode(texts[i], max_tokens, out)) {
        unclean[part].push_back(static_cast<std::int64_t>(i));
      }
      result.lengths[i] = static_cast<std::int64_t>(out.size() - before);
    }
  });
  result.tokens = std::move(tokens[0]);
  for (std::size_t part = 1; part < parts; ++part) {
    result.tokens.insert(result.tokens.end(), tokens[part].begin(), tokens[part].end());
  }
  result.unclean = join(unclean);
  return result;
}

std::vector<std::int64_t> encode_padded(const Bpe& bpe, const CharacterTable* table,
                                        std::span<const Text> texts, TextForm form,
                                        std::size_t context_length, std::int32_t* rows,
                                        unsigned threads) {
  const std::size_t parts = parts_of(texts.size(), threads);
  std::vector<std::vector<std::int64_t>> unclean(parts);
  run_parts(texts.size(), parts, [&](std::size_t part, std::size_t begin, std::size_t end) {
    Encoder encoder(bpe, table, form, end - begin);
    std::vector<Bpe::Token> tokens;
    for (std::size_t i = begin; i < end; ++i) {
      tokens.clear();
      if (!encoder.encode(texts[i], context_length - 2, tokens)) {
        unclean[part].push_back(static_cast<std::int64_t>(i));
      }
      std::int32_t* row = rows + i * context_length;
      std::int32_t* out = row;
      *out++ = Bpe::kStartOfText;
      out = std::copy(tokens.begin(), tokens.end(), out);
      *out++ = Bpe::kEndOfText;
      std::fill(out, row + context_length, 0);
    }
  });
  return join(unclean);
}

}  // namespace laclip
