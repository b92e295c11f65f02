// Linear layers over few rows in bfloat16, on CPUs with AVX-512 BF16. The library's own spend several times longer on
// setting up each call than on a few rows of a small model. Weights are packed once and then known by a number: every
// tensor that a compiled graph takes costs something at each call, and a model has hundreds of them.
//
// Every output is one sum over k in one order, in float, rounded once: the same bits however many rows there are. Only
// where matrix units (AMX) make many rows cheap, those are left to the library.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace dspark {
extern std::atomic<bool> in_pairs;  // slot_attention.cpp
}

namespace {

constexpr int64_t kLanes = 16;  // outputs in one register
constexpr int64_t kGroup = 2;   // registers of outputs worked on together: few, so that many rows fit and weights are read once
constexpr int64_t kRows = 12;   // rows worked on together at most
constexpr int64_t kWide = kGroup * kLanes;
constexpr int64_t kAhead = 32;  // registers of weights that are fetched ahead
constexpr int64_t kMoment = 16000;  // nanoseconds of work worth another thread: waiting for each other takes several thousand
#ifdef __AMX_BF16__
constexpr int64_t kFew = 16;
#else
constexpr int64_t kFew = std::numeric_limits<int64_t>::max();
#endif

// A layer: weight [N, K] and the same packed [N / 32 rounded up, K / 2, 32, 2], in the order in which it is read.
struct Layer {
  at::Tensor weight, packed, bias;  // bias [N] float, or undefined
};

// Layers that read the same x: their outputs lie side by side.
struct Product {
  std::vector<Layer> layers;
  int64_t inner, width;
};

std::array<std::atomic<const Product*>, 1 << 16> products;

// The first free number from `near` on.
int64_t number_of(std::unique_ptr<const Product> product, int64_t near) {
  for (size_t i = 0; i < products.size(); ++i) {
    const Product* none = nullptr;
    const size_t number = (static_cast<size_t>(near) + i) % products.size();
    if (!products[number].compare_exchange_strong(none, product.get())) continue;
    product.release();
    return static_cast<int64_t>(number);
  }
  TORCH_CHECK(false, "too many linear layers are packed");
}

const Product& product_of(int64_t number) {
  const Product* product = number < 0 || number >= std::ssize(products) ? nullptr : products[number].load();
  TORCH_CHECK(product, "no packed linear layer has the number ", number);
  return *product;
}

struct Problem {
  const void* x;               // [M, K] of bfloat16, or of float
  const at::BFloat16* packed;
  const float* bias;           // [N] or null
  at::BFloat16* y;             // [M, N], in rows of `stride`
  int64_t rows, inner, width, stride;
};

inline __mmask16 lanes_of(const Problem& p, int64_t n) {
  const int64_t count = std::clamp<int64_t>(p.width - n, 0, kLanes);
  return static_cast<__mmask16>((1u << count) - 1);
}

// How a register of sums takes a pair of numbers of x and 16 pairs of weights: in one instruction,
struct InPairs {
  typedef __m512bh Weights, Factor;
  typedef at::BFloat16 Number;
  static Weights weights(__m512i pairs) { return (__m512bh)pairs; }
  static Factor factor(const Number* x) {
    int32_t both;
    std::memcpy(&both, x, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
  }
  static __m512 add(__m512 sums, const Factor& x, const Weights& w) { return _mm512_dpbf16_ps(sums, x, w); }
};

// or as floats, one after the other.
struct OneByOne {
  struct Weights { __m512 first, second; };
  struct Factor { __m512 first, second; };
  typedef float Number;
  static Weights weights(__m512i pairs) {
    return {(__m512)_mm512_slli_epi32(pairs, 16), (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))};
  }
  static Factor factor(const Number* x) { return {_mm512_set1_ps(x[0]), _mm512_set1_ps(x[1])}; }
  static __m512 add(__m512 sums, const Factor& x, const Weights& w) {
    return _mm512_fmadd_ps(x.second, w.second, _mm512_fmadd_ps(x.first, w.first, sums));
  }
};

template <typename How, int R>
inline void tile(const Problem& p, int64_t row, int64_t group) {
  __m512 sums[R][kGroup];
  const int64_t first = group * kWide, pairs = p.inner / 2;
  for (int c = 0; c < kGroup; ++c) {
    const int64_t n = first + c * kLanes;
    const __m512 start = p.bias ? _mm512_maskz_loadu_ps(lanes_of(p, n), p.bias + n) : _mm512_setzero_ps();
    for (int r = 0; r < R; ++r) sums[r][c] = start;
  }
  const at::BFloat16* w = p.packed + group * pairs * kWide * 2;
  const auto* x = static_cast<const typename How::Number*>(p.x) + row * p.inner;
  for (int64_t k = 0; k < pairs; ++k) {
    typename How::Weights weights[kGroup];
    for (int c = 0; c < kGroup; ++c) {
      weights[c] = How::weights(_mm512_loadu_si512(w + (k * kGroup + c) * kLanes * 2));
      _mm_prefetch(reinterpret_cast<const char*>(w + (k * kGroup + c + kAhead) * kLanes * 2), _MM_HINT_T0);
    }
    for (int r = 0; r < R; ++r) {
      const typename How::Factor factor = How::factor(x + r * p.inner + 2 * k);
      for (int c = 0; c < kGroup; ++c) sums[r][c] = How::add(sums[r][c], factor, weights[c]);
    }
  }
  for (int c = 0; c < kGroup; ++c) {
    const int64_t n = first + c * kLanes;
    for (int r = 0; r < R; ++r) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sums[r][c]);
      _mm256_mask_storeu_epi16(p.y + (row + r) * p.stride + n, lanes_of(p, n), rounded);
    }
  }
}

template <typename How, int R>
inline void some_rows(const Problem& p, int64_t row, int64_t group, int64_t count) {
  if constexpr (R > 0)
    return count < R ? some_rows<How, R - 1>(p, row, group, count) : tile<How, R>(p, row, group);
}

template <typename How>
void all_rows(const Problem& p, int64_t group) {
  for (int64_t row = 0, passes = (p.rows + kRows - 1) / kRows; passes > 0; --passes) {
    const int64_t count = (p.rows - row + passes - 1) / passes;  // 7 and 6 rather than 12 and 1
    some_rows<How, kRows>(p, row, group, count);
    row += count;
  }
}

int64_t num_groups(const Layer& layer) { return layer.packed.size(0); }

// Zeros for the weights of many layers, in pages of 2 MiB where the system gives them. A step reads every weight once:
// in pages of 4 KiB it spends a tenth of its time on finding out where they lie.
class Chunk {
 public:
  explicit Chunk(size_t size) : size_(size) {
    mapped_ = mmap(nullptr, size_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(mapped_ != MAP_FAILED, "no memory for ", size_, " bytes of weights");
    next_ = (reinterpret_cast<uintptr_t>(mapped_) + kPage - 1) / kPage * kPage;
    end_ = next_ + size_;
#ifdef MADV_HUGEPAGE
    madvise(reinterpret_cast<void*>(next_), size_, MADV_HUGEPAGE);
#endif
  }
  ~Chunk() { munmap(mapped_, size_ + kPage); }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;

  // Of the first chunk that has room, which lives for as long as what was taken of it.
  static at::Tensor zeros(at::IntArrayRef sizes, at::ScalarType type) {
    static std::mutex lock;
    static std::weak_ptr<Chunk> last;
    const size_t size = (c10::multiply_integers(sizes) * c10::elementSize(type) + kLine - 1) / kLine * kLine;
    const std::lock_guard held(lock);
    std::shared_ptr<Chunk> chunk = last.lock();
    if (!chunk || chunk->end_ - chunk->next_ < size)
      last = chunk = std::make_shared<Chunk>(std::max(kUsual, (size + kPage - 1) / kPage * kPage));
    void* begin = reinterpret_cast<void*>(chunk->next_);
    chunk->next_ += size;
    return at::from_blob(begin, sizes, [chunk](void*) {}, at::TensorOptions(type));
  }

 private:
  static constexpr size_t kLine = 64, kPage = 1 << 21, kUsual = 16 * kPage;
  size_t size_;
  void* mapped_;
  uintptr_t next_, end_;
};

at::Tensor pack(const at::Tensor& weight) {
  const int64_t width = weight.size(0), pairs = weight.size(1) / 2;
  const at::Tensor packed = Chunk::zeros({(width + kWide - 1) / kWide, pairs, kWide, 2}, weight.scalar_type());
  const auto* w = weight.const_data_ptr<at::BFloat16>();
  auto* to = packed.mutable_data_ptr<at::BFloat16>();
  for (int64_t n = 0; n < width; ++n)
    for (int64_t k = 0; k < pairs; ++k)
      std::memcpy(to + ((n / kWide * pairs + k) * kWide + n % kWide) * 2, w + (n * pairs + k) * 2, 4);
  return packed;
}

// weight [N, K], bias [N] -> the number of the layer as a product of its own
int64_t pack_linear(const at::Tensor& weight_, const std::optional<at::Tensor>& bias, int64_t near) {
  TORCH_CHECK(weight_.scalar_type() == at::kBFloat16 && weight_.size(1) % 2 == 0, "weight must be bfloat16 [N, even K]");
  const at::Tensor weight = weight_.contiguous();
  Layer layer{weight, pack(weight), bias ? bias->to(at::kFloat).contiguous() : at::Tensor()};
  return number_of(std::make_unique<const Product>(Product{{layer}, weight.size(1), weight.size(0)}), near);
}

// The number of the product that gives what these products give, side by side; nothing is copied.
int64_t join_linears(at::IntArrayRef numbers, int64_t near) {
  Product joined{{}, product_of(numbers.at(0)).inner, 0};
  for (const int64_t number : numbers) {
    const Product& own = product_of(number);
    TORCH_CHECK(own.inner == joined.inner, "one input for all: ", own.inner, " and ", joined.inner);
    joined.layers.insert(joined.layers.end(), own.layers.begin(), own.layers.end());
    joined.width += own.width;
  }
  return number_of(std::make_unique<const Product>(std::move(joined)), near);
}

void free_linear(int64_t number) {
  delete &product_of(number);
  products[number].store(nullptr);
}

at::Tensor by_library(const at::Tensor& x, const Product& product) {
  std::vector<at::Tensor> outputs;
  for (const Layer& layer : product.layers) {
    const std::optional<at::Tensor> bias = layer.bias.defined() ? std::optional(layer.bias.to(x.scalar_type())) : std::nullopt;
    outputs.push_back(at::linear(x, layer.weight, bias));
  }
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs, -1);
}

at::Tensor widened(const at::Tensor& x) {
  at::Tensor wide = at::detail::empty_cpu(x.sizes(), at::kFloat);
  const auto* from = x.const_data_ptr<at::BFloat16>();
  auto* to = wide.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), 1 << 16, [&](int64_t begin, int64_t end) { std::copy(from + begin, from + end, to + begin); });
  return wide;
}

// x [..., K], a product's number and its width N -> [..., N]
at::Tensor small_linear(const at::Tensor& x_, int64_t number, int64_t width) {
  const Product& product = product_of(number);
  const int64_t inner = product.inner, num_rows = x_.numel() / inner;
  TORCH_CHECK(x_.scalar_type() == at::kBFloat16 && x_.size(-1) == inner, "x must be bfloat16 [..., ", inner, "]");
  TORCH_CHECK(width == product.width, "the product has ", product.width, " outputs, not ", width);
  if (num_rows > kFew) return by_library(x_, product);
  auto shape = x_.sizes().vec();
  shape.back() = width;
  at::Tensor y = at::detail::empty_cpu(shape, x_.scalar_type());  // at::empty asks around first
  const bool in_pairs = dspark::in_pairs;
  const at::Tensor x = in_pairs ? x_.contiguous() : widened(x_.contiguous());
  std::vector<Problem> problems;
  std::vector<int64_t> ends;  // groups of outputs up to the end of each layer
  int64_t offset = 0;
  for (const Layer& layer : product.layers) {
    const int64_t own = layer.weight.size(0);
    problems.push_back({x.const_data_ptr(), layer.packed.const_data_ptr<at::BFloat16>(),
                        layer.bias.defined() ? layer.bias.const_data_ptr<float>() : nullptr,
                        y.mutable_data_ptr<at::BFloat16>() + offset, num_rows, inner, own, width});
    ends.push_back((ends.empty() ? 0 : ends.back()) + num_groups(layer));
    offset += own;
  }
  const auto all = in_pairs ? all_rows<InPairs> : all_rows<OneByOne>;
  // About 90 multiplications a nanosecond, or 20 bytes of weights where rows are too few for that.
  const int64_t nanoseconds = inner * kWide * std::max<int64_t>(9, num_rows) / 90 + 1;
  at::parallel_for(0, ends.back(), std::max<int64_t>(1, kMoment / nanoseconds), [&](int64_t begin, int64_t end) {
    size_t layer = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t group = begin; group < end; ++group) {
      if (group == ends[layer]) ++layer;
      all(problems[layer], group - (layer ? ends[layer - 1] : 0));
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark, library) {
  library.def("pack_linear(Tensor weight, Tensor? bias, int near=0) -> int");
  library.def("join_linears(int[] numbers, int near=0) -> int", &join_linears);
  library.def("free_linear(int number) -> ()", &free_linear);
  library.def("small_linear(Tensor x, int number, int width) -> Tensor");
}

TORCH_LIBRARY_IMPL(dspark, CPU, library) {
  library.impl("pack_linear", &pack_linear);
  library.impl("small_linear", &small_linear);
}

// No gradient is ever asked for: without this, every call is looked at for one.
TORCH_LIBRARY_IMPL(dspark, Autograd, library) { library.impl("small_linear", torch::CppFunction::makeFallthrough()); }
#endif
