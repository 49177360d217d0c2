#include "text_clean.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>
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
    ascii.inert[c] = (c >= 0x20 && c < 0x7f) || (space && c != '\v');
  }
  return ascii;
}();

// First two letters of the entities that need no semicolon (html.entities.html5), such as &lt.
constexpr std::string_view kBareEntities =
    "AE AM Aa Ac Ag Ar At Au CO Cc ET Ea Ec Eg Eu GT Ia Ic Ig Iu LT Nt Oa Oc Og Os Ot Ou "
    "QU RE TH Ua Uc Ug Uu Ya aa ac ae ag am ar at au br cc ce co cu de di ea ec eg et eu "
    "fr gt ia ic ie ig iq iu la lt ma mi nb no nt oa oc og or os ot ou pa pl po qu ra re "
    "se sh su sz th ti ua uc ug um uu ya ye yu ";

bool starts_with(const char* text, std::string_view prefix) {  // `text` is padded
  return std::memcmp(text, prefix.data(), prefix.size()) == 0;
}

void resize(CleanText& clean, std::size_t capacity) {
  if (clean.bytes.size() < capacity + CleanText::kBlock) {
    clean.bytes.resize(capacity + capacity / 2 + CleanText::kBlock);
    clean.classes.resize(capacity + capacity / 2 + CleanText::kBlock);
  }
}

void finish(CleanText& clean, std::size_t size, bool plain) {
  clean.size = size;
  clean.plain = plain;
  std::memset(clean.bytes.data() + size, 0, CleanText::kBlock);
  std::memset(clean.classes.data() + size, 0, CleanText::kBlock);
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

// Whether the '&' at `at` may begin an entity, for ftfy or html.unescape. They take at most 32
// characters for its name; this function looks at all there are, and refuses where in doubt.
template <typename CodePoint>
bool may_be_entity(const CodePoint* text, std::size_t length, std::size_t at) {
  const std::size_t begin = at + 1;
  std::size_t end = begin;
  for (; end < length && end < begin + 33; ++end) {
    const std::uint32_t c = text[end];
    if (c == ';') return end > begin;
    if (c >= 0x80 || c == '#') return true;
    if (c <= ' ' || c == '<' || c == '&') break;
  }
  if (end - begin < 2) return false;
  const std::array<char, 3> name{static_cast<char>(text[begin]), static_cast<char>(text[begin + 1]),
                                 ' '};
  for (std::size_t i = 0; i < kBareEntities.size(); i += 3) {
    if (std::memcmp(&kBareEntities[i], name.data(), 3) == 0) return true;
  }
  return false;
}

// Sixteen bytes at a time: a batch of captions of 47 bytes is viewed and cleaned in 30 ns each, and
// in 51 with a loop over kAscii.
using Block = std::uint8_t __attribute__((vector_size(16)));

Block in_range(Block c, std::uint8_t first, std::uint8_t count) {
  return reinterpret_cast<Block>(c - first < count);
}

bool any(Block block) {
  std::array<std::uint64_t, 2> halves;
  std::memcpy(halves.data(), &block, sizeof(block));
  return (halves[0] | halves[1]) != 0;
}

bool clean_ascii(const std::uint8_t* text, std::size_t length, CleanText& clean) {
  static_assert(sizeof(Block) <= CleanText::kBlock && kWordPadding <= CleanText::kBlock);
  Block refused{};
  Block ampersand{};
  Block special{};
  for (std::size_t i = 0; i < length; i += sizeof(Block)) {
    Block c = Block{} + ' ';
    if (length - i >= sizeof(Block)) {
      std::memcpy(&c, text + i, sizeof(Block));
    } else {
      std::memcpy(&c, text + i, length - i);
    }
    const Block lower = c | (in_range(c, 'A', 26) & 0x20);
    const Block space = reinterpret_cast<Block>(c == ' ') | in_range(c, '\t', 5);
    const Block letter = in_range(lower, 'a', 26);
    const Block number = in_range(c, '0', 10);
    const Block classes = (letter & std::uint8_t{kLetter}) | (number & std::uint8_t{kNumber}) |
                          (~(letter | number | space) & std::uint8_t{kOther});
    std::memcpy(clean.bytes.data() + i, &lower, sizeof(Block));
    std::memcpy(clean.classes.data() + i, &classes, sizeof(Block));
    refused |= (reinterpret_cast<Block>(c < ' ') & ~space) | reinterpret_cast<Block>(c == '\v') |
               reinterpret_cast<Block>(c == 0x7f);
    ampersand |= reinterpret_cast<Block>(c == '&');
    special |= reinterpret_cast<Block>(c == '\'') | reinterpret_cast<Block>(c == '<');
  }
  finish(clean, length, !any(special));
  if (any(refused)) return false;
  for (std::size_t i = 0; any(ampersand) && i < length; ++i) {
    if (text[i] == '&' && may_be_entity(text, length, i)) return false;
  }
  return true;
}

template <typename CodePoint>
bool clean_wide(const CodePoint* text, std::size_t length, const CharacterTable& table,
                CleanText& clean) {
  std::size_t size = 0;
  std::uint32_t previous = 0;
  std::uint32_t starter = 0;
  std::uint8_t previous_combining = 0;
  bool plain = true;
  for (std::size_t i = 0; i < length; ++i) {
    const std::uint32_t c = text[i];
    const std::uint32_t entry = table.entry(c);
    if (entry & CharacterTable::kRefused || table.suspicious(previous, entry)) return false;
    if (c == '&' && may_be_entity(text, length, i)) return false;
    const std::uint8_t combining = table.combining(c);
    if (combining != 0 && combining < previous_combining) return false;  // not in canonical order
    if (entry & CharacterTable::kComposes &&
        (table.entry(starter) & CharacterTable::kDecomposes || table.compose(starter, c))) {
      return false;
    }
    previous = entry;
    previous_combining = combining;
    if (combining == 0) starter = c;
    const auto character_class =
        static_cast<std::uint8_t>(entry >> CharacterTable::kClassShift & (kContinuation - 1));
    const std::uint32_t cleaned = entry & CharacterTable::kCodePoint;
    plain = plain && cleaned != '\'' && cleaned != '<';
    const std::size_t bytes = append_utf8(cleaned, clean.bytes.data() + size);
    clean.classes[size] = character_class;
    std::memset(clean.classes.data() + size + 1,
                character_class == 0 ? 0 : character_class | kContinuation, bytes - 1);
    size += bytes;
  }
  finish(clean, size, plain);
  return true;
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
  finish(clean, size, true);
}

// Bit i: whether byte i of 64 has `bit` set.
std::uint64_t mask_of(const std::uint8_t* bytes, unsigned bit) {
  std::uint64_t mask = 0;
  for (unsigned i = 0; i < 8; ++i) {
    std::uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    // The product gathers the lowest bits of eight bytes in its highest byte.
    const std::uint64_t bits = (eight >> bit & 0x0101010101010101u) * 0x0102040810204080u >> 56;
    mask |= bits << (8 * i);
  }
  return mask;
}

}  // namespace

CharacterTable::CharacterTable(std::span<const std::uint32_t> entries,
                               std::span<const std::uint8_t> combining,
                               std::span<const std::uint16_t> suspicious,
                               std::span<const std::uint64_t> compositions)
    : entries_(entries.begin(), entries.end()),
      combining_(combining.begin(), combining.end()),
      compositions_(compositions.begin(), compositions.end()) {
  if (entries.size() < 128 || combining.size() != entries.size() || suspicious.size() > kGroups) {
    throw std::invalid_argument("character table: sizes do not fit");
  }
  std::copy(suspicious.begin(), suspicious.end(), suspicious_.begin());
  for (std::size_t c = 0; c < 128; ++c) {
    entries_[c] = static_cast<unsigned char>(kAscii.lower[c]) |
                  (std::uint32_t{kAscii.character_class[c]} << kClassShift) |
                  (kAscii.inert[c] ? 0 : kRefused);
    combining_[c] = 0;
  }
}

bool clean_text(const Text& text, const CharacterTable* table, CleanText& clean) {
  if (text.ascii) {
    resize(clean, text.length);
    return clean_ascii(static_cast<const std::uint8_t*>(text.data), text.length, clean);
  }
  if (table == nullptr) return false;
  resize(clean, 4 * text.length);
  if (text.width == 1) {
    return clean_wide(static_cast<const std::uint8_t*>(text.data), text.length, *table, clean);
  }
  if (text.width == 2) {
    return clean_wide(static_cast<const std::uint16_t*>(text.data), text.length, *table, clean);
  }
  return clean_wide(static_cast<const std::uint32_t*>(text.data), text.length, *table, clean);
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

std::size_t WordFinder::next(std::array<std::string_view, CleanText::kBlock + 1>& words) {
  std::size_t count = 0;
  if (clean_.plain) {
    while (count == 0 && at_ <= clean_.size) count = next_block(words);
    return count;
  }
  while (at_ < clean_.size && count < words.size()) {
    if (clean_.classes[at_] == 0) {
      ++at_;
      continue;
    }
    const std::size_t length = length_at(at_);
    words[count++] = {clean_.bytes.data() + at_, length};
    at_ += length;
  }
  return count;
}

std::size_t WordFinder::next_block(std::array<std::string_view, CleanText::kBlock + 1>& words) {
  const std::uint8_t* classes = clean_.classes.data() + at_;
  const std::uint64_t letter = mask_of(classes, 0);
  const std::uint64_t number = mask_of(classes, 1);
  const std::uint64_t other = mask_of(classes, 2);
  const std::uint64_t continuation = mask_of(classes, 3);
  const std::uint64_t inside = letter | number | other;
  const std::uint64_t inside_before = inside << 1 | letter_ | number_ | other_;
  const std::uint64_t goes_on = (letter & (letter << 1 | letter_)) |
                                (other & (other << 1 | other_)) |
                                (number & continuation & (number << 1 | number_));
  std::uint64_t starts = inside & ~goes_on;
  std::uint64_t ends = inside_before & ~goes_on;
  letter_ = letter >> 63;
  number_ = number >> 63;
  other_ = other >> 63;

  std::size_t count = 0;
  const auto add = [&](std::size_t begin, std::size_t end) {
    words[count++] = {clean_.bytes.data() + begin, end - begin};
  };
  const auto pop = [&](std::uint64_t& bits) {
    const auto at = at_ + static_cast<unsigned>(std::countr_zero(bits));
    bits &= bits - 1;
    return at;
  };
  if (is_open_ && ends != 0) {
    add(open_, pop(ends));
    is_open_ = false;
  }
  while (ends != 0) {
    const std::size_t begin = pop(starts);
    add(begin, pop(ends));
  }
  if (starts != 0) {
    open_ = pop(starts);
    is_open_ = true;
  }
  at_ += CleanText::kBlock;
  return count;
}

std::size_t WordFinder::length_at(std::size_t at) const {
  const char* text = clean_.bytes.data() + at;
  const std::uint8_t* classes = clean_.classes.data() + at;
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
