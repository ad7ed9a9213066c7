// Model-free drafts: what followed the same tokens before, with calibrated confidence.
//
// Every token of every sequence is counted as "what follows" each of its contexts, the last n tokens for a few orders n,
// once among the sequences of its group (the samples of one prompt, and that prompt) and once among all. A draft walks
// these counts: at each position it takes the continuation whose evidence has been right most often. How often evidence
// of each kind (order, count, agreement) was right is learned by comparing every draft with the tokens that were
// emitted, whether or not the draft was verified.
//
// Contexts are kept by a 64-bit hash in two generations of bounded size: when the young one is full it becomes the old
// one and the oldest counts are forgotten. A hash collision costs a wrong draft, which verification rejects.
//
// Plain C interface, called through ctypes by rollout/speculation/ngram.py. One index belongs to one thread.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

constexpr int kOrders[] = {2, 3, 5, 8, 12};
constexpr int kNumOrders = 5;
constexpr int kLongest = 12;
constexpr int kFirstSharedOrder = 1;  // between groups shorter contexts say too little
constexpr int kCountBins = 4;
constexpr int kAgreementBins = 4;
constexpr int kBins = 2 * kNumOrders * kCountBins * kAgreementBins;
constexpr float kForget = 1.0f / 512;  // weight of a new outcome once a bin has seen 512
constexpr uint64_t kSharedScope = 0x9E3779B97F4A7C15ull;

uint64_t mix(uint64_t x) {  // SplitMix64's finalizer (Steele, Lea, Flood 2014)
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

struct Context {
  uint64_t key = 0;  // 0: free
  int32_t next[2] = {0, 0};  // the two leading continuations
  uint16_t count[2] = {0, 0};
  uint16_t total = 0;
};

void count_next(Context& context, int32_t token) {
  if (context.total == UINT16_MAX) {
    context.total /= 2;
    context.count[0] /= 2;
    context.count[1] /= 2;
  }
  context.total++;
  if (context.count[0] && context.next[0] == token) {
    context.count[0]++;
  } else if (context.count[1] && context.next[1] == token) {
    if (++context.count[1] > context.count[0]) {
      std::swap(context.next[0], context.next[1]);
      std::swap(context.count[0], context.count[1]);
    }
  } else if (!context.count[0]) {
    context.next[0] = token;
    context.count[0] = 1;
  } else if (context.count[1] <= 1) {  // a new continuation replaces one that was counted once
    context.next[1] = token;
    context.count[1] = 1;
  }
}

// Open addressing with linear probing; grows to at most `capacity_limit` slots.
class Generation {
 public:
  explicit Generation(size_t capacity_limit) : limit_(capacity_limit), slots_(std::min<size_t>(1024, capacity_limit)) {}

  Context* find(uint64_t key) {
    for (size_t slot = key & (slots_.size() - 1);; slot = (slot + 1) & (slots_.size() - 1)) {
      if (slots_[slot].key == key) return &slots_[slot];
      if (slots_[slot].key == 0) return nullptr;
    }
  }

  // The context of `key`, new if need be; nullptr when the generation is full.
  Context* insert(uint64_t key) {
    if ((used_ + 1) * 4 > slots_.size() * 3 && !grow()) return nullptr;
    for (size_t slot = key & (slots_.size() - 1);; slot = (slot + 1) & (slots_.size() - 1)) {
      if (slots_[slot].key == key) return &slots_[slot];
      if (slots_[slot].key == 0) {
        slots_[slot].key = key;
        used_++;
        return &slots_[slot];
      }
    }
  }

  size_t bytes() const { return slots_.size() * sizeof(Context); }

 private:
  bool grow() {
    if (slots_.size() * 2 > limit_) return false;
    std::vector<Context> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Context& context : old) {
      if (context.key == 0) continue;
      size_t slot = context.key & (slots_.size() - 1);
      while (slots_[slot].key != 0) slot = (slot + 1) & (slots_.size() - 1);
      slots_[slot] = context;
    }
    return true;
  }

  size_t limit_, used_ = 0;
  std::vector<Context> slots_;
};

struct Guess {
  int32_t token;
  int16_t bin;
};

struct Sequence {
  uint64_t scope;
  std::vector<int32_t> recent;  // the last tokens, at most 2 * kLongest
  std::vector<Guess> guesses;   // the running draft, for the tokens still to come
  size_t checked = 0;           // guesses already compared
};

struct Bin {
  float rate, seen;
};

class Index {
 public:
  explicit Index(int64_t max_bytes) {
    size_t capacity = 1024;
    while (capacity * 2 * 2 * sizeof(Context) <= static_cast<size_t>(max_bytes)) capacity *= 2;
    capacity_ = capacity;
    young_ = Generation(capacity);
    old_ = Generation(capacity);
    for (int bin = 0; bin < kBins; bin++) bins_[bin] = {prior(bin), 4.0f};
  }

  void start(int64_t id, int64_t group, const int32_t* prompt, int64_t length) {
    Sequence& sequence = sequences_[id];
    sequence = Sequence{mix(static_cast<uint64_t>(group) + 1), {}, {}, 0};
    const bool known = !prompts_.insert(sequence.scope).second;
    if (prompts_.size() > 1 << 16) prompts_.clear();  // at worst a prompt is counted twice
    for (int64_t i = 0; i < length; i++) extend(sequence, prompt[i], !known, false);
  }

  void append(int64_t id, const int32_t* tokens, int64_t length) {
    const auto found = sequences_.find(id);
    if (found == sequences_.end()) return;
    for (int64_t i = 0; i < length; i++) {
      compare(found->second, tokens[i]);
      extend(found->second, tokens[i], true, true);
    }
  }

  // Draft up to `limit` tokens; stops before the probability that all are right falls below `threshold`.
  int propose(int64_t id, int limit, float threshold, int32_t* tokens, float* probabilities) {
    const auto found = sequences_.find(id);
    if (found == sequences_.end()) return 0;
    Sequence& sequence = found->second;
    int32_t window[2 * kLongest];
    int length = static_cast<int>(std::min<size_t>(sequence.recent.size(), kLongest));
    std::copy(sequence.recent.end() - length, sequence.recent.end(), window);
    sequence.guesses.clear();
    sequence.checked = 0;
    float all_right = 1.0f;
    int count = 0;
    while (count < limit) {
      Guess guess;
      const float rate = best_guess(sequence.scope, window, length, guess);
      if (all_right * rate < threshold || rate <= 0.0f) break;
      all_right *= rate;
      tokens[count] = guess.token;
      probabilities[count] = all_right;
      sequence.guesses.push_back(guess);
      count++;
      if (length == 2 * kLongest) {
        std::copy(window + kLongest, window + length, window);
        length = kLongest;
      }
      window[length++] = guess.token;
    }
    return count;
  }

  void finish(int64_t id) { sequences_.erase(id); }
  size_t bytes() const { return young_.bytes() + old_.bytes(); }

 private:
  // Expected to be right: more for longer contexts, larger counts and agreement. Only where learning starts from.
  static float prior(int bin) {
    const int agreement = bin % kAgreementBins, counts = bin / kAgreementBins % kCountBins;
    return 0.1f + 0.15f * agreement + 0.05f * counts;
  }

  static int bin_of(bool shared, int order, const Context& context) {
    const int counts = context.total >= 8 ? 3 : context.total >= 4 ? 2 : context.total >= 2 ? 1 : 0;
    const float agreement = static_cast<float>(context.count[0]) / context.total;
    const int level = agreement >= 0.95f ? 3 : agreement >= 0.8f ? 2 : agreement >= 0.5f ? 1 : 0;
    return ((shared * kNumOrders + order) * kCountBins + counts) * kAgreementBins + level;
  }

  // Hashes of the last kOrders[i] tokens; returns for how many orders there are enough tokens.
  static int hash_contexts(const int32_t* tokens, int length, uint64_t* hashes) {
    uint64_t hash = 0;
    int order = 0;
    for (int back = 1; back <= std::min(length, kLongest); back++) {
      hash = hash * 0xD6E8FEB86659FD93ull + mix(static_cast<uint64_t>(static_cast<uint32_t>(tokens[length - back])) + 1);
      if (back == kOrders[order]) hashes[order++] = hash + static_cast<uint64_t>(back);
    }
    return order;
  }

  static uint64_t key_of(uint64_t scope, uint64_t hash) { return mix(hash ^ scope) | 1; }

  void extend(Sequence& sequence, int32_t token, bool count, bool shared) {
    if (count) {
      uint64_t hashes[kNumOrders];
      const int orders = hash_contexts(sequence.recent.data(), static_cast<int>(sequence.recent.size()), hashes);
      for (int order = 0; order < orders; order++) {
        record(key_of(sequence.scope, hashes[order]), token);
        if (shared && order >= kFirstSharedOrder) record(key_of(kSharedScope, hashes[order]), token);
      }
    }
    if (sequence.recent.size() == 2 * kLongest) sequence.recent.erase(sequence.recent.begin(), sequence.recent.begin() + kLongest);
    sequence.recent.push_back(token);
  }

  void record(uint64_t key, int32_t token) {
    Context* context = young_.find(key);
    if (!context) {
      const Context* before = old_.find(key);
      const Context seed = before ? *before : Context{};
      context = young_.insert(key);
      if (!context) {
        old_ = std::move(young_);
        young_ = Generation(capacity_);
        context = young_.insert(key);
      }
      if (before) *context = seed;
    }
    count_next(*context, token);
  }

  float best_guess(uint64_t scope, const int32_t* window, int length, Guess& guess) {
    uint64_t hashes[kNumOrders];
    const int orders = hash_contexts(window, length, hashes);
    float best = 0.0f;
    for (int order = orders - 1; order >= 0; order--) {
      for (int shared = 0; shared <= (order >= kFirstSharedOrder ? 1 : 0); shared++) {
        const uint64_t key = key_of(shared ? kSharedScope : scope, hashes[order]);
        const Context* context = young_.find(key);
        if (!context) context = old_.find(key);
        if (!context) continue;
        const int bin = bin_of(shared, order, *context);
        if (bins_[bin].rate > best) {
          best = bins_[bin].rate;
          guess = {context->next[0], static_cast<int16_t>(bin)};
        }
      }
    }
    return best;
  }

  // Learn from what was emitted instead of the next guess; after a wrong one the rest of the draft says nothing.
  void compare(Sequence& sequence, int32_t token) {
    if (sequence.checked == sequence.guesses.size()) return;
    const Guess guess = sequence.guesses[sequence.checked++];
    Bin& bin = bins_[guess.bin];
    bin.seen += 1.0f;
    const bool right = guess.token == token;
    bin.rate += ((right ? 1.0f : 0.0f) - bin.rate) * std::max(1.0f / bin.seen, kForget);
    if (!right) sequence.checked = sequence.guesses.size();
  }

  size_t capacity_;
  Generation young_{1024}, old_{1024};
  std::unordered_map<int64_t, Sequence> sequences_;
  std::unordered_set<uint64_t> prompts_;  // scopes whose prompt has been counted
  Bin bins_[kBins];
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void* ngram_create(int64_t max_bytes) { return new Index(max_bytes); }

EXPORT void ngram_destroy(void* index) { delete static_cast<Index*>(index); }

EXPORT void ngram_start(void* index, int64_t id, int64_t group, const int32_t* prompt, int64_t length) {
  static_cast<Index*>(index)->start(id, group, prompt, length);
}

// tokens of sequence ids[i]: tokens[ends[i - 1] .. ends[i]]
EXPORT void ngram_append(void* index, int64_t count, const int64_t* ids, const int32_t* tokens, const int64_t* ends) {
  int64_t begin = 0;
  for (int64_t i = 0; i < count; i++) {
    static_cast<Index*>(index)->append(ids[i], tokens + begin, ends[i] - begin);
    begin = ends[i];
  }
}

// Drafts for ids[i] of at most limits[i] <= width tokens: tokens and chances are [count, width], lengths [count].
// drafted[k] and accepted[k], [width + 1] each: draft tokens, and how many of them will be right, with at most k each.
EXPORT void ngram_propose(void* index, int64_t count, const int64_t* ids, const int32_t* limits, int64_t width,
                          float threshold, int32_t* tokens, float* chances, int32_t* lengths, double* drafted,
                          double* accepted) {
  std::fill(drafted, drafted + width + 1, 0.0);
  std::fill(accepted, accepted + width + 1, 0.0);
  for (int64_t i = 0; i < count; i++) {
    float* mine = chances + i * width;
    lengths[i] = static_cast<Index*>(index)->propose(ids[i], limits[i], threshold, tokens + i * width, mine);
    for (int position = 0; position < lengths[i]; position++) {
      drafted[position + 1] += 1.0;
      accepted[position + 1] += mine[position];
    }
  }
  for (int64_t k = 1; k <= width; k++) {
    drafted[k] += drafted[k - 1];
    accepted[k] += accepted[k - 1];
  }
}

EXPORT void ngram_finish(void* index, int64_t id) { static_cast<Index*>(index)->finish(id); }

EXPORT int64_t ngram_bytes(void* index) { return static_cast<int64_t>(static_cast<Index*>(index)->bytes()); }
