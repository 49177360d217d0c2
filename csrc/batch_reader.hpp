// Reads batches ahead of training: which samples, which caption of each, which crop window.
//
// Batch k is a pure function of (shards, options, k) and of the samples known to be bad: every
// draw is a counter-based random number keyed by (seed, epoch, sample).
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "draws.hpp"
#include "epoch_order.hpp"
#include "image_header.hpp"
#include "shard.hpp"

namespace laclip {

struct ReaderOptions : DrawOptions {
  std::uint64_t global_batch_size = 1;
  std::uint32_t rank = 0;
  std::uint32_t world_size = 1;  // divides global_batch_size
  std::size_t window_shards = 16;
  unsigned threads = 2;
  std::size_t prefetch = 2;
  std::uint32_t context_length = 77;
  std::int32_t sot_token = 0;  // -1: captions begin without one
  std::int32_t eot_token = 0;
  std::int32_t pad_token = 0;
  bool pad_captions = false;  // each to context_length
  std::uint64_t max_pixels = 100'000'000;
  bool exif_rotation = false;  // windows lie in the image turned as its EXIF data says
};

// Memory that grows and is not cleared.
class ByteBuffer {
 public:
  void resize(std::size_t size) {
    if (size > capacity_) {
      capacity_ = size + size / 8;  // batches differ by a few percent
      bytes_ = std::make_unique_for_overwrite<std::byte[]>(capacity_);
    }
    size_ = size;
  }
  std::span<std::byte> bytes() const { return {bytes_.get(), size_}; }

 private:
  std::unique_ptr<std::byte[]> bytes_;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

// This rank's part of a global batch: `size` samples.
struct Batch {
  std::uint64_t index = 0;
  std::size_t size = 0;
  std::uint32_t variants = 1;         // captions of each sample: more than 1 for kMulti
  std::vector<std::uint64_t> sample;  // [size] place in the list of all samples
  std::vector<std::uint64_t> epoch;   // [size]
  std::vector<std::uint8_t> variant;  // [size] the drawn caption; 0 for kMulti
  std::vector<std::uint64_t> begin;   // [size + 1] encoded image i: bytes [begin[i], begin[i + 1])
  ByteBuffer buffer;
  std::vector<std::int32_t> window;      // [size, 4] x, y, width, height in pixels
  std::vector<std::uint8_t> mirror;      // [size] 1: flip left to right
  std::vector<std::int32_t> token_ids;   // captions end to end, the first variant of all samples
                                         // first; what follows the last of them is no caption
  std::vector<std::int32_t> cu_seqlens;  // [variants * size + 1] begin of each caption, and the end
  std::uint64_t substitutes = 0;         // samples that stand in for bad ones
  std::vector<std::uint8_t> broken;      // [size] BrokenReason

  std::span<const std::int32_t> captions() const {
    return std::span(token_ids).first(static_cast<std::size_t>(cu_seqlens.back()));
  }
};

// Gives out batches, and again those whose last owner is gone: their memory stays mapped.
class BatchPool {
 public:
  std::shared_ptr<Batch> take();

 private:
  struct Free {
    std::mutex mutex;
    std::vector<std::unique_ptr<Batch>> batches;
  };
  std::shared_ptr<Free> free_ = std::make_shared<Free>();  // outlives the pool with its batches
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
  // Waits a while; whether next() gives the next batch at once.
  bool wait(std::chrono::milliseconds patience);
  // Waits for the next batch. Rethrows what went wrong while it was read.
  std::shared_ptr<Batch> next();
  // Reads one batch at once, past the queue.
  std::shared_ptr<Batch> read(std::uint64_t index);
  // A batch without its images: only sidecars are read.
  std::shared_ptr<Batch> plan(std::uint64_t index);
  // From now on these samples yield substitutes.
  void mark_bad(const std::vector<std::uint64_t>& samples);
  // Path of the tar and key of a sample.
  std::pair<std::string, std::string> name(std::uint64_t sample);

 private:
  struct Slot;

  bool ready() const;
  std::shared_ptr<Slot> new_slot(std::uint64_t index);
  SamplePlace place_of(std::uint64_t sample) const;
  std::shared_ptr<const EpochOrder> order_of(std::uint64_t epoch);
  void plan(Slot& slot);
  void place_samples(std::uint64_t first, std::span<SamplePlace> out);
  void draw_sample(Slot& slot, std::size_t i, const std::set<std::uint64_t>& bad);
  void open_next_window(std::uint64_t index);
  bool is_bad(const Shard& shard, SamplePlace place, const std::set<std::uint64_t>& bad) const;
  SamplePlace substitute(Slot& slot, std::size_t position, const std::set<std::uint64_t>& bad);
  void substitute_shard(Slot& slot, std::uint32_t number, const std::set<std::uint64_t>& bad);
  SamplePlace any_good(SamplePlace place, std::uint64_t epoch, const std::set<std::uint64_t>& bad);
  std::int32_t* write_caption(const Shard& shard, std::uint32_t index, std::uint32_t variant,
                              std::int32_t* out) const;
  void read_part(Slot& slot, std::size_t part);
  void work();

  ReaderOptions options_;
  std::vector<std::uint64_t> counts_;
  std::vector<std::uint64_t> first_sample_;  // of each shard, and the end
  ShardCache cache_;
  BatchPool pool_;
  std::atomic<std::uint64_t> opened_window_ = 0;  // epoch and window that were opened ahead

  std::mutex order_mutex_;
  std::map<std::uint64_t, std::shared_ptr<const EpochOrder>> orders_;

  std::mutex mutex_;
  std::condition_variable wake_workers_;
  std::condition_variable wake_reader_;
  std::deque<std::shared_ptr<Slot>> queue_;
  std::uint64_t next_index_ = 0;
  std::shared_ptr<const std::set<std::uint64_t>> bad_;
  std::atomic<bool> stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace laclip
