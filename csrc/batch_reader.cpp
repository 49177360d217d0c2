#include "batch_reader.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "image_header.hpp"
#include "philox.hpp"

namespace laclip {
namespace {

constexpr std::size_t kPartSamples = 16;  // images that one worker reads at a time
constexpr int kCropTries = 10;            // as torchvision's RandomResizedCrop

PhiloxBlock draw(std::uint64_t seed, Stream stream, std::uint64_t sample, std::uint64_t epoch,
                 std::uint64_t number) {
  return philox({sample, epoch, static_cast<std::uint64_t>(stream), number}, seed, 0);
}

std::vector<std::uint64_t> counts_of(const std::vector<ShardFiles>& shards) {
  std::vector<std::uint64_t> counts;
  for (const ShardFiles& shard : shards) counts.push_back(shard.count);
  return counts;
}

}  // namespace

struct BatchReader::Slot {
  std::shared_ptr<Batch> batch = std::make_shared<Batch>();
  OpenShards opened;
  std::vector<SamplePlace> place;
  bool planned = false;
  std::size_t next_part = 0;
  std::size_t parts = 0;
  std::size_t parts_left = 0;
  std::exception_ptr error;
  bool done() const { return error != nullptr || (planned && parts_left == 0); }
};

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

std::shared_ptr<Batch> BatchReader::next() {
  std::shared_ptr<Slot> slot;
  {
    std::unique_lock lock(mutex_);
    wake_reader_.wait(lock, [this] { return !queue_.empty() && queue_.front()->done(); });
    slot = queue_.front();
    // A batch that failed stays at the front: asking again gives the same error.
    if (slot->error) std::rethrow_exception(slot->error);
    queue_.pop_front();
  }
  wake_workers_.notify_all();
  return slot->batch;
}

std::shared_ptr<Batch> BatchReader::read(std::uint64_t index) {
  Slot slot;
  slot.batch->index = index;
  plan(slot);
  for (std::size_t part = 0; part < slot.parts; ++part) read_part(slot, part);
  return slot.batch;
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
      slot = std::make_shared<Slot>();
      slot->batch->index = next_index_++;
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
      planning ? plan(*slot) : read_part(*slot, part);
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

const Shard& BatchReader::open(OpenShards& opened, std::uint32_t shard) {
  auto& entry = opened[shard];
  if (!entry) entry = cache_.open(shard);
  return *entry;
}

void BatchReader::plan(Slot& slot) {
  std::shared_ptr<const std::set<std::uint64_t>> bad;
  {
    const std::lock_guard lock(mutex_);
    bad = bad_;
  }
  Batch& batch = *slot.batch;
  const bool multi = options_.policy == CaptionPolicy::kMulti;
  batch.size = options_.global_batch_size / options_.world_size;
  batch.variants = multi ? cache_.files(0).variants : 1;
  const std::size_t size = batch.size;
  const std::size_t length = options_.context_length;
  batch.sample.resize(size);
  batch.epoch.resize(size);
  batch.variant.assign(size, 0);
  batch.begin.assign(size + 1, 0);
  batch.window.resize(4 * size);
  batch.mirror.resize(size);
  batch.token_ids.assign(batch.variants * size * length, options_.pad_token);
  slot.place.resize(size);
  const std::uint64_t first = batch.index * options_.global_batch_size + options_.rank * size;
  std::shared_ptr<const EpochOrder> order;
  std::uint64_t order_epoch = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const std::uint64_t epoch = (first + i) / samples();
    if (!order || order_epoch != epoch) {
      order = order_of(epoch);
      order_epoch = epoch;
    }
    SamplePlace place = order->at((first + i) % samples());
    const Shard& shard = open(slot.opened, place.shard);
    if (is_bad(shard, place, *bad)) {
      place = substitute(shard, batch.index, first + i, place, *bad);
      ++batch.substitutes;
    }
    const std::uint64_t sample = first_sample_[place.shard] + place.index;
    slot.place[i] = place;
    batch.sample[i] = sample;
    batch.epoch[i] = epoch;
    batch.begin[i + 1] = batch.begin[i] + shard.record(place.index).bytes;
    draw_window(shard.record(place.index), sample, epoch, &batch.window[4 * i], &batch.mirror[i]);
    if (multi) {
      for (std::uint32_t variant = 0; variant < batch.variants; ++variant) {
        write_caption(shard, place.index, variant, &batch.token_ids[(variant * size + i) * length]);
      }
    } else {
      const std::uint32_t variant = draw_variant(shard, place.index, sample, epoch);
      batch.variant[i] = static_cast<std::uint8_t>(variant);
      write_caption(shard, place.index, variant, &batch.token_ids[i * length]);
    }
  }
  batch.bytes.resize(batch.begin[size]);
  batch.broken.assign(size, 0);
  slot.parts = (size + kPartSamples - 1) / kPartSamples;
}

bool BatchReader::is_bad(const Shard& shard, SamplePlace place,
                         const std::set<std::uint64_t>& bad) const {
  const SampleRecord& record = shard.record(place.index);
  const std::uint64_t pixels = static_cast<std::uint64_t>(record.width) * record.height;
  return (record.flags & kBad) != 0 || pixels > options_.max_pixels ||
         (!bad.empty() && bad.contains(first_sample_[place.shard] + place.index));
}

// Another sample of the same shard that stands nowhere else in the same global batch. The bad
// samples of the shard in this batch are served in the order of their positions, so that no two
// get the same one, whichever rank asks.
SamplePlace BatchReader::substitute(const Shard& shard, std::uint64_t batch, std::uint64_t position,
                                    SamplePlace place, const std::set<std::uint64_t>& bad) {
  const std::uint64_t first = batch * options_.global_batch_size;
  std::set<std::uint32_t> taken;
  std::vector<std::pair<std::uint64_t, std::uint32_t>> bad_here;  // position, index in the shard
  for (std::uint64_t at = first; at < first + options_.global_batch_size; ++at) {
    const SamplePlace other = order_of(at / samples())->at(at % samples());
    if (other.shard != place.shard) continue;
    taken.insert(other.index);
    if (at <= position && is_bad(shard, other, bad)) bad_here.emplace_back(at, other.index);
  }
  const std::uint64_t count = counts_[place.shard];
  SamplePlace found = place;
  for (const auto& [at, index] : bad_here) {
    const std::uint64_t sample = first_sample_[place.shard] + index;
    const PhiloxBlock key = draw(options_.seed, Stream::kSubstitute, sample, at / samples(), 0);
    const KeyedBijection order(count, key[0], key[1]);
    bool done = false;
    for (std::uint64_t i = 0; i < count && !done; ++i) {
      found.index = static_cast<std::uint32_t>(order(i));
      done = !taken.contains(found.index) && !is_bad(shard, found, bad);
    }
    if (!done) {
      throw std::runtime_error(
          "'" + cache_.files(place.shard).tar + "' sample " + std::string(shard.key(index)) +
          " is bad, and every other sample of the shard is bad too or stands in the same batch: "
          "use a smaller batch or larger shards, or remove the shard");
    }
    taken.insert(found.index);
  }
  return found;
}

std::uint32_t BatchReader::draw_variant(const Shard& shard, std::uint32_t index,
                                        std::uint64_t sample, std::uint64_t epoch) const {
  const std::uint32_t variants = shard.variants();
  if (variants == 1 || options_.policy == CaptionPolicy::kOriginal) return 0;
  const std::uint64_t word = draw(options_.seed, Stream::kCaption, sample, epoch, 0)[0];
  std::uint32_t variant = 0;
  if (options_.policy == CaptionPolicy::kWeights) {
    double total = 0;
    for (double weight : options_.weights) total += weight;
    double left = to_unit(word) * total;
    while (variant + 1 < variants && left >= options_.weights[variant]) {
      left -= options_.weights[variant++];
    }
  } else {
    variant = static_cast<std::uint32_t>(to_below(word, variants));
  }
  const std::uint32_t flags = shard.caption_entry(index, variant);
  return (flags & (kCaptionMissing | kCaptionShort)) != 0 ? 0 : variant;
}

// The crop of torchvision's RandomResizedCrop (v0.26), from counter-based numbers.
void BatchReader::draw_window(const SampleRecord& record, std::uint64_t sample, std::uint64_t epoch,
                              std::int32_t* window, std::uint8_t* mirror) const {
  const double width = record.width;
  const double height = record.height;
  const double log_low = std::log(options_.ratio_low);
  const double log_high = std::log(options_.ratio_high);
  const auto put = [&](double w, double h, std::uint64_t x_word, std::uint64_t y_word) {
    const auto columns = static_cast<std::uint64_t>(w);
    const auto rows = static_cast<std::uint64_t>(h);
    window[0] = static_cast<std::int32_t>(to_below(x_word, record.width - columns + 1));
    window[1] = static_cast<std::int32_t>(to_below(y_word, record.height - rows + 1));
    window[2] = static_cast<std::int32_t>(columns);
    window[3] = static_cast<std::int32_t>(rows);
  };
  *mirror = 0;
  if (options_.flip) {
    *mirror = static_cast<std::uint8_t>(
        draw(options_.seed, Stream::kCrop, sample, epoch, kCropTries)[0] >> 63);
  }
  for (std::uint64_t attempt = 0; attempt < kCropTries; ++attempt) {
    const PhiloxBlock words = draw(options_.seed, Stream::kCrop, sample, epoch, attempt);
    const double share =
        options_.scale_low + to_unit(words[0]) * (options_.scale_high - options_.scale_low);
    const double ratio = std::exp(log_low + to_unit(words[1]) * (log_high - log_low));
    const double w = std::round(std::sqrt(width * height * share * ratio));
    const double h = std::round(std::sqrt(width * height * share / ratio));
    if (w >= 1 && w <= width && h >= 1 && h <= height) {
      put(w, h, words[2], words[3]);
      return;
    }
  }
  double w = width;
  double h = height;
  if (width / height < options_.ratio_low) h = std::round(w / options_.ratio_low);
  if (width / height > options_.ratio_high) w = std::round(h * options_.ratio_high);
  w = std::clamp(w, 1.0, width);
  h = std::clamp(h, 1.0, height);
  window[0] = static_cast<std::int32_t>((width - w) / 2);
  window[1] = static_cast<std::int32_t>((height - h) / 2);
  window[2] = static_cast<std::int32_t>(w);
  window[3] = static_cast<std::int32_t>(h);
}

// Start of text, the caption cut to fit, end of text; the rest of the row is padding already.
void BatchReader::write_caption(const Shard& shard, std::uint32_t index, std::uint32_t variant,
                                std::int32_t* out) const {
  const std::uint32_t flags = shard.caption_entry(index, variant);
  if ((flags & (kCaptionMissing | kCaptionShort)) != 0) variant = 0;
  const std::size_t begin = options_.sot_token < 0 ? 0 : 1;
  if (begin == 1) out[0] = options_.sot_token;
  const std::size_t taken =
      shard.caption(index, variant, {out + begin, options_.context_length - begin - 1});
  out[begin + taken] = options_.eot_token;
}

void BatchReader::read_part(Slot& slot, std::size_t part) {
  Batch& batch = *slot.batch;
  const std::size_t end = std::min(batch.size, (part + 1) * kPartSamples);
  for (std::size_t i = part * kPartSamples; i < end; ++i) {
    const Shard& shard = *slot.opened.at(slot.place[i].shard);
    const auto image =
        std::span(batch.bytes).subspan(batch.begin[i], batch.begin[i + 1] - batch.begin[i]);
    shard.read_image(slot.place[i].index, image);
    const SampleRecord& record = shard.record(slot.place[i].index);
    const ImageHeader header = parse_image_header(image);
    batch.broken[i] = header.reason != kNotBad || header.format != record.format ||
                      header.width != record.width || header.height != record.height;
  }
}

}  // namespace laclip
