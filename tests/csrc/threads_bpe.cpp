// Two callers at once, eight threads each, on one tokenizer: the ids of one thread. For
// -DLACLIP_SANITIZE=thread; tests/csrc/CMakeLists.txt says how to build it.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "bpe_batch.hpp"

int main() {
  std::ifstream merges(LACLIP_VOCABULARY);
  const laclip::Bpe bpe(std::string(std::istreambuf_iterator<char>(merges), {}));
  std::ifstream file(LACLIP_CAPTIONS);
  std::vector<std::string> captions;
  for (std::string line; std::getline(file, line);) captions.push_back(line);
  std::vector<laclip::Text> texts;
  for (const std::string& caption : captions) texts.push_back({caption.data(), caption.size()});

  constexpr std::size_t kContext = 24;
  const auto raw = laclip::TextForm::kRaw;
  const auto expected = encode_ragged(bpe, nullptr, texts, raw, SIZE_MAX, 1);
  std::vector<std::int32_t> expected_rows(texts.size() * kContext);
  encode_padded(bpe, nullptr, texts, raw, kContext, expected_rows.data(), 1);

  std::vector<int> wrong(2);
  const auto call = [&](std::size_t caller) {
    for (int repeat = 0; repeat < 5; ++repeat) {
      const auto ragged = encode_ragged(bpe, nullptr, texts, raw, SIZE_MAX, 8);
      std::vector<std::int32_t> rows(texts.size() * kContext);
      encode_padded(bpe, nullptr, texts, raw, kContext, rows.data(), 8);
      wrong[caller] += ragged.tokens != expected.tokens || ragged.lengths != expected.lengths ||
                       rows != expected_rows;
    }
  };
  {
    const std::jthread first(call, 0);
    const std::jthread second(call, 1);
  }
  std::printf("threads_bpe: %zu captions, %zu ids, %d wrong\n", texts.size(),
              expected.tokens.size(), wrong[0] + wrong[1]);
  return texts.empty() || wrong[0] + wrong[1] != 0;
}
