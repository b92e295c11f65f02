// Linear layers over few rows in bfloat16, on CPUs with AVX-512 BF16. The library's own spend several times longer on
// setting up each call than on a few rows of a small model.
//
// Every output is one sum over k in one order, in float, rounded once: the same bits however many rows there are. Only
// where matrix units (AMX) make many rows cheap, those are left to the library.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t kLanes = 16;  // outputs in one register
constexpr int64_t kRows = 6;    // rows worked on together at most
constexpr int64_t kGroup = 4;   // registers of outputs worked on together
constexpr int64_t kAhead = 32;  // registers of weights that are fetched ahead
constexpr int64_t kMoment = 20000;  // nanoseconds of work worth another thread: waiting for each other takes several thousand
#ifdef __AMX_BF16__
constexpr int64_t kFew = 16;
#else
constexpr int64_t kFew = std::numeric_limits<int64_t>::max();
#endif

struct Problem {
  const at::BFloat16* x;       // [M, K]
  const at::BFloat16* packed;  // [N / 64, K / 2, 64, 2]
  const float* bias;           // [N] or null
  at::BFloat16* y;             // [M, N]
  int64_t rows, inner, width;
};

inline __mmask16 lanes_of(const Problem& p, int64_t n) {
  const int64_t count = std::clamp<int64_t>(p.width - n, 0, kLanes);
  return static_cast<__mmask16>((1u << count) - 1);
}

template <int R>
inline void tile(const Problem& p, int64_t row, int64_t group) {
  __m512 sums[R][kGroup];
  const int64_t first = group * kGroup * kLanes, pairs = p.inner / 2;
  for (int c = 0; c < kGroup; ++c) {
    const int64_t n = first + c * kLanes;
    const __m512 start = p.bias ? _mm512_maskz_loadu_ps(lanes_of(p, n), p.bias + n) : _mm512_setzero_ps();
    for (int r = 0; r < R; ++r) sums[r][c] = start;
  }
  const at::BFloat16* w = p.packed + group * pairs * kGroup * kLanes * 2;
  const at::BFloat16* x = p.x + row * p.inner;
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh weights[kGroup];
    for (int c = 0; c < kGroup; ++c) {
      weights[c] = (__m512bh)_mm512_loadu_si512(w + (k * kGroup + c) * kLanes * 2);
      _mm_prefetch(reinterpret_cast<const char*>(w + (k * kGroup + c + kAhead) * kLanes * 2), _MM_HINT_T0);
    }
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * p.inner + 2 * k, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int c = 0; c < kGroup; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], both, weights[c]);
    }
  }
  for (int c = 0; c < kGroup; ++c) {
    const int64_t n = first + c * kLanes;
    for (int r = 0; r < R; ++r) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sums[r][c]);
      _mm256_mask_storeu_epi16(p.y + (row + r) * p.width + n, lanes_of(p, n), rounded);
    }
  }
}

void rows(const Problem& p, int64_t group) {
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) tile<kRows>(p, row, group);
  switch (p.rows - row) {
    case 1: return tile<1>(p, row, group);
    case 2: return tile<2>(p, row, group);
    case 3: return tile<3>(p, row, group);
    case 4: return tile<4>(p, row, group);
    case 5: return tile<5>(p, row, group);
  }
}

// weight [N, K] bfloat16 -> [N / 64 rounded up, K / 2, 64, 2]: in the order in which it is read.
at::Tensor pack_linear(const at::Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.size(1) % 2 == 0, "weight must be bfloat16 [N, even K]");
  const at::Tensor from = weight.contiguous();
  constexpr int64_t kWide = kGroup * kLanes;
  const int64_t width = from.size(0), pairs = from.size(1) / 2;
  at::Tensor packed = at::detail::empty_cpu({(width + kWide - 1) / kWide, pairs, kWide, 2}, from.scalar_type());
  packed.zero_();
  const auto* w = from.const_data_ptr<at::BFloat16>();
  auto* to = packed.mutable_data_ptr<at::BFloat16>();
  for (int64_t n = 0; n < width; ++n)
    for (int64_t k = 0; k < pairs; ++k)
      std::memcpy(to + ((n / kWide * pairs + k) * kWide + n % kWide) * 2, w + (n * pairs + k) * 2, 4);
  return packed;
}

// x [..., K], weight [N, K] and the same packed, bias [N] -> [..., N]
at::Tensor small_linear(const at::Tensor& x_, const at::Tensor& weight, const at::Tensor& packed, const std::optional<at::Tensor>& bias) {
  const int64_t width = weight.size(0), inner = weight.size(1);
  if (x_.numel() / inner > kFew) return at::linear(x_, weight, bias);
  const at::Tensor x = x_.contiguous();
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.size(-1) == inner, "x must be bfloat16 [..., ", inner, "]");
  auto shape = x.sizes().vec();
  shape.back() = width;
  at::Tensor y = at::detail::empty_cpu(shape, x.scalar_type());  // at::empty asks around first
  const at::Tensor offsets = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const Problem p{x.const_data_ptr<at::BFloat16>(), packed.const_data_ptr<at::BFloat16>(),
                  bias ? offsets.const_data_ptr<float>() : nullptr, y.mutable_data_ptr<at::BFloat16>(),
                  x.numel() / inner, inner, width};
  // About 90 multiplications a nanosecond, or 20 bytes of weights where rows are too few for that.
  const int64_t nanoseconds = inner * kLanes * kGroup * std::max<int64_t>(9, p.rows) / 90 + 1;
  at::parallel_for(0, packed.size(0), std::max<int64_t>(1, kMoment / nanoseconds), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) rows(p, group);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark, library) {
  library.def("pack_linear(Tensor weight) -> Tensor");
  library.def("small_linear(Tensor x, Tensor weight, Tensor packed, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(dspark, CPU, library) {
  library.impl("pack_linear", &pack_linear);
  library.impl("small_linear", &small_linear);
}

// No gradient is ever asked for: without this, every call is looked at for one.
TORCH_LIBRARY_IMPL(dspark, Autograd, library) { library.impl("small_linear", torch::CppFunction::makeFallthrough()); }
#endif
