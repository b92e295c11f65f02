// The words of noise.py's Philox generator as numbers in (0, 1]: the same bits as the tensors there give, several times
// sooner. Logarithms are left to torch, so that noise does not depend on whether this kernel is there.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16;  // counters that are worked on side by side

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

// [num_positions, vocab_size] float32: (word + 1/2) / 2^32, word v % 4 of the counter v / 4.
at::Tensor keyed_uniform(
    int64_t k0, int64_t k1, int64_t first_position, int64_t num_positions, int64_t vocab_size, int64_t stream) {
  at::Tensor output = at::empty({num_positions, vocab_size}, at::kFloat);
  float* row = output.mutable_data_ptr<float>();
  Words words;
  for (int64_t p = 0; p < num_positions; ++p, row += vocab_size)
    for (int64_t start = 0; start < vocab_size; start += 4 * kLanes) {
      philox(words, static_cast<uint32_t>(start / 4), static_cast<uint32_t>(first_position + p), static_cast<uint32_t>(stream),
             static_cast<uint32_t>(k0), static_cast<uint32_t>(k1));
      const int64_t count = vocab_size - start;
      if (count >= 4 * kLanes)
        number_all(words, row + start);
      else
        for (int64_t v = 0; v < count; ++v) row[start + v] = number(words.w[v % 4][v / 4]);
    }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark, library) {
  library.def(
      "keyed_uniform(int k0, int k1, int first_position, int num_positions, int vocab_size, int stream) -> Tensor",
      &keyed_uniform);
}
