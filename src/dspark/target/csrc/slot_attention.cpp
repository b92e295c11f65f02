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
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

constexpr int64_t kKeys = 64;  // keys in one block of the running softmax
constexpr int64_t kLanes = 16;  // rows of queries that are worked on side by side
constexpr int64_t kAtOnce = 8;  // keys in flight at once; divides kKeys

template <typename C>
struct Problem {
  const int64_t* slots;      // [B, S]
  const int64_t* starts;     // [B]
  const int64_t* positions;  // [B, N]
  const bool* inside;        // [B, N, N] or null: chains
  int64_t num_slots, num_queries, window;  // window 0: none
  C scale, softcap;          // softcap 0: none
  const C* sinks;            // [H] or null
};

// The queries of one request: rows of q and of the output, and their places n within the span.
struct Rows {
  std::vector<int64_t> query, output, place;
};

inline bool sees(const int64_t* positions, const bool* inside, int64_t window, int64_t start, int64_t n, int64_t num_queries, int64_t key) {
  const int64_t within = key - start;
  if (within >= 0 && !(inside ? inside[n * num_queries + within] : within <= n)) return false;
  return window == 0 || positions[n] - (within < 0 ? key : positions[within]) < window;
}

// Sixteen rows of queries side by side: one vector register of floats.
template <typename C>
struct LanesOf {
  typedef C type __attribute__((vector_size(kLanes * sizeof(C)), aligned(alignof(C)), may_alias));
};
template <typename C>
using Lanes = typename LanesOf<C>::type;

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

template <typename S, typename C>
inline void widen(const S* from, C* to, int64_t size) {
  for (int64_t d = 0; d < size; ++d) to[d] = static_cast<C>(from[d]);
}

// scores [count, lanes] = key [count, size] times query [size, lanes], added up in the order of `size` in every lane.
// count is a multiple of kAtOnce.
template <typename C>
inline void score(const C* key, const Lanes<C>* query, Lanes<C>* scores, int64_t count, int64_t size) {
  for (int64_t j = 0; j < count; j += kAtOnce) {
    Lanes<C> sums[kAtOnce] = {};
    for (int64_t d = 0; d < size; ++d)
      for (int64_t i = 0; i < kAtOnce; ++i) sums[i] += key[(j + i) * size + d] * query[d];
    for (int64_t i = 0; i < kAtOnce; ++i) scores[j + i] = sums[i];
  }
}

// sum [size] += one lane of the weights [count, lanes] times value [count, size], a strip of registers at a time.
template <typename C>
inline void mix(const Lanes<C>* weights, int64_t lane, const C* value, C* sum, int64_t count, int64_t size) {
  constexpr int64_t kStrip = 4 * kLanes;
  const C* weight = reinterpret_cast<const C*>(weights) + lane;
  int64_t d = 0;
  for (; d + kStrip <= size; d += kStrip) {
    Lanes<C>* strip = reinterpret_cast<Lanes<C>*>(sum + d);
    Lanes<C> s0 = strip[0], s1 = strip[1], s2 = strip[2], s3 = strip[3];
    for (int64_t j = 0; j < count; ++j) {
      const Lanes<C>* v = reinterpret_cast<const Lanes<C>*>(value + j * size + d);
      const C w = weight[j * kLanes];
      s0 += w * v[0], s1 += w * v[1], s2 += w * v[2], s3 += w * v[3];
    }
    strip[0] = s0, strip[1] = s1, strip[2] = s2, strip[3] = s3;
  }
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = d; i < size; ++i) sum[i] += weight[j * kLanes] * value[j * size + i];
}

// All heads that share one key head, for one request: rows of queries in tiles of kLanes.
template <typename S, typename C>
void attend(
    const Problem<C>& p, const Rows& rows, int64_t b, int64_t kv_head, int64_t group, int64_t num_heads, int64_t num_kv,
    int64_t width, int64_t value_width, const S* query, const S* keys, const S* values, S* output) {
  const int64_t num_rows = static_cast<int64_t>(rows.query.size()) * group, num_tiles = (num_rows + kLanes - 1) / kLanes;
  const int64_t start = p.starts[b], num_keys = start + static_cast<int64_t>(rows.query.size());
  const int64_t* slots = p.slots + b * p.num_slots;
  const int64_t* positions = p.positions + b * p.num_queries;
  const bool* inside = p.inside ? p.inside + b * p.num_queries * p.num_queries : nullptr;
  const C lowest = -std::numeric_limits<C>::infinity();

  static thread_local std::vector<Lanes<C>> q, top, mass, weights(kKeys);
  static thread_local std::vector<C> mixed, key, value;
  q.resize(num_tiles * width), top.resize(num_tiles), mass.resize(num_tiles);
  mixed.assign(num_rows * value_width, C(0)), key.resize(kKeys * width), value.resize(kKeys * value_width);
  for (int64_t r = 0; r < num_tiles * kLanes; ++r) {
    const int64_t tile = r / kLanes, lane = r % kLanes, head = kv_head * group + r % group;
    top[tile][lane] = p.sinks && r < num_rows ? p.sinks[head] : lowest;
    mass[tile][lane] = p.sinks ? C(1) : C(0);
    if (r >= num_rows) continue;
    const S* own = query + (rows.query[r / group] * num_heads + head) * width;
    for (int64_t d = 0; d < width; ++d) q[tile * width + d][lane] = static_cast<C>(own[d]) * p.scale;
  }
  int64_t first = 0;
  if (p.window > 0) {  // whole blocks that no query sees; block boundaries stay where they are
    const int64_t oldest = *std::min_element(positions, positions + rows.query.size());
    first = std::max<int64_t>(0, std::min(start, oldest - p.window + 1)) / kKeys * kKeys;
  }
  for (; first < num_keys; first += kKeys) {
    const int64_t count = std::min(kKeys, num_keys - first), padded = (count + kAtOnce - 1) / kAtOnce * kAtOnce;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t row = slots[first + j] * num_kv + kv_head;
      const int64_t ahead = slots[std::min(first + j + kAtOnce, num_keys - 1)] * num_kv + kv_head;
      for (int64_t d = 0; d < width; d += 64 / sizeof(S)) __builtin_prefetch(keys + ahead * width + d);
      for (int64_t d = 0; d < value_width; d += 64 / sizeof(S)) __builtin_prefetch(values + ahead * value_width + d);
      widen(keys + row * width, &key[j * width], width);
      widen(values + row * value_width, &value[j * value_width], value_width);
    }
    const bool is_plain = p.window == 0 && first + count <= start;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      score(key.data(), &q[tile * width], weights.data(), padded, width);
      const int64_t in_tile = std::min(kLanes, num_rows - tile * kLanes);
      Lanes<C> highest = top[tile];
      for (int64_t j = 0; j < count; ++j) {
        if (p.softcap > 0)
          for (int64_t l = 0; l < in_tile; ++l) weights[j][l] = std::tanh(weights[j][l] / p.softcap) * p.softcap;
        if (!is_plain && (p.window > 0 || first + j >= start))
          for (int64_t l = 0; l < in_tile; ++l)
            if (!sees(positions, inside, p.window, start, rows.place[(tile * kLanes + l) / group], p.num_queries, first + j))
              weights[j][l] = lowest;
        highest = weights[j] > highest ? weights[j] : highest;
      }
      const Lanes<C> finite = highest > lowest ? highest : Lanes<C>{};  // a row that sees nothing yet
      const Lanes<C> shrink = power(top[tile] - finite);
      top[tile] = highest;
      mass[tile] *= shrink;
      for (int64_t j = 0; j < count; ++j) {
        weights[j] = power(weights[j] - finite);
        mass[tile] += weights[j];
      }
      for (int64_t l = 0; l < in_tile; ++l) {
        C* sum = &mixed[(tile * kLanes + l) * value_width];
        if (shrink[l] != C(1))
          for (int64_t d = 0; d < value_width; ++d) sum[d] *= shrink[l];
        mix(weights.data(), l, value.data(), sum, count, value_width);
      }
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    S* out = output + (rows.output[r / group] * num_heads + kv_head * group + r % group) * value_width;
    const C total = mass[r / kLanes][r % kLanes];
    for (int64_t d = 0; d < value_width; ++d) out[d] = static_cast<S>(mixed[r * value_width + d] / total);
  }
}

template <typename S, typename C>
void run(
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& output, Problem<C> p,
    const std::vector<Rows>& rows) {
  const int64_t num_kv = keys.size(1), num_heads = query.size(1), width = query.size(2), value_width = values.size(2);
  const int64_t units = static_cast<int64_t>(rows.size()) * num_kv;
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit)
      attend<S, C>(
          p, rows[unit / num_kv], unit / num_kv, unit % num_kv, num_heads / num_kv, num_heads, num_kv, width, value_width,
          query.const_data_ptr<S>(), keys.const_data_ptr<S>(), values.const_data_ptr<S>(), output.mutable_data_ptr<S>());
  });
}

template <typename C>
Problem<C> problem(
    const at::Tensor& slots, const at::Tensor& starts, const at::Tensor& positions, const std::optional<at::Tensor>& inside,
    double scale, int64_t window, double softcap, const std::optional<at::Tensor>& sinks) {
  return {
      slots.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(),
      inside ? inside->const_data_ptr<bool>() : nullptr, slots.size(1), positions.size(1), window,
      static_cast<C>(scale), static_cast<C>(softcap), sinks ? sinks->const_data_ptr<C>() : nullptr};
}

// query [T, H, D], keys [N, KV, D], values [N, KV, Dv] -> [T', H, Dv]; the rest as in plan.Group and plan.Visibility.
at::Tensor attend_slots(
    const at::Tensor& query_, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& slots_,
    const at::Tensor& starts_, const at::Tensor& positions_, const std::optional<at::Tensor>& inside_,
    const std::optional<at::Tensor>& rows_, const std::optional<at::Tensor>& back_, double scale, int64_t window,
    double softcap, const std::optional<at::Tensor>& sinks_) {
  const at::Tensor query = query_.contiguous(), slots = slots_.contiguous(), starts = starts_.contiguous();
  const at::Tensor positions = positions_.contiguous();
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous(), "keys and values are rows of slots");
  TORCH_CHECK(keys.scalar_type() == query.scalar_type() && values.scalar_type() == query.scalar_type(), "one dtype");
  std::optional<at::Tensor> inside, sinks;
  if (inside_) inside = inside_->contiguous();
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
    run<double, double>(query, keys, values, output, problem<double>(slots, starts, positions, inside, scale, window, softcap, sinks), rows);
    return output;
  }
  const auto p = problem<float>(slots, starts, positions, inside, scale, window, softcap, sinks);
  switch (query.scalar_type()) {
    case at::kFloat: run<float, float>(query, keys, values, output, p, rows); break;
    case at::kBFloat16: run<at::BFloat16, float>(query, keys, values, output, p, rows); break;
    case at::kHalf: run<at::Half, float>(query, keys, values, output, p, rows); break;
    default: TORCH_CHECK(false, "attend_slots takes float64, float32, bfloat16 and float16");
  }
  return output;
}

}  // namespace

TORCH_LIBRARY(dspark, library) {
  library.def(
      "attend_slots(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor starts, Tensor positions, "
      "Tensor? inside, Tensor? rows, Tensor? back, float scale, int window, float softcap, Tensor? sinks) -> Tensor");
}

TORCH_LIBRARY_IMPL(dspark, CPU, library) { library.impl("attend_slots", &attend_slots); }

// No gradient is ever asked for: without this, every call is looked at for one.
TORCH_LIBRARY_IMPL(dspark, Autograd, library) { library.impl("attend_slots", torch::CppFunction::makeFallthrough()); }
