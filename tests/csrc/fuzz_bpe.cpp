// Any code points, in any layout, through cleaning, words and byte-pair encoding; words also
// against the plainest form of the algorithm. tests/csrc/CMakeLists.txt says how to build it.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bpe_batch.hpp"

namespace {

using laclip::Bpe;

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "fuzz_bpe: %s\n", what);
    std::abort();
  }
}

const std::string& vocabulary() {
  static const std::string text = [] {
    std::ifstream file(LACLIP_VOCABULARY);
    return std::string(std::istreambuf_iterator<char>(file), {});
  }();
  return text;
}

// Merges as the original does: all occurrences of the lowest pair, from the left, until none is
// left. Symbols are the bytes they stand for.
class Plain {
 public:
  explicit Plain(const Bpe& bpe) {
    std::map<std::string, std::string> bytes_of;  // by the name in the file
    for (Bpe::Token token = 0; token < 2 * Bpe::kBytes; ++token) {
      bytes_of[name(token, bpe)] = bpe.bytes_of(token);
    }
    std::istringstream lines(vocabulary());
    std::string left;
    std::string right;
    std::getline(lines, left);  // the file's version
    for (std::size_t rank = 0; rank < Bpe::kMerges; ++rank) {
      lines >> left >> right;
      ranks_[{bytes_of.at(left), bytes_of.at(right)}] = rank;
      bytes_of[left + right] = bytes_of.at(left) + bytes_of.at(right);
    }
  }

  std::vector<std::string> encode(const std::string& word) const {
    std::vector<std::string> parts;
    for (const char byte : word) parts.emplace_back(1, byte);
    parts.back() += "</w>";
    for (;;) {
      std::pair<std::string, std::string> best;
      std::size_t best_rank = Bpe::kMerges;
      for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
        const auto found = ranks_.find({parts[i], parts[i + 1]});
        if (found != ranks_.end() && found->second < best_rank) {
          best_rank = found->second;
          best = found->first;
        }
      }
      if (best_rank == Bpe::kMerges) return parts;
      std::vector<std::string> merged;
      for (std::size_t i = 0; i < parts.size(); ++i) {
        if (i + 1 < parts.size() && parts[i] == best.first && parts[i + 1] == best.second) {
          merged.push_back(parts[i] + parts[i + 1]);
          ++i;
        } else {
          merged.push_back(parts[i]);
        }
      }
      parts = std::move(merged);
    }
  }

 private:
  static std::string name(Bpe::Token token, const Bpe& bpe) {
    const bool last = token >= Bpe::kBytes;
    const auto byte = static_cast<unsigned char>(bpe.bytes_of(token)[0]);
    const bool itself = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
    unsigned code_point = byte;
    if (!itself) {
      code_point = 0x100;
      for (unsigned other = 0; other < byte; ++other) {
        code_point += !((other >= 0x21 && other <= 0x7e) || (other >= 0xa1 && other != 0xad));
      }
    }
    std::string text;
    if (code_point < 0x80) {
      text += static_cast<char>(code_point);
    } else {
      text += static_cast<char>(0xc0 | (code_point >> 6));
      text += static_cast<char>(0x80 | (code_point & 0x3f));
    }
    return last ? text + "</w>" : text;
  }

  std::map<std::pair<std::string, std::string>, std::size_t> ranks_;
};

// A table with something of everything: the code must be safe whatever a table holds.
laclip::CharacterTable make_table() {
  std::vector<std::uint32_t> entries(0x20000);
  std::vector<std::uint8_t> combining(entries.size());
  std::mt19937 generator(1);
  const auto random = [&] { return static_cast<std::uint32_t>(generator()); };
  for (std::uint32_t c = 0; c < entries.size(); ++c) {
    entries[c] = (c % 7 == 0 ? 1 + random() % 0x1ffff : c) | (random() % 8) << 21;
    if (random() % 8 == 0) entries[c] |= (random() % 16) << 24;
    if (random() % 16 == 0) entries[c] |= random() & (3u << 28);
    if (random() % 16 == 0) entries[c] |= laclip::CharacterTable::kRefused;
    combining[c] = random() % 8 == 0 ? static_cast<std::uint8_t>(random()) : std::uint8_t{0};
  }
  const std::vector<std::uint16_t> suspicious(16, 0x8421);
  const std::vector<std::uint64_t> compositions{std::uint64_t{0x300} << 32 | 0x301};
  return {entries, combining, suspicious, compositions};
}

template <typename CodePoint>
std::vector<CodePoint> code_points(const std::uint8_t* data, std::size_t size,
                                   std::uint32_t limit) {
  std::vector<CodePoint> points(size / sizeof(CodePoint));
  for (std::size_t i = 0; i < points.size(); ++i) {
    CodePoint point;
    std::memcpy(&point, data + i * sizeof(CodePoint), sizeof(CodePoint));
    points[i] = static_cast<CodePoint>(point % limit);
  }
  return points;
}

void check_texts(const Bpe& bpe, const laclip::CharacterTable* table, const laclip::Text& text,
                 laclip::TextForm form, std::size_t limit) {
  const std::vector<laclip::Text> texts(3, text);
  const auto all = encode_ragged(bpe, table, texts, form, SIZE_MAX, 1);
  const auto some = encode_ragged(bpe, table, texts, form, limit, 2);
  require(all.unclean == some.unclean, "a limit changes what is refused");
  require(all.unclean.empty() || all.unclean.size() == 3, "the same text refused and not");
  require(all.tokens.size() == 3 * static_cast<std::size_t>(all.lengths[0]), "lengths differ");
  const auto count = std::min(static_cast<std::size_t>(all.lengths[0]), limit);
  require(static_cast<std::size_t>(some.lengths[2]) == count, "limit not kept");
  std::vector<std::int32_t> rows(3 * (limit + 2), -1);
  encode_padded(bpe, table, texts, form, limit + 2, rows.data(), 1);
  const std::int32_t* row = rows.data() + 2 * (limit + 2);
  require(row[0] == Bpe::kStartOfText && row[count + 1] == Bpe::kEndOfText, "special tokens");
  for (std::size_t i = 0; i < count; ++i) {
    require(row[i + 1] == some.tokens[2 * count + i] && row[i + 1] == all.tokens[i], "ids differ");
  }
  for (std::size_t i = count + 2; i < limit + 2; ++i) require(row[i] == 0, "padding");
}

void check_word(const Bpe& bpe, const Plain& plain, const std::string& word) {
  if (word.empty() || word == "<|startoftext|>" || word == "<|endoftext|>") return;
  std::vector<Bpe::Token> tokens;
  bpe.encode_word(word, tokens);
  const std::vector<std::string> parts = plain.encode(word);
  require(parts.size() == tokens.size(), "another number of tokens than the plain algorithm");
  for (std::size_t i = 0; i < parts.size(); ++i) {
    require(bpe.bytes_of(tokens[i]) == parts[i], "another token than the plain algorithm");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Bpe bpe(vocabulary());
  static const Plain plain(bpe);
  static const laclip::CharacterTable table = make_table();
  if (size < 2) return 0;
  const unsigned layout = data[0];
  const std::size_t limit = data[1];
  data += 2;
  size -= 2;
  const auto form = layout & 4 ? laclip::TextForm::kWords : laclip::TextForm::kRaw;
  const auto* maybe_table = layout & 8 ? &table : nullptr;
  const auto check = [&](const auto& points, std::uint8_t width, bool ascii) {
    check_texts(bpe, maybe_table, {points.data(), points.size(), width, ascii}, form, limit);
  };
  switch (layout & 3) {
    case 0: {
      const auto points = code_points<std::uint8_t>(data, size, 0x80);
      check(points, 1, true);
      check_word(bpe, plain, std::string(points.begin(), points.end()).substr(0, 300));
      break;
    }
    case 1:
      check(code_points<std::uint8_t>(data, size, 0x100), 1, false);
      check_word(bpe, plain, std::string(data, data + std::min<std::size_t>(size, 150)));
      break;
    case 2:
      check(code_points<std::uint16_t>(data, size, 0x10000), 2, false);
      break;
    default:
      check(code_points<std::uint32_t>(data, size, 0x110000), 4, false);
  }
  return 0;
}

#ifndef LACLIP_LIBFUZZER
int main(int argc, char** argv) {
  const long inputs = argc > 1 ? std::atol(argv[1]) : 1000;
  std::mt19937 random(7);
  const std::string pieces[] = {"the ",        "ing",   "'s", "<|startoftext|>",
                                "&lt",         "&amp;", "th", "\xc3\xa9",
                                "photo of a ", "123",   "!!", "\t",
                                "aaaa",        "z"};
  for (long input = 0; input < inputs; ++input) {
    std::string bytes;
    bytes += static_cast<char>(random());
    bytes += static_cast<char>(random());
    for (auto parts = random() % 40; parts > 0; --parts) {
      if (random() % 3 == 0) {
        bytes += static_cast<char>(random());
      } else {
        bytes += pieces[random() % std::size(pieces)];
      }
    }
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  }
  std::printf("fuzz_bpe: %ld inputs\n", inputs);
}
#endif
