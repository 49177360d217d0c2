#include "tar.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <optional>
#include <unordered_set>

#include "image_header.hpp"

namespace laclip {
namespace {

constexpr std::uint64_t kBlock = 512;
constexpr std::uint64_t kMaxNameBytes = 1 << 20;     // of one pax or GNU long-name member
constexpr std::uint64_t kMaxHeaderBytes = 16 << 20;  // image bytes searched for the header
constexpr std::uint64_t kMaxKeyBytes = 4096;

using Bytes = std::span<const std::byte>;

std::string_view text(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// A field of the header: up to its first NUL.
std::string_view field(Bytes block, std::size_t offset, std::size_t bytes) {
  const std::string_view whole = text(block.subspan(offset, bytes));
  return whole.substr(0, whole.find('\0'));
}

std::string where(std::uint64_t at) { return "at byte " + std::to_string(at); }

// Octal digits, or GNU's base-256 form for numbers that do not fit. Empty: no number.
std::optional<std::uint64_t> number(Bytes block, std::size_t offset, std::size_t bytes) {
  const Bytes raw = block.subspan(offset, bytes);
  const auto first = std::to_integer<unsigned>(raw[0]);
  std::uint64_t value = 0;
  if (first & 0x80) {
    if (first != 0x80) return std::nullopt;  // negative, or above 2^88
    for (std::byte byte : raw.subspan(1)) {
      if (value >> 55) return std::nullopt;
      value = value << 8 | std::to_integer<std::uint64_t>(byte);
    }
    return value;
  }
  std::string_view digits = text(raw);
  while (!digits.empty() && digits.front() == ' ') digits.remove_prefix(1);
  while (!digits.empty() && (digits.back() == ' ' || digits.back() == '\0')) {
    digits.remove_suffix(1);
  }
  digits = digits.substr(0, digits.find('\0'));
  for (char digit : digits) {
    if (digit < '0' || digit > '7') return std::nullopt;
    value = value << 3 | static_cast<std::uint64_t>(digit - '0');
  }
  return value;
}

bool checksum_holds(Bytes block) {
  const std::optional<std::uint64_t> stored = number(block, 148, 8);
  std::uint64_t sum = 8 * ' ';
  std::int64_t signed_sum = 8 * ' ';  // some old tars add signed characters
  for (std::size_t i = 0; i < kBlock; ++i) {
    if (i >= 148 && i < 156) continue;
    sum += std::to_integer<std::uint64_t>(block[i]);
    signed_sum += static_cast<signed char>(block[i]);
  }
  return stored && (*stored == sum || static_cast<std::int64_t>(*stored) == signed_sum);
}

bool all_zero(Bytes block) {
  return std::all_of(block.begin(), block.end(), [](std::byte b) { return b == std::byte{0}; });
}

// tar stops at the end mark, so what `cat` appended behind it would be lost without a word.
void refuse_second_archive(ByteSource& source, std::uint64_t at) {
  for (; at + kBlock <= source.size(); at += kBlock) {
    const Bytes block = source.view(at, kBlock);
    if (!all_zero(block) && checksum_holds(block)) {
      throw TarError("a second archive begins " + where(at) +
                     ", behind the end mark: join tars with `tar --concatenate`, not with cat");
    }
  }
}

// `path` and `size` of a pax header: records "LENGTH KEY=VALUE\n".
struct PaxValues {
  std::optional<std::string> path;
  std::optional<std::uint64_t> size;
};

PaxValues parse_pax(std::string_view records, std::uint64_t at) {
  PaxValues values;
  while (!records.empty() && records.front() != '\0') {
    std::uint64_t length = 0;
    const auto [end, error] =
        std::from_chars(records.data(), records.data() + records.size(), length);
    const auto digits = static_cast<std::uint64_t>(end - records.data());
    if (error != std::errc{} || length > records.size() || length < digits + 3 || *end != ' ' ||
        records[length - 1] != '\n') {
      throw TarError("broken pax header " + where(at));
    }
    const std::string_view record = records.substr(digits + 1, length - digits - 2);
    const std::size_t equals = record.find('=');
    const std::string_view value =
        equals == std::string_view::npos ? std::string_view{} : record.substr(equals + 1);
    if (record.starts_with("path=")) values.path = value;
    if (record.starts_with("GNU.sparse.")) {
      throw TarError("sparse member " + where(at) + " is not supported");
    }
    if (record.starts_with("size=")) {
      std::uint64_t size = 0;
      const auto [last, bad] = std::from_chars(value.data(), value.data() + value.size(), size);
      if (bad != std::errc{} || last != value.data() + value.size()) {
        throw TarError("broken size in the pax header " + where(at));
      }
      values.size = size;
    }
    records.remove_prefix(length);
  }
  return values;
}

bool valid_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const std::size_t more = lead < 0x80                    ? 0
                             : lead >= 0xC2 && lead <= 0xDF ? 1
                             : lead >= 0xE0 && lead <= 0xEF ? 2
                             : lead >= 0xF0 && lead <= 0xF4 ? 3
                                                            : 4;
    if (more == 4 || i + more >= text.size()) return false;
    for (std::size_t j = 1; j <= more; ++j) {
      if ((static_cast<unsigned char>(text[i + j]) & 0xC0) != 0x80) return false;
    }
    if (more > 1) {  // overlong forms, surrogates, above U+10FFFF
      const auto next = static_cast<unsigned char>(text[i + 1]);
      if (lead == 0xE0 && next < 0xA0) return false;
      if (lead == 0xED && next >= 0xA0) return false;
      if (lead == 0xF0 && next < 0x90) return false;
      if (lead == 0xF4 && next >= 0x90) return false;
    }
    i += more + 1;
  }
  return true;
}

struct SplitName {
  std::string_view key;
  std::string extension;  // in lower case, without the dot
};

SplitName split_name(std::string_view name) {
  while (name.starts_with("./")) name.remove_prefix(2);
  const std::size_t slash = name.rfind('/');
  const std::size_t base = slash == std::string_view::npos ? 0 : slash + 1;
  const std::size_t dot = name.find('.', base);
  if (dot == std::string_view::npos) return {name, ""};
  std::string extension(name.substr(dot + 1));
  for (char& c : extension) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  return {name.substr(0, dot), std::move(extension)};
}

enum class Kind { kImage, kOtherImage, kCaption, kJson, kOther };

Kind kind_of(std::string_view extension) {
  constexpr std::array kImages{"jpg", "jpeg", "png", "webp"};
  constexpr std::array kOthers{"gif", "svg", "avif", "bmp", "tif", "tiff", "heic", "jxl"};
  if (std::find(kImages.begin(), kImages.end(), extension) != kImages.end()) return Kind::kImage;
  if (std::find(kOthers.begin(), kOthers.end(), extension) != kOthers.end()) {
    return Kind::kOtherImage;
  }
  if (extension == "txt") return Kind::kCaption;
  return extension == "json" ? Kind::kJson : Kind::kOther;
}

// The row number that `laclip pack` wrote. A quote inside a JSON string is escaped, so these bytes
// can only be a key.
std::uint32_t row_of(std::string_view json) {
  constexpr std::string_view kKey = "\"laclip_row\":";
  std::size_t at = json.find(kKey);
  if (at == std::string_view::npos) return 0xffffffffu;
  at += kKey.size();
  while (at < json.size() && json[at] == ' ') ++at;
  std::uint32_t row = 0xffffffffu;
  const auto parsed = std::from_chars(json.data() + at, json.data() + json.size(), row);
  return parsed.ec == std::errc{} ? row : 0xffffffffu;
}

// One sample while its members go by.
struct Run {
  std::string key;
  SampleRecord record{};
  bool image = false, other_image = false, caption = false, json = false;
  std::uint64_t others = 0;
};

void check_key(std::string_view key, const TarMember& member) {
  if (key.size() > kMaxKeyBytes || !valid_utf8(key)) {
    throw TarError("the name of the member " + where(member.offset) +
                   " is not UTF-8 or longer than 4,096 bytes");
  }
}

}  // namespace

bool TarReader::next(TarMember& member) {
  std::optional<std::string> long_name;
  PaxValues pax;
  while (!ended_) {
    const std::uint64_t header_at = at_;
    if (header_at >= source_.size()) {
      throw TarError(source_.size() == 0 ? "the file is empty"
                                         : "no end mark " + where(header_at) +
                                               ": the tar is cut short between two members");
    }
    const Bytes block = source_.view(header_at, kBlock);
    if (block.size() < kBlock) {
      throw TarError(header_at == 0 ? "not a tar: shorter than one block"
                                    : "cut short inside the header " + where(header_at));
    }
    if (all_zero(block)) {
      ended_ = true;
      refuse_second_archive(source_, header_at + kBlock);
      break;
    }
    if (!checksum_holds(block)) {
      throw TarError((header_at == 0 ? "not a tar: " : "") + std::string("no valid header ") +
                     where(header_at));
    }
    const std::optional<std::uint64_t> stored_size = number(block, 124, 12);
    const auto type = std::to_integer<char>(block[156]);
    const bool ustar = text(block.subspan(257, 6)) == std::string_view("ustar\0", 6);
    std::string name(field(block, 0, 100));
    if (const std::string_view prefix = field(block, 345, 155); ustar && !prefix.empty()) {
      name = std::string(prefix) + "/" + name;
    }
    // Links, devices, directories and pipes have no payload, whatever their size says.
    const bool payload = type < '1' || type > '6';
    std::uint64_t size = stored_size.value_or(0);
    const bool describes_next = type == 'x' || type == 'L' || type == 'K' || type == 'g';
    if (!describes_next && pax.size) size = *pax.size;
    if (!payload) size = 0;
    if (payload && !stored_size && (describes_next || !pax.size)) {
      throw TarError("member '" + name + "' " + where(header_at) + " has no valid size");
    }
    const std::uint64_t data_at = header_at + kBlock;
    if (size > source_.size() - data_at) {
      throw TarError("cut short inside member '" + name + "' " + where(data_at) + ": " +
                     std::to_string(size) + " bytes announced, " +
                     std::to_string(source_.size() - data_at) + " left");
    }
    at_ = data_at + (size + kBlock - 1) / kBlock * kBlock;
    if (type == 'x' || type == 'L') {
      if (size > kMaxNameBytes) throw TarError("name of over 1 MiB " + where(header_at));
      const std::string_view value = text(source_.view(data_at, size));
      if (type == 'x') {
        pax = parse_pax(value, header_at);
      } else {
        long_name = std::string(value.substr(0, value.find('\0')));
      }
      continue;
    }
    if (type == 'K' || type == 'g') continue;  // a long link's target; values for all members
    if (type == 'S') throw TarError("sparse member " + where(header_at) + " is not supported");
    if (payload && (type == '0' || type == '\0' || type == '7')) {
      member.name = pax.path ? *pax.path : long_name ? *long_name : std::move(name);
      member.offset = data_at;
      member.bytes = size;
      if (!member.name.ends_with('/')) return true;  // v7 marks a directory so
    }
    long_name.reset();
    pax = {};
  }
  return false;
}

TarScan scan_tar(ByteSource& source) {
  TarScan scan;
  Run run;
  std::unordered_set<std::string> seen;
  auto finish = [&] {
    if (!run.image && !run.other_image && !run.caption) {
      scan.other_members += run.others + (run.json ? 1 : 0);
    } else {
      if (!run.image) run.record.reason = run.other_image ? kUnsupportedImage : kNoImage;
      if (run.record.reason == kNotBad && !run.caption) run.record.reason = kNoCaption;
      if (!seen.insert(run.key).second) run.record.reason = kDuplicateKey;
      if (run.record.reason != kNotBad) run.record.flags |= kBad;
      if (scan.keys.size() + run.key.size() > 0xffffffffu) {
        throw TarError("more than 4 GiB of keys");
      }
      scan.keys += run.key;
      scan.key_end.push_back(static_cast<std::uint32_t>(scan.keys.size()));
      scan.records.push_back(run.record);
    }
    run = {};
  };
  TarReader reader(source);
  TarMember member;
  while (reader.next(member)) {
    const auto [key, extension] = split_name(member.name);
    const Kind kind = kind_of(extension);
    if (key.empty() || kind == Kind::kOther) {
      if (key.empty() || key != run.key) {
        ++scan.other_members;
      } else {
        ++run.others;
      }
      continue;
    }
    check_key(key, member);
    // A second caption or image of the same kind starts a new run: a duplicate key.
    const bool repeated = (kind == Kind::kImage && run.image) ||
                          (kind == Kind::kCaption && run.caption) ||
                          (kind == Kind::kJson && run.json);
    if (key != run.key || repeated) finish();
    if (run.key.empty()) {
      run.key = key;
      run.record.row = 0xffffffffu;
      run.record.orientation = 1;
    }
    if (kind == Kind::kImage) {
      run.image = true;
      const ImageHeader header = parse_image_header(
          source.view(member.offset, std::min<std::uint64_t>(member.bytes, kMaxHeaderBytes)));
      run.record.offset = member.offset;
      run.record.bytes = static_cast<std::uint32_t>(member.bytes);
      run.record.width = header.width;
      run.record.height = header.height;
      run.record.flags = header.flags;
      run.record.format = header.format;
      run.record.orientation = header.orientation;
      run.record.reason = member.bytes > 0xffffffffu ? kTooLarge : header.reason;
    } else if (kind == Kind::kOtherImage) {
      run.other_image = true;
    } else if (kind == Kind::kCaption) {
      run.caption = true;
    } else {
      run.json = true;
      run.record.row = row_of(
          text(source.view(member.offset, std::min<std::uint64_t>(member.bytes, kMaxNameBytes))));
    }
  }
  finish();
  return scan;
}

TarTexts read_tar_texts(ByteSource& source, std::string_view extension, std::size_t max_bytes) {
  TarTexts texts;
  TarReader reader(source);
  TarMember member;
  while (reader.next(member)) {
    const SplitName name = split_name(member.name);
    if (name.extension != extension || name.key.empty()) continue;
    check_key(name.key, member);
    texts.keys.emplace_back(name.key);
    texts.bytes +=
        text(source.view(member.offset, std::min<std::uint64_t>(member.bytes, max_bytes)));
    texts.end.push_back(texts.bytes.size());
  }
  return texts;
}

}  // namespace laclip
