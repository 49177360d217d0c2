// What CLIP's tokenizer does to a text before byte-pair encoding: cleaning, lower case, words.
#pragma once

#include <cstdint>
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

// A text cleaned, in lower case and UTF-8, with the class of each byte. `bytes` and `classes` hold
// kWordPadding zeros past `size`.
struct CleanText {
  std::vector<char> bytes;
  std::vector<std::uint8_t> classes;
  std::size_t size = 0;
};

// Fills `clean` and returns true, or returns false where the text needs the library (ftfy) that
// the original cleans with: this function serves only texts that it provably treats the same.
bool clean_text(const Text& text, CleanText& clean);

// Fills `clean` from text that is clean already, its words separated by single spaces.
void copy_words(const Text& text, CleanText& clean);

// The bytes of the word that starts at `at`, by the regular expression of the original:
//   <\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+
// `at` is the first byte of a character that is not white space.
std::size_t word_length(const CleanText& clean, std::size_t at);

}  // namespace laclip
