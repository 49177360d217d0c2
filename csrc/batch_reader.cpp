#include "batch_reader.hpp"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>
#include <utility>

namespace laclip {
namespace {

constexpr std::size_t kPartSamples = 16;   // images that one worker reads at a time
constexpr std::size_t kBlockSamples = 64;  // planned together while their memory is fetched
constexpr std::size_t kNextShards = 16;    // asked for a substitute when a shard has none

std::vector<std::uint64_t> counts_of(const std::vector<ShardFiles>& shards) {
  std::vector<std::uint64_t> counts;
  for (const ShardFiles& shard : shards) counts.push_back(shard.count);
  return counts;
}

}  // namespace

std::shared_ptr<Batch> BatchPool::take() {
  std::unique_ptr<Batch> batch;
  {
    const std::lock_guard lock(free_->mutex);
    if (!free_->batches.empty()) {
      batch = std::move(free_->batches.back());
      free_->batches.pop_back();
    }
  }
  if (!batch) batch = std::make_unique<Batch>();
  return {batch.release(), [free = free_](Batch* given_back) {
            std::unique_ptr<Batch> owned(given_back);
            const std::lock_guard lock(free->mutex);
            free->batches.push_back(std::move(owned));
          }};
}

struct BatchReader::Slot {
  std::shared_ptr<Batch> batch;
  std::unordered_map<std::uint32_t, std::shared_ptr<const Shard>> opened;
  std::vector<SamplePlace> place;
  std::vector<const Shard*> shard;      // of each place
  std::vector<SamplePlace> global;      // of all ranks, once a substitute is needed
  std::set<std::uint32_t> substituted;  // shards whose bad samples were given substitutes,
  std::unordered_map<std::size_t, SamplePlace> substitutes;  // these, by position in `global`
  bool planned = false;
  std::size_t next_part = 0;
  std::size_t parts = 0;
  std::size_t parts_left = 0;
  std::exception_ptr error;

  bool done() const { return error != nullptr || (planned && parts_left == 0); }
  const Shard& open(ShardCache& cache, std::uint32_t number) {
    auto& entry = opened[number];
    if (!entry) entry = cache.open(number);
    return *entry;
  }
};

std::shared_ptr<BatchReader::Slot> BatchReader::new_slot(std::uint64_t index) {
  auto slot = std::make_shared<Slot>();
  slot->batch = pool_.take();
  slot->batch->index = index;
  return slot;
}

BatchReader::BatchReader(std::vector<ShardFiles> shards, ReaderOptions options)
    : options_(std::move(options)),
      counts_(counts_of(shards)),
      cache_(std::move(shards), 2 * options_.window_shards + 8),
      bad_(std::make_shared<const std::set<std::uint64_t>>()) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
  };
  first_sample_.push_back(0);
  for (std::uint64_t count : counts_) first_sample_.push_back(first_sample_.back() + count);
  require(samples() > 0, "the dataset holds no sample");
  require(options_.world_size > 0 && options_.rank < options_.world_size,
          "rank must be below world_size");
  require(options_.global_batch_size > 0 && options_.global_batch_size % options_.world_size == 0,
          "global_batch_size must be a positive multiple of world_size");
  require(options_.window_shards > 0 && options_.threads > 0 && options_.prefetch > 0,
          "window_shards, threads and prefetch must be above 0");
  require(options_.context_length >= 3, "context_length must be at least 3");
  const bool same_variants =
      std::all_of(counts_.begin(), counts_.end(), [&, i = 0u](std::uint64_t) mutable {
        return cache_.files(i++).variants == cache_.files(0).variants;
      });
  if (options_.policy == CaptionPolicy::kMulti) {
    require(same_variants, "captions = 'multi' needs the same variants in every dataset");
  }
  if (options_.policy == CaptionPolicy::kWeights) {
    require(same_variants && options_.weights.size() == cache_.files(0).variants,
            "captions = 'weights' needs one weight for each of the dataset's variants");
  }
  for (unsigned i = 0; i < options_.threads; ++i) workers_.emplace_back([this] { work(); });
}

BatchReader::~BatchReader() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_workers_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void BatchReader::seek(std::uint64_t index) {
  {
    const std::lock_guard lock(mutex_);
    queue_.clear();
    next_index_ = index;
  }
  wake_workers_.notify_all();
}

bool BatchReader::ready() const { return !queue_.empty() && queue_.front()->done(); }

bool BatchReader::wait(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  return wake_reader_.wait_for(lock, patience, [this] { return ready(); });
}

std::shared_ptr<Batch> BatchReader::next() {
  std::shared_ptr<Slot> slot;
  {
    std::unique_lock lock(mutex_);
    wake_reader_.wait(lock, [this] { return ready(); });
    slot = queue_.front();
    // A batch that failed stays at the front: asking again gives the same error.
    if (slot->error) std::rethrow_exception(slot->error);
    queue_.pop_front();
  }
  wake_workers_.notify_all();
  return slot->batch;
}

std::shared_ptr<Batch> BatchReader::plan(std::uint64_t index) {
  const auto slot = new_slot(index);
  plan(*slot);
  slot->batch->buffer.resize(0);
  open_next_window(index);
  return slot->batch;
}

std::shared_ptr<Batch> BatchReader::read(std::uint64_t index) {
  const auto slot = new_slot(index);
  plan(*slot);
  slot->batch->buffer.resize(slot->batch->begin.back());
  for (std::size_t part = 0; part < slot->parts; ++part) read_part(*slot, part);
  return slot->batch;
}

void BatchReader::mark_bad(const std::vector<std::uint64_t>& samples) {
  const std::lock_guard lock(mutex_);
  auto bad = std::make_shared<std::set<std::uint64_t>>(*bad_);
  bad->insert(samples.begin(), samples.end());
  bad_ = std::move(bad);
}

std::pair<std::string, std::string> BatchReader::name(std::uint64_t sample) {
  const SamplePlace place = place_of(sample);
  return {cache_.files(place.shard).tar, std::string(cache_.open(place.shard)->key(place.index))};
}

void BatchReader::work() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    std::shared_ptr<Slot> slot;
    for (const auto& candidate : queue_) {
      if (candidate->planned && !candidate->error && candidate->next_part < candidate->parts) {
        slot = candidate;
        break;
      }
    }
    const bool planning = !slot && queue_.size() < options_.prefetch;
    if (planning) {
      slot = new_slot(next_index_++);
      queue_.push_back(slot);
    }
    if (!slot) {
      wake_workers_.wait(lock);
      continue;
    }
    const std::size_t part = planning ? 0 : slot->next_part++;
    lock.unlock();
    std::exception_ptr error;
    try {
      if (planning) {
        plan(*slot);
        slot->batch->buffer.resize(slot->batch->begin.back());
        for (std::size_t i = 0; i < slot->batch->size; ++i) {
          slot->shard[i]->expect_image(slot->place[i].index);
        }
      } else {
        read_part(*slot, part);
      }
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !slot->error) slot->error = error;
    if (planning) {
      slot->planned = true;
      slot->parts_left = slot->parts;
      wake_workers_.notify_all();
    } else {
      --slot->parts_left;
    }
    if (slot->done()) wake_reader_.notify_all();
    if (planning && !error) {
      const std::uint64_t index = slot->batch->index;
      slot.reset();
      lock.unlock();
      open_next_window(index);
      lock.lock();
    }
  }
}

SamplePlace BatchReader::place_of(std::uint64_t sample) const {
  const auto after = std::upper_bound(first_sample_.begin(), first_sample_.end(), sample);
  const auto shard = static_cast<std::uint32_t>(after - first_sample_.begin() - 1);
  return {shard, static_cast<std::uint32_t>(sample - first_sample_[shard])};
}

std::shared_ptr<const EpochOrder> BatchReader::order_of(std::uint64_t epoch) {
  const std::lock_guard lock(order_mutex_);
  auto& order = orders_[epoch];
  if (!order) {
    order =
        std::make_shared<const EpochOrder>(counts_, options_.seed, epoch, options_.window_shards);
  }
  auto result = order;
  if (orders_.size() > 3) {
    // The one farthest away goes: a seek may move either way.
    const auto first = orders_.begin();
    const auto last = std::prev(orders_.end());
    orders_.erase(epoch - first->first > last->first - epoch ? first : last);
  }
  return result;
}

// Where the samples of a range of positions lie, whatever is bad; they may run into another epoch.
void BatchReader::place_samples(std::uint64_t first, std::span<SamplePlace> out) {
  for (std::size_t done = 0; done < out.size();) {
    const std::uint64_t position = (first + done) % samples();
    const auto count =
        static_cast<std::size_t>(std::min<std::uint64_t>(out.size() - done, samples() - position));
    const std::uint64_t epoch = (first + done) / samples();
    order_of(epoch)->places(position, out.subspan(done, count));
    done += count;
  }
}

// Opens the shards of the window after this batch's, once: their sidecars come from the disk
// meanwhile. No batch waits for it.
void BatchReader::open_next_window(std::uint64_t index) {
  const std::uint64_t first = index * options_.global_batch_size;
  try {
    const auto order = order_of(first / samples());
    const std::size_t next = order->window_of(first % samples()) + 1;
    const std::uint64_t mark = first / samples() * order->windows() + next;
    if (next == order->windows() || opened_window_.exchange(mark) == mark) return;
    for (const std::uint32_t shard : order->shards_of(next)) {
      if (!stop_) cache_.open(shard);
    }
  } catch (const std::exception&) {
    // The batch that needs it will say so.
  }
}

void BatchReader::plan(Slot& slot) {
  std::shared_ptr<const std::set<std::uint64_t>> bad;
  {
    const std::lock_guard lock(mutex_);
    bad = bad_;
  }
  Batch& batch = *slot.batch;
  const bool multi = options_.policy == CaptionPolicy::kMulti;
  const std::size_t size = options_.global_batch_size / options_.world_size;
  batch.size = size;
  batch.variants = multi ? cache_.files(0).variants : 1;
  batch.substitutes = 0;
  batch.sample.resize(size);
  batch.epoch.resize(size);
  batch.variant.assign(size, 0);
  batch.begin.assign(size + 1, 0);
  batch.window.resize(4 * size);
  batch.mirror.resize(size);
  batch.token_ids.resize(batch.variants * size * options_.context_length);
  batch.cu_seqlens.assign(1, 0);
  batch.broken.assign(size, kSound);
  slot.place.resize(size);
  slot.shard.resize(size);
  slot.parts = (size + kPartSamples - 1) / kPartSamples;
  const std::uint64_t position = batch.index * options_.global_batch_size + options_.rank * size;
  place_samples(position, slot.place);
  for (std::size_t i = 0; i < size; ++i) batch.epoch[i] = (position + i) / samples();
  std::int32_t* const tokens = batch.token_ids.data();
  std::int32_t* out = tokens;
  for (std::uint32_t number = 0; number < batch.variants; ++number) {
    for (std::size_t first = 0; first < size; first += kBlockSamples) {
      const std::size_t last = std::min(size, first + kBlockSamples);
      if (number == 0) {
        for (std::size_t i = first; i < last; ++i) {
          slot.shard[i] = &slot.open(cache_, slot.place[i].shard);
          slot.shard[i]->expect_sample(slot.place[i].index);
        }
        for (std::size_t i = first; i < last; ++i) draw_sample(slot, i, *bad);
      }
      const auto variant_of = [&](std::size_t i) { return multi ? number : batch.variant[i]; };
      for (std::size_t i = first; i < last; ++i) {
        slot.shard[i]->expect_caption(slot.place[i].index, variant_of(i));
      }
      for (std::size_t i = first; i < last; ++i) {
        out = write_caption(*slot.shard[i], slot.place[i].index, variant_of(i), out);
        batch.cu_seqlens.push_back(static_cast<std::int32_t>(out - tokens));
      }
    }
  }
}

// All that is decided about a sample but the tokens of its caption.
void BatchReader::draw_sample(Slot& slot, std::size_t i, const std::set<std::uint64_t>& bad) {
  Batch& batch = *slot.batch;
  SamplePlace& place = slot.place[i];
  if (is_bad(*slot.shard[i], place, bad)) {
    place = substitute(slot, options_.rank * batch.size + i, bad);
    slot.shard[i] = &slot.open(cache_, place.shard);
    ++batch.substitutes;
  }
  const Shard& shard = *slot.shard[i];
  const SampleRecord& record = shard.record(place.index);
  const std::uint64_t sample = first_sample_[place.shard] + place.index;
  const std::uint64_t epoch = batch.epoch[i];
  batch.sample[i] = sample;
  batch.begin[i + 1] = batch.begin[i] + record.bytes;
  const bool on_its_side = options_.exif_rotation && record.orientation >= 5;
  draw_window(options_, on_its_side ? record.height : record.width,
              on_its_side ? record.width : record.height, sample, epoch,
              std::span<std::int32_t, 4>(&batch.window[4 * i], 4));
  batch.mirror[i] = draw_mirror(options_, sample, epoch);
  if (options_.policy == CaptionPolicy::kMulti) return;
  std::uint32_t variant = draw_variant(options_, shard.variants(), sample, epoch);
  const std::uint32_t flags = shard.caption_entry(place.index, variant);
  if ((flags & (kCaptionMissing | kCaptionShort)) != 0) variant = 0;
  batch.variant[i] = static_cast<std::uint8_t>(variant);
}

bool BatchReader::is_bad(const Shard& shard, SamplePlace place,
                         const std::set<std::uint64_t>& bad) const {
  const SampleRecord& record = shard.record(place.index);
  const std::uint64_t pixels = static_cast<std::uint64_t>(record.width) * record.height;
  // A blank original, as img2dataset writes it where there was none, is no caption.
  return (record.flags & kBad) != 0 || pixels > options_.max_pixels ||
         (shard.caption_entry(place.index, 0) & kCaptionMissing) != 0 ||
         (!bad.empty() && bad.contains(first_sample_[place.shard] + place.index));
}

// Another sample of the same shard that does not stand in the same global batch, if there is one,
// for the bad one at `position` of that batch.
SamplePlace BatchReader::substitute(Slot& slot, std::size_t position,
                                    const std::set<std::uint64_t>& bad) {
  const std::uint64_t first = slot.batch->index * options_.global_batch_size;
  if (slot.global.empty()) {
    slot.global.resize(options_.global_batch_size);
    place_samples(first, slot.global);
  }
  const SamplePlace place = slot.global[position];
  if (slot.substituted.insert(place.shard).second) substitute_shard(slot, place.shard, bad);
  const auto found = slot.substitutes.find(position);
  if (found != slot.substitutes.end()) return found->second;
  return any_good(place, (first + position) / samples(), bad);
}

// Substitutes for all bad samples of a shard in a global batch, as far as the shard has any. Each
// place that the shard has in the batch begins to look in a stretch of its own of one order of the
// shard, past what the batch holds. So what stands in for a sample does not depend on which others
// are bad: ranks do not know of each other's.
void BatchReader::substitute_shard(Slot& slot, std::uint32_t number,
                                   const std::set<std::uint64_t>& bad) {
  const Shard& shard = slot.open(cache_, number);
  const std::uint64_t count = counts_[number];
  std::vector<bool> taken(count);
  std::vector<std::size_t> positions;  // of the shard's samples in the batch
  for (std::size_t at = 0; at < slot.global.size(); ++at) {
    if (slot.global[at].shard != number) continue;
    taken[slot.global[at].index] = true;
    positions.push_back(at);
  }
  const PhiloxBlock key =
      draw(options_.seed, Stream::kSubstitute, first_sample_[number], slot.batch->index, 0);
  const KeyedBijection order(count, key[0], key[1]);
  for (std::size_t place = 0; place < positions.size(); ++place) {
    if (!is_bad(shard, slot.global[positions[place]], bad)) continue;
    const std::uint64_t begin = place * count / positions.size();
    bool done = false;
    for (std::uint64_t i = begin; i < begin + count && !done; ++i) {
      const SamplePlace found{number, static_cast<std::uint32_t>(order(i % count))};
      if (taken[found.index] || is_bad(shard, found, bad)) continue;
      slot.substitutes.emplace(positions[place], found);
      done = true;
    }
    if (!done) return;  // nor is there one for those behind
  }
}

// A good sample of the bad one's shard or, where it has none, of the next shards in the list, even
// if it stands in the same batch: what is left where the batch holds a whole shard.
SamplePlace BatchReader::any_good(SamplePlace place, std::uint64_t epoch,
                                  const std::set<std::uint64_t>& bad) {
  const std::uint64_t sample = first_sample_[place.shard] + place.index;
  const PhiloxBlock key = draw(options_.seed, Stream::kSubstitute, sample, epoch, 0);
  for (std::size_t step = 0; step < std::min(counts_.size(), kNextShards); ++step) {
    SamplePlace found{static_cast<std::uint32_t>((place.shard + step) % counts_.size()), 0};
    const auto shard = cache_.open(found.shard);
    const KeyedBijection order(counts_[found.shard], key[0], key[1]);
    for (std::uint64_t i = 0; i < counts_[found.shard]; ++i) {
      found.index = static_cast<std::uint32_t>(order(i));
      if (!is_bad(*shard, found, bad)) return found;
    }
  }
  throw std::runtime_error("'" + cache_.files(place.shard).tar + "' sample " +
                           std::string(cache_.open(place.shard)->key(place.index)) +
                           " is bad or above data.max_pixels, and every other sample of the shard "
                           "is bad too, and of the next shards: remove them");
}

// Start of text, the caption cut to fit, end of text. A text may hold an end of text of its own: a
// padded caption keeps what follows it, a packed one ends there, as it is pooled at its end.
// Returns where the next caption begins.
std::int32_t* BatchReader::write_caption(const Shard& shard, std::uint32_t index,
                                         std::uint32_t variant, std::int32_t* out) const {
  const std::uint32_t flags = shard.caption_entry(index, variant);
  if ((flags & (kCaptionMissing | kCaptionShort)) != 0) variant = 0;
  std::int32_t* const limit = out + options_.context_length;
  if (options_.sot_token >= 0) *out++ = options_.sot_token;
  std::int32_t* end =
      out + shard.caption(index, variant, {out, static_cast<std::size_t>(limit - out) - 1});
  if (!options_.pad_captions) end = std::find(out, end, options_.eot_token);
  *end++ = options_.eot_token;
  if (!options_.pad_captions) return end;
  std::fill(end, limit, options_.pad_token);
  return limit;
}

void BatchReader::read_part(Slot& slot, std::size_t part) {
  Batch& batch = *slot.batch;
  const std::size_t end = std::min(batch.size, (part + 1) * kPartSamples);
  for (std::size_t i = part * kPartSamples; i < end && !stop_; ++i) {
    const auto image =
        batch.buffer.bytes().subspan(batch.begin[i], batch.begin[i + 1] - batch.begin[i]);
    slot.shard[i]->read_image(slot.place[i].index, image);
    const SampleRecord& record = slot.shard[i]->record(slot.place[i].index);
    const ImageHeader header = parse_image_header(image);
    if (header.reason != kNotBad || header.format != record.format ||
        header.width != record.width || header.height != record.height ||
        (options_.exif_rotation && header.orientation != record.orientation)) {
      batch.broken[i] = kHeaderChanged;
    } else {
      batch.broken[i] = find_damage(header, image);
    }
  }
}

}  // namespace laclip
