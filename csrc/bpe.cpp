#include "bpe.hpp"

#include <algorithm>
#include <queue>
#include <stdexcept>

namespace laclip {
namespace {

// The vocabulary file writes each byte as one printable character: itself where Latin-1 prints
// it, else U+0100 and up in the order of the bytes. The ids of the bytes follow the same order:
// first those that stand for themselves.
bool stands_for_itself(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
}

std::string utf8(unsigned code_point) {  // below U+0800
  if (code_point < 0x80) return std::string(1, static_cast<char>(code_point));
  return {static_cast<char>(0xc0 | (code_point >> 6)),
          static_cast<char>(0x80 | (code_point & 0x3f))};
}

[[noreturn]] void refuse(std::size_t line, const std::string& what) {
  throw std::invalid_argument("merges, line " + std::to_string(line) + ": " + what);
}

constexpr std::size_t kShortWord = 64;  // above, the heap of encode_long pays

// The symbols as the file writes them, found by their text.
class Names {
 public:
  Names() : slots_(kMask + 1, Bpe::kNone) {}

  // The id of the name a + b, or kNone.
  Bpe::Token find(std::string_view a, std::string_view b) const { return slots_[slot_of(a, b)]; }

  // The next id, for the name a + b; kNone where it stands already.
  Bpe::Token add(std::string_view a, std::string_view b) {
    Bpe::Token& slot = slots_[slot_of(a, b)];
    if (slot != Bpe::kNone) return Bpe::kNone;
    slot = static_cast<Bpe::Token>(texts_.size());
    texts_.append(a, b);
    return slot;
  }

 private:
  static constexpr std::size_t kMask = (std::size_t{1} << 17) - 1;

  std::size_t slot_of(std::string_view a, std::string_view b) const {
    std::uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
    for (const std::string_view part : {a, b}) {
      for (const char c : part) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    }
    for (std::size_t slot = (hash ^ hash >> 32) & kMask;; slot = (slot + 1) & kMask) {
      if (slots_[slot] == Bpe::kNone) return slot;
      const std::string_view text = texts_[slots_[slot]];
      if (text.size() == a.size() + b.size() && text.starts_with(a) && text.ends_with(b)) {
        return slot;
      }
    }
  }

  Strings texts_;
  std::vector<Bpe::Token> slots_;
};

}  // namespace

Bpe::Bpe(std::string_view merges)
    : pairs_(kPairMask + 1), byte_pairs_(kBytes * 2 * kBytes, kNone), words_(kWordMask + 1) {
  std::array<std::string, kBytes> printed;
  Token token = 0;
  unsigned replacement = 0x100;
  for (const bool itself : {true, false}) {
    for (unsigned byte = 0; byte < kBytes; ++byte) {
      if (stands_for_itself(byte) != itself) continue;
      byte_token_[byte] = token;
      printed[token] = utf8(itself ? byte : replacement++);
      const char character = static_cast<char>(byte);
      token_bytes_.append({&character, 1}, {});
      ++token;
    }
  }
  Names names;
  for (Token id = 0; id < kBytes; ++id) names.add(printed[id], {});
  for (Token id = 0; id < kBytes; ++id) {
    names.add(printed[id], "</w>");
    token_bytes_.append(token_bytes_[id], "</w>");
  }

  std::size_t begin = merges.find('\n');
  for (std::size_t line = 2; line < kMerges + 2; ++line) {
    if (begin == std::string_view::npos) refuse(line, "missing, the file is cut");
    const std::size_t end = merges.find('\n', ++begin);
    const std::string_view text = merges.substr(begin, end - begin);
    const std::size_t space = text.find(' ');
    if (space == std::string_view::npos) refuse(line, "not two symbols");
    const Token left = names.find(text.substr(0, space), {});
    const Token right = names.find(text.substr(space + 1), {});
    // Merging in order of rank, leftmost first, relies on this: see encode_short.
    if (left == kNone || right == kNone) refuse(line, "symbol not made by a line above");
    const Token merged = names.add(text.substr(0, space), text.substr(space + 1));
    if (merged == kNone) refuse(line, "symbol made twice");
    token_bytes_.append(token_bytes_[left], token_bytes_[right]);
    add_pair(left, right, merged);
    begin = end;
  }
  token_bytes_.append("<|startoftext|>", {});
  token_bytes_.append("<|endoftext|>", {});

  std::vector<Token> tokens;
  for (Token id = kBytes; id < kStartOfText; ++id) {
    const std::string_view bytes = token_bytes_[id];
    if (!bytes.ends_with("</w>") || bytes.size() - 4 > WordKey::kMaxBytes) continue;
    if (bytes.find('\0') != std::string_view::npos) continue;
    tokens.clear();
    encode_word(bytes.substr(0, bytes.size() - 4), tokens);
    if (tokens.size() == 1) add_word(bytes.substr(0, bytes.size() - 4), tokens[0]);
  }
}

void Bpe::add_pair(Token left, Token right, Token merged) {
  const std::uint32_t symbols = (std::uint32_t{left} << 16) | right;
  std::size_t slot = pair_slot(symbols);
  while (pairs_[slot].merged != kNone) slot = (slot + 1) & kPairMask;
  pairs_[slot] = {symbols, merged};
  if (left < kBytes && right < 2 * kBytes) byte_pairs_[left * 2 * kBytes + right] = merged;
}

void Bpe::add_word(std::string_view word, Token token) {
  std::string padded(word);
  padded.resize(word.size() + kWordPadding);
  const WordKey key = make_key(padded.data(), word.size());
  std::size_t slot = key.hash() & kWordMask;
  while (words_[slot].low != 0) slot = (slot + 1) & kWordMask;
  words_[slot] = {key.low, key.high | std::uint64_t{token} << 48};
}

void Bpe::encode_word(std::string_view word, std::vector<Token>& tokens) const {
  if (word.empty()) return;
  if (word == token_bytes_[kEndOfText] || word == token_bytes_[kStartOfText]) {
    tokens.push_back(word == token_bytes_[kEndOfText] ? kEndOfText : kStartOfText);
  } else if (word.size() <= kShortWord) {
    encode_short(word, tokens);
  } else {
    encode_long(word, tokens);
  }
}

// The original merges, again and again, every occurrence of the neighbours with the lowest rank,
// from the left. As a symbol is made by one line only, and by symbols of lines above, a merge
// never makes a pair of lower or equal rank: taking the leftmost lowest pair one at a time is the
// same.
void Bpe::encode_short(std::string_view word, std::vector<Token>& tokens) const {
  std::array<Token, kShortWord> symbols;
  std::array<Token, kShortWord> merged;  // of symbols i and i + 1
  std::size_t count = word.size();
  for (std::size_t i = 0; i < count; ++i) {
    symbols[i] = byte_token_[static_cast<unsigned char>(word[i])];
  }
  symbols[count - 1] = static_cast<Token>(symbols[count - 1] + kBytes);
  for (std::size_t i = 0; i + 1 < count; ++i) {
    merged[i] = byte_pairs_[symbols[i] * 2 * kBytes + symbols[i + 1]];
  }
  while (count > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < count; ++i) best = merged[i] < merged[best] ? i : best;
    if (merged[best] == kNone) break;
    symbols[best] = merged[best];
    for (std::size_t i = best + 1; i + 1 < count; ++i) {
      symbols[i] = symbols[i + 1];
      merged[i - 1] = merged[i];
    }
    --count;
    if (best > 0) merged[best - 1] = merge_of(symbols[best - 1], symbols[best]);
    if (best + 1 < count) merged[best] = merge_of(symbols[best], symbols[best + 1]);
  }
  tokens.insert(tokens.end(), symbols.begin(),
                symbols.begin() + static_cast<std::ptrdiff_t>(count));
}

void Bpe::encode_long(std::string_view word, std::vector<Token>& tokens) const {
  struct Node {
    std::size_t previous;
    std::size_t next;
    Token symbol;
  };
  struct Candidate {
    Token merged;
    std::size_t at;
    bool operator>(const Candidate& other) const {
      return merged != other.merged ? merged > other.merged : at > other.at;
    }
  };
  const std::size_t count = word.size();  // also the end marker
  std::vector<Node> nodes(count);
  for (std::size_t i = 0; i < count; ++i) {
    nodes[i] = {i - 1, i + 1, byte_token_[static_cast<unsigned char>(word[i])]};
  }
  nodes[0].previous = count;
  nodes[count - 1].symbol = static_cast<Token>(nodes[count - 1].symbol + kBytes);

  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto offer = [&](std::size_t at) {
    if (at == count || nodes[at].next == count) return;
    const Token merged = merge_of(nodes[at].symbol, nodes[nodes[at].next].symbol);
    if (merged != kNone) queue.push({merged, at});
  };
  for (std::size_t i = 0; i + 1 < count; ++i) offer(i);
  while (!queue.empty()) {
    const auto [merged, at] = queue.top();
    queue.pop();
    Node& node = nodes[at];
    // Stale where a neighbour has merged since: a swallowed node holds kNone.
    if (node.symbol == kNone || node.next == count) continue;
    if (merge_of(node.symbol, nodes[node.next].symbol) != merged) continue;
    nodes[node.next].symbol = kNone;
    node.symbol = merged;
    node.next = nodes[node.next].next;
    if (node.next != count) nodes[node.next].previous = at;
    offer(node.previous);
    offer(at);
  }
  for (std::size_t i = 0; i != count; i = nodes[i].next) tokens.push_back(nodes[i].symbol);
}

}  // namespace laclip
