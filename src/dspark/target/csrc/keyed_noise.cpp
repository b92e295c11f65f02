// The words of noise.py's Philox generator as numbers in (0, 1]: the same bits as the tensors there give, several times
// sooner. Logarithms are left to torch, so that noise does not depend on whether this kernel is there.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kLanes = 16;  // counters that are worked on side by side

struct Words {
  uint32_t w[4][kLanes];
};

// Philox4x32-10 (Salmon et al., SC 2011) of the counters (first + lane, position, stream, 0).
inline void philox(Words& words, uint32_t first, uint32_t position, uint32_t stream, uint32_t k0, uint32_t k1) {
  auto& [a, b, c, d] = words.w;
  for (int64_t l = 0; l < kLanes; ++l) a[l] = first + static_cast<uint32_t>(l), b[l] = position, c[l] = stream, d[l] = 0;
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
      const int64_t count = std::min(4 * kLanes, vocab_size - start);
      for (int64_t v = 0; v < count; ++v)
        row[start + v] = (static_cast<float>(words.w[v % 4][v / 4]) + 0.5f) * 0x1p-32f;
    }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark, library) {
  library.def(
      "keyed_uniform(int k0, int k1, int first_position, int num_positions, int vocab_size, int stream) -> Tensor",
      &keyed_uniform);
}
