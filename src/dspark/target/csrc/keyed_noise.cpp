// The words of noise.py's Philox generator as numbers in (0, 1], and which score is the largest with noise on it: the same
// bits and tokens as tensors give there, several times sooner. Logarithms are left to torch, so that noise does not depend
// on whether this kernel is there.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16;  // counters that are worked on side by side
constexpr int64_t kMoment = 1 << 14;  // numbers worth another thread

struct Words {
  uint32_t w[4][kLanes];
};

#ifdef __AVX512F__
// x * m, high and low words of each lane. Compilers widen all lanes to 64 bits first, which takes five times as long.
inline void multiply(__m512i x, uint32_t m, __m512i& high, __m512i& low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int32_t>(m));
  const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
#endif

// Philox4x32-10 (Salmon et al., SC 2011) of the counters (first + lane, position, stream, 0).
inline void philox(Words& words, uint32_t first, uint32_t position, uint32_t stream, uint32_t k0, uint32_t k1) {
  auto& [a, b, c, d] = words.w;
  for (int64_t l = 0; l < kLanes; ++l) a[l] = first + static_cast<uint32_t>(l), b[l] = position, c[l] = stream, d[l] = 0;
#ifdef __AVX512F__
  __m512i va = _mm512_loadu_si512(a), vb = _mm512_loadu_si512(b), vc = _mm512_loadu_si512(c), vd = _mm512_loadu_si512(d);
  for (int round = 0; round < 10; ++round) {
    __m512i left_high, left_low, right_high, right_low;
    multiply(va, 0xD2511F53, left_high, left_low), multiply(vc, 0xCD9E8D57, right_high, right_low);
    va = _mm512_xor_si512(_mm512_xor_si512(right_high, vb), _mm512_set1_epi32(static_cast<int32_t>(k0)));
    vc = _mm512_xor_si512(_mm512_xor_si512(left_high, vd), _mm512_set1_epi32(static_cast<int32_t>(k1)));
    vb = right_low, vd = left_low;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  _mm512_storeu_si512(a, va), _mm512_storeu_si512(b, vb), _mm512_storeu_si512(c, vc), _mm512_storeu_si512(d, vd);
#else
  for (int round = 0; round < 10; ++round) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const uint64_t left = uint64_t{0xD2511F53} * a[l], right = uint64_t{0xCD9E8D57} * c[l];
      a[l] = static_cast<uint32_t>(right >> 32) ^ b[l] ^ k0;
      b[l] = static_cast<uint32_t>(right);
      c[l] = static_cast<uint32_t>(left >> 32) ^ d[l] ^ k1;
      d[l] = static_cast<uint32_t>(left);
    }
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
#endif
}

inline float number(uint32_t word) { return (static_cast<float>(word) + 0.5f) * 0x1p-32f; }

// A counter's four words side by side: written out, so that compilers turn it into shuffles of whole registers.
inline void number_all(const Words& words, float* __restrict to) {
  const auto& [a, b, c, d] = words.w;
  for (int64_t l = 0; l < kLanes; ++l) {
    to[4 * l] = number(a[l]);
    to[4 * l + 1] = number(b[l]);
    to[4 * l + 2] = number(c[l]);
    to[4 * l + 3] = number(d[l]);
  }
}

// Rows of so many numbers that are worth another thread.
inline int64_t grain(int64_t size) { return std::max<int64_t>(1, kMoment / std::max<int64_t>(1, size)); }

// [num_positions, vocab_size] float32: (word + 1/2) / 2^32, word v % 4 of the counter v / 4.
at::Tensor keyed_uniform(
    int64_t k0, int64_t k1, int64_t first_position, int64_t num_positions, int64_t vocab_size, int64_t stream) {
  at::Tensor output = at::empty({num_positions, vocab_size}, at::kFloat);
  float* numbers = output.mutable_data_ptr<float>();
  at::parallel_for(0, num_positions, grain(vocab_size), [&](int64_t begin, int64_t end) {
    Words words;
    for (int64_t p = begin; p < end; ++p) {
      float* row = numbers + p * vocab_size;
      for (int64_t start = 0; start < vocab_size; start += 4 * kLanes) {
        philox(words, static_cast<uint32_t>(start / 4), static_cast<uint32_t>(first_position + p),
               static_cast<uint32_t>(stream), static_cast<uint32_t>(k0), static_cast<uint32_t>(k1));
        const int64_t count = vocab_size - start;
        if (count >= 4 * kLanes)
          number_all(words, row + start);
        else
          for (int64_t v = 0; v < count; ++v) row[start + v] = number(words.w[v % 4][v / 4]);
      }
    }
  });
  return output;
}

typedef float Scores __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Places __attribute__((vector_size(kLanes * sizeof(int32_t))));

// The first of the largest; what is no number counts as larger than all numbers, as torch and numpy have it.
// kNoisy: of scores + heat * noise.
template <bool kNoisy>
int64_t largest_of(const float* scores, const float* noise, float heat, int64_t size) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Scores best = Scores{} + lowest;
  Places odd = {}, at, where;
  for (int32_t l = 0; l < kLanes; ++l) at[l] = l;
  where = at;
  const auto look = [&](const Scores& own, const Scores& added) {
    const Scores x = kNoisy ? own + heat * added : own;
    odd |= x != x;
    const Places more = x > best;
    best = more ? x : best, where = more ? at : where;
    at += static_cast<int32_t>(kLanes);
  };
  Scores own, added = {};
  int64_t v = 0;
  for (; v + kLanes <= size; v += kLanes) {
    std::memcpy(&own, scores + v, sizeof own);
    if constexpr (kNoisy) std::memcpy(&added, noise + v, sizeof added);
    look(own, added);
  }
  if (v < size) {
    own = Scores{} + lowest;
    std::memcpy(&own, scores + v, (size - v) * sizeof(float));
    if constexpr (kNoisy) std::memcpy(&added, noise + v, (size - v) * sizeof(float));
    look(own, added);
  }
  for (int64_t l = 0; l < kLanes; ++l)
    if (odd[l])  // rare enough to look for the first of them anew
      for (v = 0; v < size; ++v)
        if (std::isnan(kNoisy ? scores[v] + heat * noise[v] : scores[v])) return v;
  int64_t first = 0;
  for (int64_t l = 1; l < kLanes; ++l)
    if (best[l] > best[first] || (best[l] == best[first] && where[l] < where[first])) first = l;
  return where[first];
}

// scores [N, V] -> [N]: where scores + heats * noise are largest; noise [N, V] and heats [N, 1], or none.
at::Tensor largest(
    const at::Tensor& scores_, const std::optional<at::Tensor>& noise_, const std::optional<at::Tensor>& heats_) {
  TORCH_CHECK(scores_.scalar_type() == at::kFloat && scores_.dim() == 2, "scores must be float32 [N, V]");
  TORCH_CHECK(scores_.size(1) > 0, "there is no largest of nothing");
  TORCH_CHECK(noise_.has_value() == heats_.has_value(), "noise goes with heats");
  const at::Tensor scores = scores_.contiguous();
  const int64_t num_rows = scores.size(0), size = scores.size(1);
  at::Tensor noise, heats;
  if (noise_) {
    TORCH_CHECK(noise_->sizes() == scores.sizes() && noise_->scalar_type() == at::kFloat, "noise must be like scores");
    TORCH_CHECK(heats_->numel() == num_rows && heats_->scalar_type() == at::kFloat, "heats must be float32 [N, 1]");
    noise = noise_->contiguous(), heats = heats_->contiguous();
  }
  at::Tensor tokens = at::detail::empty_cpu({num_rows}, at::kLong);
  const float* from = scores.const_data_ptr<float>();
  const float* added = noise_ ? noise.const_data_ptr<float>() : nullptr;
  const float* heat = noise_ ? heats.const_data_ptr<float>() : nullptr;
  auto* to = tokens.mutable_data_ptr<int64_t>();
  at::parallel_for(0, num_rows, grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      to[r] = heat ? largest_of<true>(from + r * size, added + r * size, heat[r], size)
                   : largest_of<false>(from + r * size, nullptr, 0, size);
  });
  return tokens;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark, library) {
  library.def(
      "keyed_uniform(int k0, int k1, int first_position, int num_positions, int vocab_size, int stream) -> Tensor",
      &keyed_uniform);
  library.def("largest(Tensor scores, Tensor? noise, Tensor? heats) -> Tensor", &largest);
}
