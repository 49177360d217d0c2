// What CLIP's tokenizer does to a text before byte-pair encoding: cleaning, lower case, words.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace laclip {

// A text in the layout of a Python string: `length` code points of `width` (1, 2 or 4) bytes.
struct Text {
  const void* data = nullptr;
  std::size_t length = 0;
  std::uint8_t width = 1;
  bool ascii = true;
};

// What the words' regular expression sees in a character; 0 is white space.
enum CharacterClass : std::uint8_t {
  kLetter = 1,        // [\p{L}]
  kNumber = 2,        // [\p{N}]
  kOther = 4,         // [^\s\p{L}\p{N}]
  kContinuation = 8,  // a byte of UTF-8 that is not the first of its character
};

// What cleaning makes of each character beyond ASCII, as laclip/text_clean.py asks the libraries.
class CharacterTable {
 public:
  static constexpr std::uint32_t kCodePoint = (1u << 21) - 1;  // its lower case, cleaned
  static constexpr unsigned kClassShift = 21;                  // CharacterClass, 3 bits
  static constexpr unsigned kGroupShift = 24;                  // for pairs of mojibake, 4 bits
  static constexpr std::uint32_t kDecomposes = 1u << 28;       // one that follows may change it
  static constexpr std::uint32_t kComposes = 1u << 29;         // with a starter before it
  static constexpr std::uint32_t kRefused = 1u << 31;
  static constexpr std::size_t kGroups = 16;

  // `entries` and `combining` (the canonical combining class) by code point, of one size, at least
  // 128; bit j of suspicious[i]: neighbours of groups i and j may be mojibake; `compositions`:
  // starter << 32 | follower, ascending. Throws std::invalid_argument.
  CharacterTable(std::span<const std::uint32_t> entries, std::span<const std::uint8_t> combining,
                 std::span<const std::uint16_t> suspicious,
                 std::span<const std::uint64_t> compositions);

  std::uint32_t entry(std::uint32_t code_point) const {
    return code_point < entries_.size() ? entries_[code_point] : kRefused;
  }
  std::uint8_t combining(std::uint32_t code_point) const { return combining_[code_point]; }
  bool suspicious(std::uint32_t left_entry, std::uint32_t right_entry) const {
    return suspicious_[group(left_entry)] >> group(right_entry) & 1;
  }
  bool compose(std::uint32_t starter, std::uint32_t follower) const {
    return std::binary_search(compositions_.begin(), compositions_.end(),
                              std::uint64_t{starter} << 32 | follower);
  }

 private:
  static std::size_t group(std::uint32_t entry) { return entry >> kGroupShift & (kGroups - 1); }

  std::vector<std::uint32_t> entries_;
  std::vector<std::uint8_t> combining_;
  std::array<std::uint16_t, kGroups> suspicious_{};
  std::vector<std::uint64_t> compositions_;
};

// A text cleaned, in lower case and UTF-8, with the class of each byte. Both hold kBlock zeros past
// `size`.
struct CleanText {
  static constexpr std::size_t kBlock = 64;
  std::vector<char> bytes;
  std::vector<std::uint8_t> classes;
  std::size_t size = 0;
  bool plain = true;  // no apostrophe and no '<', so that words end where the class changes
};

// Fills `clean` and returns true, or returns false where the text needs the library (ftfy) that
// the original cleans with: this function serves only texts that it provably treats the same.
// Without a table it serves ASCII only.
bool clean_text(const Text& text, const CharacterTable* table, CleanText& clean);

// Fills `clean` from text that is clean already, its words separated by single spaces.
void copy_words(const Text& text, CleanText& clean);

// Finds the words of a text, by the regular expression of the original:
//   <\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+
// A class per character is enough, as the characters that the table holds have one each.
class WordFinder {
 public:
  explicit WordFinder(const CleanText& clean) : clean_(clean) {}

  // Fills `words` and returns how many there are, or 0 at the end of the text.
  std::size_t next(std::array<std::string_view, CleanText::kBlock + 1>& words);

 private:
  std::size_t next_block(std::array<std::string_view, CleanText::kBlock + 1>& words);
  std::size_t length_at(std::size_t at) const;

  const CleanText& clean_;
  std::size_t at_ = 0;
  std::size_t open_ = 0;  // where the word began that goes on in this block
  bool is_open_ = false;
  std::uint64_t letter_ = 0;  // 1 where the last byte of the block before was one
  std::uint64_t number_ = 0;
  std::uint64_t other_ = 0;
};

}  // namespace laclip
