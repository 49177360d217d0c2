// Byte-pair encoding with the vocabulary of OpenAI's CLIP: from the UTF-8 bytes of one word to ids.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace laclip {

// A word of up to 14 bytes, none of them NUL, as one comparable value. The word's buffer must be
// readable for kWordPadding bytes past its end.
struct WordKey {
  static constexpr std::size_t kMaxBytes = 14;
  std::uint64_t low = 0;
  std::uint64_t high = 0;  // 48 bits

  bool operator==(const WordKey&) const = default;
  bool empty() const { return low == 0; }
  std::uint64_t hash() const {
    const auto product =
        static_cast<unsigned __int128>(low ^ 0x9e3779b97f4a7c15u) * (high ^ 0xd6e8feb86659fd93u);
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
  }
};
inline constexpr std::size_t kWordPadding = 16;

static_assert(std::endian::native == std::endian::little);  // the masks below

inline WordKey make_key(const char* word, std::size_t bytes) {
  static constexpr auto kMasks = [] {
    std::array<std::array<std::uint64_t, 2>, WordKey::kMaxBytes + 1> masks{};
    for (std::size_t n = 0; n <= WordKey::kMaxBytes; ++n) {
      masks[n][0] = n >= 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * n)) - 1;
      masks[n][1] = n <= 8 ? 0 : (std::uint64_t{1} << (8 * (n - 8))) - 1;
    }
    return masks;
  }();
  WordKey key;
  std::memcpy(&key.low, word, 8);
  std::memcpy(&key.high, word + 8, 8);
  key.low &= kMasks[bytes][0];
  key.high &= kMasks[bytes][1];
  return key;
}

// Many strings in one piece of memory.
class Strings {
 public:
  // Appends a + b; both may be strings of this.
  void append(std::string_view a, std::string_view b) {
    const std::string end(b);
    text_.append(a).append(end);
    ends_.push_back(static_cast<std::uint32_t>(text_.size()));
  }
  std::string_view operator[](std::size_t i) const {
    const std::size_t begin = i == 0 ? 0 : ends_[i - 1];
    return {text_.data() + begin, ends_[i] - begin};
  }
  std::size_t size() const { return ends_.size(); }

 private:
  std::string text_;
  std::vector<std::uint32_t> ends_;
};

class Bpe {
 public:
  using Token = std::uint16_t;
  static constexpr std::size_t kBytes = 256;               // ids of bytes inside a word
  static constexpr std::size_t kMerges = 49152 - 256 - 2;  // used lines of the file
  static constexpr Token kStartOfText = 2 * kBytes + kMerges;
  static constexpr Token kEndOfText = kStartOfText + 1;
  static constexpr std::size_t kVocabularySize = kEndOfText + 1;

  // `merges` is the text of bpe_simple_vocab_16e6.txt. Throws std::invalid_argument where it is
  // cut or malformed.
  explicit Bpe(std::string_view merges);

  // Appends the ids of one word of any length. Linear in practice; n log n for long words.
  void encode_word(std::string_view word, std::vector<Token>& tokens) const;

  // The id of a word that is one token (special tokens included), or kNone.
  static constexpr Token kNone = 0xffff;
  Token whole_word(const WordKey& key) const {
    for (std::size_t slot = key.hash() & kWordMask;; slot = (slot + 1) & kWordMask) {
      const Word& word = words_[slot];
      if (word.low == key.low && (word.high_and_token & kHighMask) == key.high) {
        return static_cast<Token>(word.high_and_token >> 48);
      }
      if (word.low == 0) return kNone;
    }
  }

  void prefetch(const WordKey& key) const { __builtin_prefetch(&words_[key.hash() & kWordMask]); }

  // The bytes of a token; the last token of a word ends in "</w>".
  std::string_view bytes_of(Token token) const { return token_bytes_[token]; }

 private:
  static constexpr std::size_t kWordMask = (std::size_t{1} << 16) - 1;
  static constexpr std::size_t kPairMask = (std::size_t{1} << 17) - 1;
  static constexpr std::uint64_t kHighMask = (std::uint64_t{1} << 48) - 1;
  struct Word {
    std::uint64_t low = 0;
    std::uint64_t high_and_token = 0;
  };
  struct Pair {
    std::uint32_t symbols = 0xffffffffu;
    Token merged = kNone;
  };

  static std::size_t pair_slot(std::uint32_t symbols) {
    return (symbols * std::uint64_t{0x9e3779b97f4a7c15u} >> 40) & kPairMask;
  }
  // The id that two neighbours merge to, which is also the rank of the merge, or kNone.
  Token merge_of(Token left, Token right) const {
    const std::uint32_t symbols = (std::uint32_t{left} << 16) | right;
    for (std::size_t slot = pair_slot(symbols);; slot = (slot + 1) & kPairMask) {
      if (pairs_[slot].symbols == symbols) return pairs_[slot].merged;
      if (pairs_[slot].merged == kNone) return kNone;
    }
  }
  void add_pair(Token left, Token right, Token merged);
  void add_word(std::string_view word, Token token);
  void encode_short(std::string_view word, std::vector<Token>& tokens) const;
  void encode_long(std::string_view word, std::vector<Token>& tokens) const;

  std::array<Token, kBytes> byte_token_{};
  std::vector<Pair> pairs_;
  std::vector<Token> byte_pairs_;  // merge_of two bytes, the second perhaps a word's last
  std::vector<Word> words_;
  Strings token_bytes_;
};

}  // namespace laclip
