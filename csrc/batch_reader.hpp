// Reads batches ahead of training: which samples, which caption of each, which crop window.
//
// Batch k is a pure function of (shards, options, k) and of the samples known to be bad: every
// draw is a counter-based random number keyed by (seed, epoch, sample).
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "epoch_order.hpp"
#include "shard.hpp"

namespace laclip {

enum class CaptionPolicy { kUniform, kWeights, kOriginal, kMulti };

struct ReaderOptions {
  std::uint64_t seed = 0;
  std::uint64_t global_batch_size = 1;
  std::uint32_t rank = 0;
  std::uint32_t world_size = 1;  // divides global_batch_size
  std::size_t window_shards = 16;
  unsigned threads = 2;
  std::size_t prefetch = 2;
  CaptionPolicy policy = CaptionPolicy::kUniform;
  std::vector<double> weights;  // one a variant, for kWeights
  std::uint32_t context_length = 77;
  std::int32_t sot_token = 0;  // -1: captions begin without one
  std::int32_t eot_token = 0;
  std::int32_t pad_token = 0;
  double scale_low = 0.5, scale_high = 1.0;  // share of the image's area
  double ratio_low = 0.75, ratio_high = 4.0 / 3.0;
  bool flip = false;
  std::uint64_t max_pixels = 100'000'000;
};

// This rank's part of a global batch: `size` samples.
struct Batch {
  std::uint64_t index = 0;
  std::size_t size = 0;
  std::uint32_t variants = 1;         // captions of each sample: more than 1 for kMulti
  std::vector<std::uint64_t> sample;  // [size] place in the list of all samples
  std::vector<std::uint64_t> epoch;   // [size]
  std::vector<std::uint8_t> variant;  // [size] the drawn caption; 0 for kMulti
  std::vector<std::uint64_t> begin;   // [size + 1] encoded image i: bytes[begin[i], begin[i + 1])
  std::vector<std::byte> bytes;
  std::vector<std::int32_t> window;     // [size, 4] x, y, width, height in pixels
  std::vector<std::uint8_t> mirror;     // [size] 1: flip left to right
  std::vector<std::int32_t> token_ids;  // [variants, size, context_length]
  std::uint64_t substitutes = 0;        // samples that stand in for bad ones
  // [size] 1: the image's header is not what the index says, so its window may lie outside of it.
  std::vector<std::uint8_t> broken;
};

class BatchReader {
 public:
  // Throws std::invalid_argument for options that contradict each other.
  BatchReader(std::vector<ShardFiles> shards, ReaderOptions options);
  ~BatchReader();
  BatchReader(const BatchReader&) = delete;
  BatchReader& operator=(const BatchReader&) = delete;

  std::uint64_t samples() const { return first_sample_.back(); }
  // The batch that next() gives next; what was read ahead is dropped.
  void seek(std::uint64_t index);
  // Waits for the next batch. Rethrows what went wrong while it was read.
  std::shared_ptr<Batch> next();
  // Reads one batch at once, past the queue.
  std::shared_ptr<Batch> read(std::uint64_t index);
  // From now on these samples yield substitutes.
  void mark_bad(const std::vector<std::uint64_t>& samples);
  // Path of the tar and key of a sample.
  std::pair<std::string, std::string> name(std::uint64_t sample);

 private:
  struct Slot;
  using OpenShards = std::map<std::uint32_t, std::shared_ptr<const Shard>>;

  SamplePlace place_of(std::uint64_t sample) const;
  std::shared_ptr<const EpochOrder> order_of(std::uint64_t epoch);
  const Shard& open(OpenShards& opened, std::uint32_t shard);
  void plan(Slot& slot);
  bool is_bad(const Shard& shard, SamplePlace place, const std::set<std::uint64_t>& bad) const;
  SamplePlace substitute(const Shard& shard, std::uint64_t batch, std::uint64_t position,
                         SamplePlace place, const std::set<std::uint64_t>& bad);
  std::uint32_t draw_variant(const Shard& shard, std::uint32_t index, std::uint64_t sample,
                             std::uint64_t epoch) const;
  void draw_window(const SampleRecord& record, std::uint64_t sample, std::uint64_t epoch,
                   std::int32_t* window, std::uint8_t* mirror) const;
  void write_caption(const Shard& shard, std::uint32_t index, std::uint32_t variant,
                     std::int32_t* out) const;
  void read_part(Slot& slot, std::size_t part);
  void work();

  ReaderOptions options_;
  std::vector<std::uint64_t> counts_;
  std::vector<std::uint64_t> first_sample_;  // of each shard, and the end
  ShardCache cache_;

  std::mutex order_mutex_;
  std::map<std::uint64_t, std::shared_ptr<const EpochOrder>> orders_;

  std::mutex mutex_;
  std::condition_variable wake_workers_;
  std::condition_variable wake_reader_;
  std::deque<std::shared_ptr<Slot>> queue_;
  std::uint64_t next_index_ = 0;
  std::shared_ptr<const std::set<std::uint64_t>> bad_;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace laclip
