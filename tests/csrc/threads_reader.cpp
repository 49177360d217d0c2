// Readers of four ranks at once, each with several threads, jumping, marking samples bad and
// stopping in the middle: every batch as one thread reads it. For -DLACLIP_SANITIZE=thread;
// tests/csrc/CMakeLists.txt says how to build it.
//
// The data set: a file whose lines are, for each shard, stem, samples, variants, the checksums of
// its two sidecars and the tokenizer's fingerprint.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "batch_reader.hpp"

namespace {

std::vector<laclip::ShardFiles> read_list(const char* path) {
  std::vector<laclip::ShardFiles> shards;
  std::ifstream list(path);
  std::string stem;
  laclip::ShardFiles files;
  while (list >> stem >> files.count >> files.variants >> std::hex >> files.samples_checksum >>
         files.captions_checksum >> std::dec >> files.tokenizer) {
    files.tar = stem + ".tar";
    files.samples = stem + ".samples";
    files.captions = stem + ".captions";
    shards.push_back(files);
  }
  return shards;
}

bool same(const laclip::Batch& a, const laclip::Batch& b) {
  const auto left = a.buffer.bytes();
  const auto right = b.buffer.bytes();
  return a.index == b.index && a.sample == b.sample && a.variant == b.variant &&
         a.window == b.window && a.mirror == b.mirror && a.cu_seqlens == b.cu_seqlens &&
         std::ranges::equal(a.captions(), b.captions()) && a.broken == b.broken &&
         std::ranges::equal(left, right);
}

}  // namespace

int main(int, char** arguments) {
  const auto shards = read_list(arguments[1]);
  constexpr std::uint32_t kRanks = 4;
  constexpr std::uint64_t kBatches = 60;  // more than an epoch of the embedded data
  const auto options_of = [](std::uint32_t rank, unsigned threads, std::size_t prefetch) {
    laclip::ReaderOptions options;
    options.seed = 5;
    options.global_batch_size = 64;
    options.rank = rank;
    options.world_size = kRanks;
    options.window_shards = 2;
    options.context_length = 24;
    options.threads = threads;
    options.prefetch = prefetch;
    return options;
  };
  std::vector<int> wrong(kRanks);
  std::uint64_t read = 0;
  const auto run = [&](std::uint32_t rank) {
    laclip::BatchReader one(shards, options_of(rank, 1, 1));
    laclip::BatchReader many(shards, options_of(rank, 4, 5));
    const std::vector<std::uint64_t> bad = {1, 17, 333};
    for (laclip::BatchReader* reader : {&one, &many}) {
      reader->mark_bad(bad);
      reader->seek(0);
    }
    std::vector<std::shared_ptr<laclip::Batch>> kept;  // given back late and out of order
    for (std::uint64_t k = 0; k < kBatches; ++k) {
      const auto batch = many.next();
      wrong[rank] += !same(*batch, *one.read(k));
      if (k % 3 == 0) kept.push_back(batch);
      if (kept.size() > 4) kept.erase(kept.begin());
      if (k % 7 == 0) many.mark_bad({1});  // known already: changes nothing
    }
    for (std::uint64_t k = 0; k < 40; ++k) {
      many.seek(k * 37 % 200);
      if (k % 4 == 0) wrong[rank] += many.next()->index != k * 37 % 200;
    }
  };  // both stop while they read ahead
  {
    std::vector<std::jthread> ranks;
    for (std::uint32_t rank = 0; rank < kRanks; ++rank) ranks.emplace_back(run, rank);
  }
  int sum = 0;
  for (int count : wrong) sum += count;
  read = kRanks * kBatches;
  std::printf("threads_reader: %llu batches, %d wrong\n", static_cast<unsigned long long>(read),
              sum);
  return shards.empty() || sum != 0;
}
