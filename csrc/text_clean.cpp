#include "text_clean.hpp"

#include <array>
#include <cstring>
#include <string_view>

#include "bpe.hpp"

namespace laclip {
namespace {

struct Ascii {
  std::array<char, 128> lower{};
  std::array<std::uint8_t, 128> character_class{};
  std::array<bool, 128> inert{};  // cleaning keeps it, or changes one white space for another
};

constexpr Ascii kAscii = [] {
  Ascii ascii;
  for (unsigned c = 0; c < 128; ++c) {
    const bool upper = c >= 'A' && c <= 'Z';
    const bool letter = upper || (c >= 'a' && c <= 'z');
    const bool number = c >= '0' && c <= '9';
    const bool space = c == ' ' || (c >= '\t' && c <= '\r');
    ascii.lower[c] = static_cast<char>(upper ? c + 'a' - 'A' : c);
    ascii.character_class[c] = letter ? kLetter : number ? kNumber : space ? 0 : kOther;
    ascii.inert[c] = (c >= 0x20 && c < 0x7f && c != '&') || (space && c != '\v');
  }
  return ascii;
}();

bool starts_with(const char* text, std::string_view prefix) {  // `text` is padded
  return std::memcmp(text, prefix.data(), prefix.size()) == 0;
}

void resize(CleanText& clean, std::size_t capacity) {
  if (clean.bytes.size() < capacity + kWordPadding) {
    clean.bytes.resize(capacity + capacity / 2 + kWordPadding);
    clean.classes.resize(capacity + capacity / 2 + kWordPadding);
  }
}

void finish(CleanText& clean, std::size_t size) {
  clean.size = size;
  std::memset(clean.bytes.data() + size, 0, kWordPadding);
  std::memset(clean.classes.data() + size, 0, kWordPadding);
}

std::size_t append_utf8(std::uint32_t c, char* out) {
  const auto byte = [](std::uint32_t value) { return static_cast<char>(value); };
  if (c < 0x80) {
    out[0] = byte(c);
    return 1;
  }
  if (c < 0x800) {
    out[0] = byte(0xc0 | (c >> 6));
    out[1] = byte(0x80 | (c & 0x3f));
    return 2;
  }
  if (c < 0x10000) {
    out[0] = byte(0xe0 | (c >> 12));
    out[1] = byte(0x80 | ((c >> 6) & 0x3f));
    out[2] = byte(0x80 | (c & 0x3f));
    return 3;
  }
  out[0] = byte(0xf0 | (c >> 18));
  out[1] = byte(0x80 | ((c >> 12) & 0x3f));
  out[2] = byte(0x80 | ((c >> 6) & 0x3f));
  out[3] = byte(0x80 | (c & 0x3f));
  return 4;
}

template <typename CodePoint>
void copy_words_of(const CodePoint* text, std::size_t length, CleanText& clean) {
  std::size_t size = 0;
  for (std::size_t i = 0; i < length; ++i) {
    const std::size_t bytes = append_utf8(text[i], clean.bytes.data() + size);
    // One class for all: a word ends only at a space.
    std::memset(clean.classes.data() + size, text[i] == ' ' ? 0 : kLetter, bytes);
    size += bytes;
  }
  finish(clean, size);
}

}  // namespace

bool clean_text(const Text& text, CleanText& clean) {
  if (!text.ascii) return false;
  resize(clean, text.length);
  const auto* in = static_cast<const std::uint8_t*>(text.data);
  bool inert = true;
  for (std::size_t i = 0; i < text.length; ++i) {
    inert &= kAscii.inert[in[i]];
    clean.bytes[i] = kAscii.lower[in[i]];
    clean.classes[i] = kAscii.character_class[in[i]];
  }
  finish(clean, text.length);
  return inert;
}

void copy_words(const Text& text, CleanText& clean) {
  resize(clean, 4 * text.length);
  if (text.width == 1) {
    copy_words_of(static_cast<const std::uint8_t*>(text.data), text.length, clean);
  } else if (text.width == 2) {
    copy_words_of(static_cast<const std::uint16_t*>(text.data), text.length, clean);
  } else {
    copy_words_of(static_cast<const std::uint32_t*>(text.data), text.length, clean);
  }
}

std::size_t word_length(const CleanText& clean, std::size_t at) {
  const char* text = clean.bytes.data() + at;
  const std::uint8_t* classes = clean.classes.data() + at;
  if (*text == '\'') {
    const char first = text[1];
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if (starts_with(text, "'re") || starts_with(text, "'ve") || starts_with(text, "'ll")) return 3;
  } else if (*text == '<') {
    for (const std::string_view special : {"<|startoftext|>", "<|endoftext|>"}) {
      if (starts_with(text, special)) return special.size();
    }
  }
  std::size_t length = 1;
  if (classes[0] & kLetter) {
    while (classes[length] & kLetter) ++length;
  } else if (classes[0] & kNumber) {
    while (classes[length] & kContinuation) ++length;
  } else {
    while (classes[length] & kOther) ++length;
  }
  return length;
}

}  // namespace laclip
