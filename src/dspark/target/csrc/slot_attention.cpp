// Attention of short spans over slots, on CPU. Keys and values are read where they lie: gathering them first costs more
// than the attention itself once several requests decode together.
//
// A row's result depends on its own keys in their own order alone, never on what else is in the batch: the same bits
// whether a token is decoded by itself, verified in a draft, or beside thirty other requests.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace dspark {
// Whether bfloat16 is multiplied in pairs. Intel's processors multiply four floats while one such instruction keeps them
// busy, AMD's only one.
#ifdef __AVX512BF16__
std::atomic<bool> in_pairs = !__builtin_cpu_is("intel");
#else
std::atomic<bool> in_pairs = false;  // there is no such instruction
#endif
}

namespace {

constexpr int64_t kKeys = 64;   // keys in one block of the running softmax
constexpr int64_t kLanes = 16;  // of them side by side in one register
constexpr int64_t kMoment = 20000;  // nanoseconds of work worth another thread: waiting for each other takes several thousand

template <typename C>
struct Problem {
  const int64_t* slots;      // [B, S]
  const int64_t* starts;     // [B]
  const int64_t* positions;  // [B, N]
  const bool* inside;        // [B, N, N] or null: chains
  int64_t num_slots, num_queries, window;  // window 0: none
  C scale, softcap;          // softcap 0: none
  const C* sinks;            // [H] or null
  const int64_t* firsts;     // [B] or null: no key is left out
};

// The queries of one request: rows of q and of the output, and their places n within the span.
struct Rows {
  std::vector<int64_t> query, output, place;
};

// The cached keys of one request: `first` from its beginning, then `hidden` that were left out, then the rest.
struct Cached {
  int64_t start, first, hidden;
  int64_t position(int64_t key) const { return key < first ? key : key + hidden; }
};

inline bool sees(const int64_t* positions, const bool* inside, int64_t window, const Cached& cached, int64_t n, int64_t num_queries, int64_t key) {
  const int64_t within = key - cached.start;
  if (within >= 0 && !(inside ? inside[n * num_queries + within] : within <= n)) return false;
  return window == 0 || positions[n] - (within < 0 ? cached.position(key) : positions[within]) < window;
}

template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

// exp of x <= 0, lane by lane; -inf gives 0. The float form is good to about 1e-7.
inline Lanes<double> power(Lanes<double> x) {
  for (int64_t l = 0; l < kLanes; ++l) x[l] = std::exp(x[l]);
  return x;
}

inline Lanes<float> power(Lanes<float> x) {
  typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
  const Lanes<float> zero = {};
  const Lanes<float> bounded = x > -87.0f ? x : zero - 87.0f;
  const Lanes<float> n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Lanes<float> f = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes<float> y = f * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.0f;
  const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  Lanes<float> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x > -87.0f ? y * scale : zero;
}

// Lane l of the result is lane l + kBy.
template <size_t kBy, typename V, size_t... L>
inline V turned(V x, std::index_sequence<L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, ((L + kBy) % kLanes)...);
#else
  typedef Lanes<std::conditional_t<sizeof(V) == kLanes * sizeof(int32_t), int32_t, int64_t>> Places;
  return __builtin_shuffle(x, Places{((L + kBy) % kLanes)...});
#endif
}

// All lanes in one, by halves.
template <typename V, typename Both>
inline auto across(V x, Both both) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  x = both(x, turned<8>(x, lanes)), x = both(x, turned<4>(x, lanes));
  x = both(x, turned<2>(x, lanes)), x = both(x, turned<1>(x, lanes));
  return x[0];
}

template <typename S, typename C>
inline void widen(const S* from, C* to, int64_t size) {
  for (int64_t d = 0; d < size; ++d) to[d] = static_cast<C>(from[d]);
}

// What queries and keys are multiplied as: numbers of C, or pairs of bfloat16 where the processor takes them as they lie.
template <typename S, typename C>
struct Factors {
  typedef C Word, Query;
  static constexpr int64_t kPerWord = 1;
  static constexpr bool kAsTheyLie = std::is_same_v<S, C>;
  static void read(const S* from, Word* to, int64_t width) { widen(from, to, width); }
  static void read_query(const S* from, Query* to, int64_t width) { widen(from, to, width); }
  static Lanes<C> add(Lanes<C> sums, const Query& query, Lanes<Word> keys) { return sums + query * keys; }
};

#ifdef __AVX512BF16__
template <>
struct Factors<at::BFloat16, float> {
  typedef int32_t Word, Query;
  static constexpr int64_t kPerWord = 2;
  static constexpr bool kAsTheyLie = true;
  static void read(const at::BFloat16* from, Word* to, int64_t width) { std::memcpy(to, from, width * sizeof *from); }
  static void read_query(const at::BFloat16* from, Query* to, int64_t width) { read(from, to, width); }
  static Lanes<float> add(Lanes<float> sums, const Query& query, Lanes<Word> keys) {
    return (Lanes<float>)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(query), (__m512bh)keys);
  }
};

// The same, multiplied as floats.
struct OneByOne : Factors<at::BFloat16, float> {
  struct Query { float first, second; };
  static void read_query(const at::BFloat16* from, Query* to, int64_t width) { widen(from, &to->first, width); }
  static Lanes<float> add(Lanes<float> sums, const Query& query, Lanes<Word> keys) {
    const Lanes<float> first = (Lanes<float>)(keys << 16), second = (Lanes<float>)(keys & ~0xffff);
    return (Lanes<float>)_mm512_fmadd_ps(
        _mm512_set1_ps(query.second), (__m512)second,
        _mm512_fmadd_ps(_mm512_set1_ps(query.first), (__m512)first, (__m512)sums));
  }
};
#endif

// Of two rows that differ in one bit of their number, swap what differs in that bit of the lane.
template <size_t kBit, typename V, size_t... L>
inline void exchange(V& a, V& b, std::index_sequence<L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const V low = __builtin_shufflevector(a, b, (L & kBit ? L - kBit + kLanes : L)...);
  const V high = __builtin_shufflevector(a, b, (L & kBit ? L + kLanes : L + kBit)...);
#else
  typedef Lanes<std::conditional_t<sizeof(V) == kLanes * sizeof(int32_t), int32_t, int64_t>> Places;
  const V low = __builtin_shuffle(a, b, Places{(L & kBit ? L - kBit + kLanes : L)...});
  const V high = __builtin_shuffle(a, b, Places{(L & kBit ? L + kLanes : L + kBit)...});
#endif
  a = low, b = high;
}

template <size_t kBit, typename V>
inline void exchange_all(V* rows) {
  for (size_t i = 0; i < kLanes; ++i)
    if (!(i & kBit)) exchange<kBit>(rows[i], rows[i | kBit], std::make_index_sequence<kLanes>());
}

// kLanes rows of words -> to [words, kKeys], the rows side by side; words is a multiple of kLanes.
template <typename W>
inline void transpose(const W* const* rows, W* to, int64_t words) {
  for (int64_t first = 0; first < words; first += kLanes) {
    Lanes<W> x[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) std::memcpy(&x[i], rows[i] + first, sizeof x[i]);
    exchange_all<1>(x), exchange_all<2>(x), exchange_all<4>(x), exchange_all<8>(x);
    for (int64_t i = 0; i < kLanes; ++i) std::memcpy(to + (first + i) * kKeys, &x[i], sizeof x[i]);
  }
}

// scores [R, kKeys] of queries [R, words] with keys [words, kKeys]: each a sum over the words in their order.
template <typename F, typename C, int R, int kGroups>
inline void score(const typename F::Query* queries, const typename F::Word* keys, C* scores, int64_t words) {
  Lanes<C> sums[R][kGroups] = {};
  for (int64_t w = 0; w < words; ++w) {
    const auto* own = reinterpret_cast<const Lanes<typename F::Word>*>(keys + w * kKeys);
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < kGroups; ++g) sums[r][g] = F::add(sums[r][g], queries[r * words + w], own[g]);
  }
  for (int r = 0; r < R; ++r) std::memcpy(scores + r * kKeys, sums[r], sizeof sums[r]);
}

template <typename F, typename C, int R>
inline void score(const typename F::Query* queries, const typename F::Word* keys, C* scores, int64_t words, int64_t count) {
  if (count > kKeys / 2) return score<F, C, R, kKeys / kLanes>(queries, keys, scores, words);
  score<F, C, R, kKeys / kLanes / 2>(queries, keys, scores, words);
}

// Scores [kKeys] of one row, of which `count` count, into weights; by how much what came before them shrinks.
template <typename C>
inline C soften(C* scores, int64_t count, C& top, C& mass) {
  const C lowest = -std::numeric_limits<C>::infinity();
  std::fill(scores + count, scores + kKeys, lowest);
  Lanes<C>* own = reinterpret_cast<Lanes<C>*>(scores);
  Lanes<C> most = own[0];
  for (int64_t g = 1; g < kKeys / kLanes; ++g) most = own[g] > most ? own[g] : most;
  const C highest = std::max(top, across(most, [](Lanes<C> x, Lanes<C> y) { return x > y ? x : y; }));
  const C finite = highest > lowest ? highest : C(0);  // a row that sees nothing yet
  const C shrink = highest == top ? C(1) : power(Lanes<C>{} + (top - finite))[0];  // mostly the highest came earlier
  Lanes<C> sums = {};
  for (int64_t g = 0; g < kKeys / kLanes; ++g) sums += own[g] = power(own[g] - finite);
  top = highest;
  mass = mass * shrink + across(sums, [](Lanes<C> x, Lanes<C> y) { return x + y; });
  return shrink;
}

// sums [R, size] += weights [R, kKeys] times values [count, size], a strip of registers at a time.
template <typename C, int R, int kStrip>
inline void mix_strip(const C* weights, const C* values, C* sums, int64_t count, int64_t size) {
  Lanes<C> s[R][kStrip];
  for (int r = 0; r < R; ++r) std::memcpy(s[r], sums + r * size, sizeof s[r]);
  for (int64_t j = 0; j < count; ++j) {
    const Lanes<C>* v = reinterpret_cast<const Lanes<C>*>(values + j * size);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kStrip; ++i) s[r][i] += weights[r * kKeys + j] * v[i];
  }
  for (int r = 0; r < R; ++r) std::memcpy(sums + r * size, s[r], sizeof s[r]);
}

template <typename C, int R>
inline void mix(const C* weights, const C* values, C* sums, int64_t count, int64_t size) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes) mix_strip<C, R, 4>(weights, values + d, sums + d, count, size);
  for (; d < size; d += kLanes) mix_strip<C, R, 1>(weights, values + d, sums + d, count, size);
}

// As many rows at once as registers hold: call(first row, their number as a constant).
template <typename Call>
inline void by_fours(int64_t num_rows, Call call) {
  int64_t r = 0;
  for (; r + 4 <= num_rows; r += 4) call(r, std::integral_constant<int, 4>());
  if (r + 2 <= num_rows) call(r, std::integral_constant<int, 2>()), r += 2;
  if (r < num_rows) call(r, std::integral_constant<int, 1>());
}

inline int64_t in_lanes(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// All heads that share one key head, for one request.
template <typename S, typename C, typename F>
void attend(
    const Problem<C>& p, const Rows& rows, int64_t b, int64_t kv_head, int64_t group, int64_t num_heads, int64_t num_kv,
    int64_t width, int64_t value_width, const S* query, const S* keys, const S* values, S* output) {
  typedef typename F::Word W;
  const int64_t num_rows = static_cast<int64_t>(rows.query.size()) * group;
  const int64_t start = p.starts[b], num_keys = start + static_cast<int64_t>(rows.query.size());
  const int64_t words = in_lanes((width + F::kPerWord - 1) / F::kPerWord), size = in_lanes(value_width);
  const int64_t* slots = p.slots + b * p.num_slots;
  const int64_t* positions = p.positions + b * p.num_queries;
  const bool* inside = p.inside ? p.inside + b * p.num_queries * p.num_queries : nullptr;
  const Cached cached = p.firsts ? Cached{start, p.firsts[b], positions[0] - start} : Cached{start, 0, 0};
  const C lowest = -std::numeric_limits<C>::infinity();

  static thread_local std::vector<typename F::Query> queries;
  static thread_local std::vector<W> sixteen, key;
  static thread_local std::vector<C> top, mass, weights, mixed, value;
  queries.assign(num_rows * words, typename F::Query{}), sixteen.assign(kLanes * words, W(0)), key.resize(words * kKeys);
  top.resize(num_rows), mass.resize(num_rows), weights.resize(num_rows * kKeys);
  mixed.assign(num_rows * size, C(0)), value.resize(kKeys * size);
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t head = kv_head * group + r % group;
    F::read_query(query + (rows.query[r / group] * num_heads + head) * width, &queries[r * words], width);
    top[r] = p.sinks ? p.sinks[head] : lowest, mass[r] = p.sinks ? C(1) : C(0);
  }
  int64_t first = 0;
  if (p.window > 0) {  // whole blocks that no query sees; block boundaries stay where they are
    const int64_t oldest = *std::min_element(positions, positions + rows.query.size());
    first = std::max<int64_t>(0, std::min(start, oldest - p.window + 1 - cached.hidden)) / kKeys * kKeys;
  }
  for (; first < num_keys; first += kKeys) {
    const int64_t count = std::min(kKeys, num_keys - first);
    const W* own[kLanes];
    for (int64_t j = 0; j < in_lanes(count); ++j) {
      const int64_t row = slots[first + std::min(j, count - 1)] * num_kv + kv_head;
      const int64_t ahead = slots[std::min(first + j + kLanes, num_keys - 1)] * num_kv + kv_head;
      for (int64_t d = 0; d < width; d += 64 / sizeof(S)) __builtin_prefetch(keys + ahead * width + d);
      for (int64_t d = 0; d < value_width; d += 64 / sizeof(S)) __builtin_prefetch(values + ahead * value_width + d);
      if (F::kAsTheyLie && words * F::kPerWord == width) {
        own[j % kLanes] = reinterpret_cast<const W*>(keys + row * width);
      } else {
        F::read(keys + row * width, &sixteen[j % kLanes * words], width);
        own[j % kLanes] = &sixteen[j % kLanes * words];
      }
      if (j < count) widen(values + row * value_width, &value[j * size], value_width);
      if (j % kLanes == kLanes - 1) transpose(own, &key[j / kLanes * kLanes], words);
    }
    by_fours(num_rows, [&](int64_t r, auto number) {
      score<F, C, number>(&queries[r * words], key.data(), &weights[r * kKeys], words, count);
    });
    const int64_t in_doubt = p.window > 0 ? 0 : std::clamp<int64_t>(start - first, 0, count);  // all see what is before
    for (int64_t r = 0; r < num_rows; ++r) {
      C* scores = &weights[r * kKeys];
      for (int64_t j = 0; j < kKeys; ++j) scores[j] *= p.scale;
      if (p.softcap > 0)
        for (int64_t j = 0; j < count; ++j) scores[j] = std::tanh(scores[j] / p.softcap) * p.softcap;
      for (int64_t j = in_doubt; j < count; ++j)
        if (!sees(positions, inside, p.window, cached, rows.place[r / group], p.num_queries, first + j)) scores[j] = lowest;
      const C shrink = soften(scores, count, top[r], mass[r]);
      if (shrink != C(1))
        for (int64_t d = 0; d < size; ++d) mixed[r * size + d] *= shrink;
    }
    by_fours(num_rows, [&](int64_t r, auto number) {
      mix<C, number>(&weights[r * kKeys], value.data(), &mixed[r * size], count, size);
    });
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    S* out = output + (rows.output[r / group] * num_heads + kv_head * group + r % group) * value_width;
    for (int64_t d = 0; d < value_width; ++d) out[d] = static_cast<S>(mixed[r * size + d] / mass[r]);
  }
}

template <typename S, typename C, typename F = Factors<S, C>>
void run(
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& output, Problem<C> p,
    const std::vector<Rows>& rows) {
  const int64_t num_kv = keys.size(1), num_heads = query.size(1), width = query.size(2), value_width = values.size(2);
  const int64_t units = static_cast<int64_t>(rows.size()) * num_kv;
  // About a microsecond for a block of keys, and a quarter for each row of queries.
  const int64_t longest = *std::max_element(p.starts, p.starts + rows.size()) + p.num_queries;
  const int64_t blocks = longest / kKeys + 1, queries = p.num_queries * (num_heads / num_kv);
  const int64_t nanoseconds = blocks * (1000 + 250 * queries);
  int64_t apart = units * 5 / 8 + 1;  // neighbours go to different threads: the later in a prompt, the more keys
  while (std::gcd(apart, units) > 1) ++apart;
  at::parallel_for(0, units, std::max<int64_t>(1, kMoment / nanoseconds), [&](int64_t begin, int64_t end) {
    for (int64_t turn = begin; turn < end; ++turn) {
      const int64_t unit = turn * apart % units;
      attend<S, C, F>(
          p, rows[unit / num_kv], unit / num_kv, unit % num_kv, num_heads / num_kv, num_heads, num_kv, width, value_width,
          query.const_data_ptr<S>(), keys.const_data_ptr<S>(), values.const_data_ptr<S>(), output.mutable_data_ptr<S>());
    }
  });
}

template <typename C>
Problem<C> problem(
    const at::Tensor& slots, const at::Tensor& starts, const at::Tensor& positions, const std::optional<at::Tensor>& inside,
    double scale, int64_t window, double softcap, const std::optional<at::Tensor>& sinks,
    const std::optional<at::Tensor>& firsts) {
  return {
      slots.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(),
      inside ? inside->const_data_ptr<bool>() : nullptr, slots.size(1), positions.size(1), window,
      static_cast<C>(scale), static_cast<C>(softcap), sinks ? sinks->const_data_ptr<C>() : nullptr,
      firsts ? firsts->const_data_ptr<int64_t>() : nullptr};
}

// query [T, H, D], keys [N, KV, D], values [N, KV, Dv] -> [T', H, Dv]; the rest as in plan.Group and plan.Visibility.
at::Tensor attend_slots(
    const at::Tensor& query_, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& slots_,
    const at::Tensor& starts_, const at::Tensor& positions_, const std::optional<at::Tensor>& inside_,
    const std::optional<at::Tensor>& rows_, const std::optional<at::Tensor>& back_, double scale, int64_t window,
    double softcap, const std::optional<at::Tensor>& sinks_, const std::optional<at::Tensor>& firsts_) {
  const at::Tensor query = query_.contiguous(), slots = slots_.contiguous(), starts = starts_.contiguous();
  const at::Tensor positions = positions_.contiguous();
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous(), "keys and values are rows of slots");
  TORCH_CHECK(keys.scalar_type() == query.scalar_type() && values.scalar_type() == query.scalar_type(), "one dtype");
  std::optional<at::Tensor> inside, sinks, firsts;
  if (inside_) inside = inside_->contiguous();
  if (firsts_) firsts = firsts_->contiguous();
  const int64_t batch = positions.size(0), num_queries = positions.size(1);
  const int64_t count = back_ ? back_->numel() : batch * num_queries;
  at::Tensor from, back;
  if (rows_) from = rows_->contiguous();
  if (back_) back = back_->contiguous();
  std::vector<Rows> rows(batch);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t padded = back_ ? back.const_data_ptr<int64_t>()[i] : i;
    Rows& own = rows[padded / num_queries];
    own.query.push_back(rows_ ? from.const_data_ptr<int64_t>()[padded] : padded);
    own.output.push_back(i);
    own.place.push_back(padded % num_queries);
  }
  at::Tensor output = at::detail::empty_cpu({count, query.size(1), values.size(2)}, query.scalar_type());
  const bool is_double = query.scalar_type() == at::kDouble;
  if (sinks_) sinks = sinks_->to(is_double ? at::kDouble : at::kFloat).contiguous();
  if (is_double) {
    run<double, double>(query, keys, values, output, problem<double>(slots, starts, positions, inside, scale, window, softcap, sinks, firsts), rows);
    return output;
  }
  const auto p = problem<float>(slots, starts, positions, inside, scale, window, softcap, sinks, firsts);
#ifdef __AVX512BF16__
  if (query.scalar_type() == at::kBFloat16 && !dspark::in_pairs) {
    run<at::BFloat16, float, OneByOne>(query, keys, values, output, p, rows);
    return output;
  }
#endif
  switch (query.scalar_type()) {
    case at::kFloat: run<float, float>(query, keys, values, output, p, rows); break;
    case at::kBFloat16: run<at::BFloat16, float>(query, keys, values, output, p, rows); break;
    case at::kHalf: run<at::Half, float>(query, keys, values, output, p, rows); break;
    default: TORCH_CHECK(false, "attend_slots takes float64, float32, bfloat16 and float16");
  }
  return output;
}

}  // namespace

// A changed schema needs a new name: torch.compile keeps graphs that call by name, and asks no more.
TORCH_LIBRARY(dspark, library) {
  library.def(
      "attend_slots(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor starts, Tensor positions, "
      "Tensor? inside, Tensor? rows, Tensor? back, float scale, int window, float softcap, Tensor? sinks, Tensor? firsts=None) -> "
      "Tensor");
  library.def("multiply_in_pairs(bool yes) -> bool", [](bool yes) { return dspark::in_pairs.exchange(yes); });
}

TORCH_LIBRARY_IMPL(dspark, CPU, library) { library.impl("attend_slots", &attend_slots); }

// No gradient is ever asked for: without this, every call is looked at for one.
TORCH_LIBRARY_IMPL(dspark, Autograd, library) { library.impl("attend_slots", torch::CppFunction::makeFallthrough()); }
