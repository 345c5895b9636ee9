// A T⁵ core's middle on CPUs: key norm, convolutions and inner step, on blocks of tokens that stay in a core's cache.
//
//     statistics   offset -mean·r and scale r = 1/√(var + ε) of every key channel; tokens about their own mean, joined exactly
//     learn        G = Σ ∂(L/c)/∂W (k̂, v)
//     answer       o = f_W'(q̂)
//
//     aligned      all three, head by head: what lies between them stays in a core's cache, and one call does it
//     windows      neighborhood attention;  joined  that beside a mixer's answers, and exact attention off the grid
//
// The equations are those of lineate/ops/ttt.py; lineate/ops/aligned_cpu.py calls `aligned` where nothing learns, and
// otherwise the three, which it differentiates. Everything is computed in fp32. A block is read out of the projection as it lies,
// with the grid's rows above and below it, normed, and convolved with the residual in the centre tap. Work is shared by sample,
// head and part of the blocks.
//
// Legend: B batch, H heads, N tokens, D head dim, P = D rounded up to whole vectors (the rest are zeros), n tokens of a block.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

namespace {

using at::Tensor;

// A tile of a product: ROWS × COLUMNS vectors are summed in registers.
#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 8, COLUMNS = 2;
#else
constexpr int64_t LANES = 8, ROWS = 4, COLUMNS = 2;
#endif
constexpr int64_t PAD = 16;      // P is a multiple of it, and so is n as products see it
constexpr int64_t TOKENS = 256;  // about so many in a block
constexpr int64_t FEW = 32;      // of the statistics
constexpr int64_t AHEAD = 16;    // tokens
constexpr int64_t DEPTH = 128;    // of a product that is summed at once, so that its rows stay in the first cache

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Vector& at(float* x) { return *reinterpret_cast<Vector*>(x); }
inline const Vector& at(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline int64_t padded(int64_t size) { return (size + PAD - 1) / PAD * PAD; }

// ---------------------------------------------------------------------------------------------------------------- products

// c (+)= a·b, one tile; a is read with any strides, so that its transpose is as good.
template <int64_t COLS>
inline void tile(
    int64_t depth, const float* a, int64_t a_row, int64_t a_inner, const float* b, float* c, int64_t width, bool add) {
  Vector sum[ROWS][COLS];
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t j = 0; j < COLS; ++j) sum[r][j] = add ? at(c + r * width + j * LANES) : Vector{};
  for (int64_t p = 0; p < depth; ++p) {
    Vector row[COLS];
    for (int64_t j = 0; j < COLS; ++j) row[j] = at(b + p * width + j * LANES);
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int64_t j = 0; j < COLS; ++j) sum[r][j] += a[r * a_row + p * a_inner] * row[j];
  }
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t j = 0; j < COLS; ++j) at(c + r * width + j * LANES) = sum[r][j];
}

// c (rows, width) (+)= a (rows, depth)·b (depth, width).
void product(
    int64_t rows, int64_t depth, int64_t width, const float* a, int64_t a_row, int64_t a_inner, const float* b, float* c,
    bool add) {
  for (int64_t start = 0; start < depth; start += DEPTH) {
    const int64_t deep = std::min(DEPTH, depth - start);
    const bool sum = add || start > 0;
    for (int64_t column = 0; column < width;) {
      const bool full = width - column >= COLUMNS * LANES;
      for (int64_t row = 0; row < rows; row += ROWS) {
        const float *left = a + row * a_row + start * a_inner, *right = b + start * width + column;
        float* out = c + row * width + column;
        if (full)
          tile<COLUMNS>(deep, left, a_row, a_inner, right, out, width, sum);
        else
          tile<1>(deep, left, a_row, a_inner, right, out, width, sum);
      }
      column += full ? COLUMNS * LANES : LANES;
    }
  }
}

// out (n, P) = x (n, P)·w (P, P).
void times(int64_t n, int64_t p, const float* x, const float* w, float* out) { product(n, p, p, x, p, 1, w, out, false); }

// g (P, P) += xᵀ·u over the n tokens of both.
void collect(int64_t n, int64_t p, const float* x, const float* u, float* g) { product(p, n, p, x, 1, p, u, g, true); }

// ------------------------------------------------------------------------------------------------------- functions by channel

// e^x = 2^m·e^r with whole m and |r| <= ln(2)/2, e^r by its series.
inline Vector exponential(Vector x) {
  x = x < -87.0f ? Vector{} - 87.0f : x;
  x = x > 88.0f ? Vector{} + 88.0f : x;
  constexpr float whole = 12582912.0f;  // 1.5·2^23: what is added to it is rounded to an integer
  const Vector m = (x * 1.44269504f + whole) - whole;
  const Vector r = (x - m * 0.693359375f) + m * 2.12194440e-4f;  // ln 2, its leading bits first
  Vector e = r * (1.0f / 5040) + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const Integers power = (__builtin_convertvector(m, Integers) + 127) << 23;
  return e * (Vector)power;
}

inline Vector logistic(Vector z) { return 1.0f / (1.0f + exponential(-z)); }

// Lanes that are STEP apart change places.
template <int64_t STEP>
inline Integers rotated() {
  Integers other = {};
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) other[i] = i ^ STEP;
  return other;
}

template <int64_t HALF = LANES / 2, typename F>
inline float reduce(Vector x, const F& join) {
  x = join(x, __builtin_shuffle(x, rotated<HALF>()));
  if constexpr (HALF > 1)
    return reduce<HALF / 2>(x, join);
  else
    return x[0];
}

inline float total(Vector x) {
  return reduce(x, [](Vector a, Vector b) { return a + b; });
}

inline float greatest(Vector x) {
  return reduce(x, [](Vector a, Vector b) { return a > b ? a : b; });
}

// z <- silu(z), slope <- silu'(z).
void silu(int64_t size, float* z, float* slope) {
  for (int64_t i = 0; i < size; i += LANES) {
    const Vector s = logistic(at(z + i)), y = at(z + i) * s;
    at(z + i) = y;
    at(slope + i) = s + y * (1.0f - s);
  }
}

// z <- silu(z), times y where there is one.
void gate(int64_t size, float* z, const float* y) {
  for (int64_t i = 0; i < size; i += LANES) {
    const Vector x = at(z + i) * logistic(at(z + i));
    at(z + i) = y ? x * at(y + i) : x;
  }
}

// out <- x ⊙ y; may be one of them.
void multiply(int64_t size, const float* x, const float* y, float* out) {
  for (int64_t i = 0; i < size; i += LANES) at(out + i) = at(x + i) * at(y + i);
}

// ------------------------------------------------------------------------------------------------------------ what is read

// Some tokens that follow each other: whole rows of the grid, from `top` on, or tokens that are not convolved.
struct Block {
  int64_t start, count, top, rows;
};

// The grid, and where in the sequence it is.
struct Grid {
  int64_t height, width, first;
};

std::vector<Block> blocks_of(int64_t tokens, const Grid& grid, bool convolved) {
  std::vector<Block> found;
  const auto plain = [&](int64_t start, int64_t stop) {
    for (; start < stop; start += TOKENS) found.push_back({start, std::min(TOKENS, stop - start), 0, 0});
  };
  if (!convolved) return plain(0, tokens), found;
  plain(0, grid.first);
  const int64_t rows = std::max<int64_t>(1, TOKENS / grid.width);
  for (int64_t top = 0; top < grid.height; top += rows) {
    const int64_t some = std::min(rows, grid.height - top);
    found.push_back({grid.first + top * grid.width, some * grid.width, top, some});
  }
  plain(grid.first + grid.height * grid.width, tokens);
  return found;
}

int64_t largest(const std::vector<Block>& blocks) {
  int64_t most = 0;
  for (const auto& block : blocks) most = std::max(most, block.count);
  return padded(most);
}

// One head's tokens, as they lie: (N, D) with a stride.
template <typename T>
struct Tokens {
  const T* data;
  int64_t stride;
  Tokens(const Tensor& x, int64_t b, int64_t h)
      : data(x.const_data_ptr<T>() + b * x.stride(0) + h * x.stride(2)), stride(x.stride(1)) {}
  Tokens from(int64_t start) const {
    Tokens later = *this;
    later.data += start * stride;
    return later;
  }
};

// One head's norm (offset, scale) and taps (3·3, then the bias), by padded channels; null where there are none.
struct Lens {
  const float *norm, *taps;
};

// out (count, P) = x or, normed, offset + scale·x.
template <typename T>
void copy(Tokens<T> x, int64_t start, int64_t count, int64_t d, int64_t p, const float* norm, float* out) {
  for (int64_t t = 0; t < count; ++t) {
    const T* from = x.data + (start + t) * x.stride;
    float* to = out + t * p;
    for (int64_t i = 0; i < d; i += 64 / sizeof(T)) __builtin_prefetch(from + AHEAD * x.stride + i);  // another page each
    if (norm)
      for (int64_t i = 0; i < d; ++i) to[i] = norm[i] + norm[p + i] * static_cast<float>(from[i]);
    else
      for (int64_t i = 0; i < d; ++i) to[i] = static_cast<float>(from[i]);
  }
}

// One token's d channels, rounded to the output's type.
template <typename T>
void write(const float* o, int64_t d, T* to) {
  for (int64_t i = 0; i < d; ++i) to[i] = static_cast<T>(o[i]);
}

// A block's q̂ or k̂ into out (n, P). `image` has room for its rows and one more on each side, (rows + 2, width + 2, P), whose
// border and padding are zeros.
template <typename T>
void see(Tokens<T> x, const Block& block, const Grid& grid, int64_t d, int64_t p, const Lens& lens, float* image, float* out) {
  if (!block.rows) return copy(x, block.start, block.count, d, p, lens.norm, out);
  const int64_t pitch = (grid.width + 2) * p;
  for (int64_t row = -1; row <= block.rows; ++row) {
    float* target = image + (row + 1) * pitch + p;
    if (block.top + row < 0 || block.top + row >= grid.height)
      std::fill_n(target, grid.width * p, 0.0f);
    else
      copy(x, block.start + row * grid.width, grid.width, d, p, lens.norm, target);
  }
  for (int64_t row = 0; row < block.rows; ++row)
    for (int64_t i = 0; i < p; i += LANES) {
      Vector tap[10];
      for (int64_t j = 0; j < 10; ++j) tap[j] = at(lens.taps + j * p + i);
      const float* from = image + row * pitch + i;
      float* to = out + row * grid.width * p + i;
      for (int64_t column = 0; column < grid.width; ++column, from += p, to += p) {
        Vector sum = tap[9];
#pragma GCC unroll 3
        for (int64_t y = 0; y < 3; ++y)
#pragma GCC unroll 3
          for (int64_t j = 0; j < 3; ++j) sum += tap[3 * y + j] * at(from + y * pitch + j * p);
        at(to) = sum;
      }
    }
}

// ------------------------------------------------------------------------------------------------------------ one thread's work

// A thread's scratch memory, handed out piece by piece, each a whole number of cache lines; all zeros at first. Who takes the
// same pieces again finds them as they were left, the padding of channels among them, which nothing changes. The thread keeps the
// memory, a few MB at most: fresh pages cost more than a short sequence's work.
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory(kept()) {
    memory.resize(std::max<size_t>(memory.size(), size + PAD));
    std::fill_n(memory.begin(), size + PAD, 0.0f);
    reset();
  }
  void reset() { next = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) % 64) / sizeof(float); }
  float* take(int64_t size) { return std::exchange(next, next + size); }

 private:
  static std::vector<float>& kept() {
    thread_local std::vector<float> memory;
    return memory;
  }
  std::vector<float>& memory;
  float* next;
};

int64_t image_size(const std::vector<Block>& blocks, const Grid& grid, int64_t p) {
  int64_t rows = 0;
  for (const auto& block : blocks) rows = std::max(rows, block.rows);
  return rows ? (rows + 2) * (grid.width + 2) * p : 0;
}

// f(a pointer to x's numbers), whatever their type.
template <typename F>
void numbers_of(const Tensor& x, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "numbers_of", [&] { f(x.const_data_ptr<scalar_t>()); });
}

// (D, D) number `index`, maybe transposed, into (P, P) whose rest stays zero.
void pack(const Tensor& w, int64_t index, int64_t p, bool transposed, float* out) {
  const int64_t d = w.size(-1);
  numbers_of(w, [&](auto* from) {
    from += index * d * d;
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j) out[i * p + j] = static_cast<float>(transposed ? from[j * d + i] : from[i * d + j]);
  });
}

// Taps (C, 1, 3, 3) and bias (C,) of head h as (10, P).
void pack_taps(const Tensor& weight, const Tensor& bias, int64_t h, int64_t d, int64_t p, float* out) {
  numbers_of(weight, [&](auto* taps) {
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < 9; ++j) out[j * p + i] = static_cast<float>(taps[(h * d + i) * 9 + j]);
  });
  numbers_of(bias, [&](auto* offset) {
    for (int64_t i = 0; i < d; ++i) out[9 * p + i] = static_cast<float>(offset[h * d + i]);
  });
}

// How the work is cut: B·H heads, each in parts of whole blocks where the heads alone do not occupy all threads evenly.
struct Plan {
  std::vector<Block> blocks;
  int64_t heads, parts;
  Plan(std::vector<Block> all, int64_t count) : blocks(std::move(all)), heads(count), parts(1) {
    const int64_t threads = at::get_num_threads();
    if (heads % threads) parts = std::min<int64_t>(blocks.size(), (4 * threads + heads - 1) / heads);
  }
  int64_t begin(int64_t part) const { return blocks.size() * part / parts; }
  const Block* begin_of(int64_t part) const { return blocks.data() + begin(part); }
  template <typename F>
  void run(int64_t scratch, const F& work) const {  // work(scratch, head among B·H, part)
    at::parallel_for(0, heads * parts, 1, [&](int64_t start, int64_t stop) {
      Scratch memory(scratch);
      for (int64_t i = start; i < stop; ++i, memory.reset()) work(memory, i / parts, i % parts);
    });
  }
};

// ------------------------------------------------------------------------------------------------------------------ statistics

// count, mean and Σ (x - mean)² of a head's channels, (1 + 2·D) numbers; joined with those of more tokens.
struct Moments {
  int64_t count = 0;
  std::vector<float> mean, square;
  explicit Moments(int64_t p) : mean(p), square(p) {}
  void join(int64_t more, const float* other_mean, const float* other_square) {
    if (!more) return;
    const float all = count + more, share = more / all, between = count * share;
    for (size_t i = 0; i < mean.size(); ++i) {
      const float gap = other_mean[i] - mean[i];
      mean[i] += gap * share;
      square[i] += other_square[i] + gap * gap * between;
    }
    count += more;
  }
};

template <typename T>
Moments moments(Tokens<T> x, int64_t start, int64_t stop, int64_t d, Scratch& scratch) {
  const int64_t p = padded(d);
  Moments found(p);
  float *part = scratch.take(FEW * p), *mean = scratch.take(p), *square = scratch.take(p);
  for (; start < stop; start += FEW) {
    const int64_t n = std::min(FEW, stop - start);
    copy(x, start, n, d, p, nullptr, part);
    for (int64_t i = 0; i < p; i += LANES) {
      Vector sum = {}, squares = {};
      for (int64_t t = 0; t < n; ++t) sum += at(part + t * p + i);
      sum /= static_cast<float>(n);
      for (int64_t t = 0; t < n; ++t) {
        const Vector gap = at(part + t * p + i) - sum;
        squares += gap * gap;
      }
      at(mean + i) = sum;
      at(square + i) = squares;
    }
    found.join(n, mean, square);
  }
  return found;
}

// The norm of a head's first d channels.
void affine(const Moments& all, double eps, int64_t d, float* offset, float* scale) {
  for (int64_t i = 0; i < d; ++i) {
    scale[i] = 1.0f / std::sqrt(all.square[i] / all.count + static_cast<float>(eps));
    offset[i] = -all.mean[i] * scale[i];
  }
}

// k (B, N, H, D) -> (B, 2, H, D) in fp32.
Tensor statistics(const Tensor& k, double eps) {
  const int64_t batch = k.size(0), tokens = k.size(1), heads = k.size(2), d = k.size(3);
  const Plan plan(blocks_of(tokens, {}, false), batch * heads);
  std::vector<Moments> found(plan.heads * plan.parts, Moments(0));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, k.scalar_type(), "statistics", [&] {
    plan.run((FEW + 2) * padded(d), [&](Scratch& scratch, int64_t head, int64_t part) {
      const int64_t start = plan.begin(part) * TOKENS, stop = std::min(tokens, plan.begin(part + 1) * TOKENS);
      found[head * plan.parts + part] = moments(Tokens<scalar_t>(k, head / heads, head % heads), start, stop, d, scratch);
    });
  });
  Tensor norm = at::empty({batch, 2, heads, d}, k.options().dtype(at::kFloat));
  float* out = norm.data_ptr<float>();
  for (int64_t head = 0; head < plan.heads; ++head) {
    Moments& all = found[head * plan.parts];
    for (int64_t part = 1; part < plan.parts; ++part) {
      const Moments& more = found[head * plan.parts + part];
      all.join(more.count, more.mean.data(), more.square.data());
    }
    float* offset = out + (head / heads * 2 * heads + head % heads) * d;
    affine(all, eps, d, offset, offset + heads * d);
  }
  return norm;
}

// ----------------------------------------------------------------------------------------------------------------------- learn

// The inner model's matrices of one head, its gradients, and room for a block and all that is made of it.
struct Inner {
  bool gated, l2;
  float *in, *gate, *out, *out_transposed;  // (P, P)
  float *g_in, *g_gate, *g_out;             // (P, P)
  float *pixels, *x, *e, *z, *slope, *d, *y;

  static int64_t size(int64_t image, int64_t n, int64_t p) { return image + 6 * n * p + 7 * p * p; }

  Inner(Scratch& scratch, at::TensorList weights, int64_t h, bool l2, int64_t image, int64_t n, int64_t p)
      : gated(weights.size() == 3), l2(l2), pixels(scratch.take(image)) {
    for (float** block : {&x, &e, &z, &slope, &d, &y}) *block = scratch.take(n * p);
    for (float** matrix : {&in, &gate, &out, &out_transposed, &g_in, &g_gate, &g_out}) *matrix = scratch.take(p * p);
    for (float* sum : {g_in, g_gate, g_out}) std::fill_n(sum, p * p, 0.0f);
    pack(weights.front(), h, p, false, in);
    if (gated) pack(weights[1], h, p, false, gate);
    pack(weights.back(), h, p, false, out);
    pack(weights.back(), h, p, true, out_transposed);
  }
};

// Adds the gradients of a block's k and v, (n, P) in m.x and m.e.
void step(const Inner& m, int64_t n, int64_t p) {
  const int64_t size = n * p;
  times(n, p, m.x, m.in, m.z);
  silu(size, m.z, m.slope);
  float* hidden = m.z;
  if (m.gated) {
    times(n, p, m.x, m.gate, m.y);
    multiply(size, m.y, m.slope, m.slope);
    hidden = m.y;  // after S ⊙ Y below; Y itself is not needed any more
    multiply(size, m.z, m.y, m.y);
  }
  if (m.l2) {
    times(n, p, hidden, m.out, m.d);
    for (int64_t i = 0; i < size; i += LANES) at(m.e + i) = at(m.d + i) - at(m.e + i);
  } else {
    for (int64_t i = 0; i < size; i += LANES) at(m.e + i) = -at(m.e + i);
  }
  collect(n, p, hidden, m.e, m.g_out);
  times(n, p, m.e, m.out_transposed, m.d);
  if (m.gated) {
    multiply(size, m.d, m.z, m.z);
    collect(n, p, m.x, m.z, m.g_gate);
  }
  multiply(size, m.d, m.slope, m.slope);
  collect(n, p, m.x, m.slope, m.g_in);
}

// Adds the gradients of some blocks of a head's keys and values.
template <typename T>
void learn_blocks(
    const Inner& m, Tokens<T> k, Tokens<T> v, const Block* block, const Block* end, const Grid& grid, int64_t d, int64_t p,
    const Lens& lens) {
  for (; block != end; ++block) {
    const int64_t rows = padded(block->count), rest = (rows - block->count) * p;
    see(k, *block, grid, d, p, lens, m.pixels, m.x);
    copy(v, block->start, block->count, d, p, nullptr, m.e);
    std::fill_n(m.x + block->count * p, rest, 0.0f);  // tokens of zeros add nothing
    std::fill_n(m.e + block->count * p, rest, 0.0f);
    step(m, rows, p);
  }
}

// k, v (B, N, H, D), norm (B, 2, H, D), taps of a convolution, weights (H, D, D) each -> G, (M, B, H, D, D).
Tensor learn(
    const Tensor& k, const Tensor& v, const std::optional<Tensor>& norm, at::TensorList taps, at::TensorList weights,
    int64_t height, int64_t width, int64_t first, bool l2) {
  const int64_t batch = k.size(0), tokens = k.size(1), heads = k.size(2), d = k.size(3), p = padded(d);
  const int64_t matrices = weights.size();
  const Grid grid{height, width, first};
  const Plan plan(blocks_of(tokens, grid, !taps.empty()), batch * heads);
  const int64_t n = largest(plan.blocks), image = image_size(plan.blocks, grid, p);
  Tensor sums = at::empty({matrices, batch, heads, plan.parts, d, d}, k.options().dtype(at::kFloat));
  float* out = sums.data_ptr<float>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, k.scalar_type(), "learn", [&] {
    plan.run(Inner::size(image, n, p) + 12 * p, [&](Scratch& scratch, int64_t head, int64_t part) {
      const int64_t b = head / heads, h = head % heads;
      const Inner m(scratch, weights, h, l2, image, n, p);
      float *affine = scratch.take(2 * p), *kernel = scratch.take(10 * p);
      if (norm)
        for (int64_t i = 0; i < 2; ++i)
          std::copy_n(norm->const_data_ptr<float>() + ((b * 2 + i) * heads + h) * d, d, affine + i * p);
      if (!taps.empty()) pack_taps(taps[0], taps[1], h, d, p, kernel);
      learn_blocks<scalar_t>(
          m, {k, b, h}, {v, b, h}, plan.begin_of(part), plan.begin_of(part + 1), grid, d, p,
          {norm ? affine : nullptr, kernel});
      const float* found[] = {m.g_in, m.gated ? m.g_gate : m.g_out, m.g_out};
      for (int64_t i = 0; i < matrices; ++i) {
        float* to = out + ((i * plan.heads + head) * plan.parts + part) * d * d;
        for (int64_t row = 0; row < d; ++row) std::copy_n(found[i] + row * p, d, to + row * d);
      }
    });
  });
  return plan.parts == 1 ? sums.select(3, 0) : sums.sum(3);
}

// ---------------------------------------------------------------------------------------------------------------------- answer

// o of some blocks of a head's queries, written where `to` and its stride say; `gates` is null without a gate. `pixels`, x, z and
// y are room for a block and all that is made of it.
template <typename T>
void answer_blocks(
    Tokens<T> q, T* to, int64_t stride, const Block* block, const Block* end, const Grid& grid, int64_t d, int64_t p,
    const float* taps, const float* in, const float* gates, const float* back, float* pixels, float* x, float* z, float* y) {
  for (; block != end; ++block) {
    const int64_t rows = padded(block->count);
    see(q, *block, grid, d, p, {nullptr, taps}, pixels, x);
    times(rows, p, x, in, z);
    if (gates) times(rows, p, x, gates, y);
    gate(rows * p, z, gates ? y : nullptr);
    times(rows, p, z, back, x);
    T* row = to + block->start * stride;
    for (int64_t t = 0; t < block->count; ++t, row += stride) write(x + t * p, d, row);
  }
}

// q (B, N, H, D), taps of a convolution, fitted weights (B, H, D, D) each -> o (B, N, H, D) in q's type.
Tensor answer(
    const Tensor& q, at::TensorList taps, at::TensorList weights, int64_t height, int64_t width, int64_t first) {
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), d = q.size(3), p = padded(d);
  const bool gated = weights.size() == 3;
  const Grid grid{height, width, first};
  const Plan plan(blocks_of(tokens, grid, !taps.empty()), batch * heads);
  const int64_t n = largest(plan.blocks), image = image_size(plan.blocks, grid, p);
  Tensor out = at::empty({batch, tokens, heads, d}, q.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "answer", [&] {
    plan.run(image + 3 * n * p + 3 * p * p + 10 * p, [&](Scratch& scratch, int64_t head, int64_t part) {
      const int64_t b = head / heads, h = head % heads;
      float *pixels = scratch.take(image), *x = scratch.take(n * p), *z = scratch.take(n * p), *y = scratch.take(n * p);
      float *in = scratch.take(p * p), *gates = scratch.take(p * p), *back = scratch.take(p * p), *kernel = scratch.take(10 * p);
      pack(weights.front(), head, p, false, in);
      if (gated) pack(weights[1], head, p, false, gates);
      pack(weights.back(), head, p, false, back);
      if (!taps.empty()) pack_taps(taps[0], taps[1], h, d, p, kernel);
      answer_blocks<scalar_t>(
          {q, b, h}, out.data_ptr<scalar_t>() + (b * tokens * heads + h) * d, heads * d, plan.begin_of(part),
          plan.begin_of(part + 1), grid, d, p, kernel, in, gated ? gates : nullptr, back, pixels, x, z, y);
    });
  });
  return out;
}

// --------------------------------------------------------------------------------------------------------------------- aligned

// The kernel of x + DWC(x).
void pack_residual(const Tensor& weight, const Tensor& bias, int64_t h, int64_t d, int64_t p, float* out) {
  pack_taps(weight, bias, h, d, p, out);
  for (int64_t i = 0; i < d; ++i) out[4 * p + i] += 1.0f;
}

// w (P, P) <- w - c·g
void descend(int64_t p, float c, const float* g, float* w) {
  for (int64_t i = 0; i < p * p; i += LANES) at(w + i) -= c * at(g + i);
}

// q, k, v (B, N, H, D), the queries' and the keys' convolutions, weights (H, D, D) each -> o (B, N, H, D), where every head is one
// thread's.
Tensor by_head(
    const Tensor& q, const Tensor& k, const Tensor& v, at::TensorList convolutions, at::TensorList weights,
    std::optional<double> eps, bool l2, const Grid& grid, const Plan& plan) {
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), d = q.size(3), p = padded(d);
  const int64_t n = largest(plan.blocks), image = image_size(plan.blocks, grid, p);
  const Block *begin = plan.blocks.data(), *end = begin + plan.blocks.size();
  const float c = 1.0f / (std::sqrt(static_cast<float>(d)) * tokens);
  Tensor out = at::empty({batch, tokens, heads, d}, q.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "aligned", [&] {
    plan.run(Inner::size(image, n, p) + (22 + FEW + 2) * p, [&](Scratch& scratch, int64_t head, int64_t) {
      const int64_t b = head / heads, h = head % heads;
      const Tokens<scalar_t> queries(q, b, h), keys(k, b, h), values(v, b, h);
      const Inner m(scratch, weights, h, l2, image, n, p);
      float *norm = scratch.take(2 * p), *q_kernel = scratch.take(10 * p), *k_kernel = scratch.take(10 * p);
      if (eps) affine(moments(keys, 0, tokens, d, scratch), *eps, d, norm, norm + p);
      if (!convolutions.empty()) {
        pack_residual(convolutions[0], convolutions[1], h, d, p, q_kernel);
        pack_residual(convolutions[2], convolutions[3], h, d, p, k_kernel);
      }
      learn_blocks(m, keys, values, begin, end, grid, d, p, {eps ? norm : nullptr, k_kernel});
      descend(p, c, m.g_in, m.in);
      if (m.gated) descend(p, c, m.g_gate, m.gate);
      descend(p, c, m.g_out, m.out);
      answer_blocks(
          queries, out.data_ptr<scalar_t>() + (b * tokens * heads + h) * d, heads * d, begin, end, grid, d, p, q_kernel, m.in,
          m.gated ? m.gate : nullptr, m.out, m.pixels, m.x, m.z, m.y);
    });
  });
  return out;
}

// The same, a part of a head a thread, one of the three after the other.
Tensor by_part(
    const Tensor& q, const Tensor& k, const Tensor& v, at::TensorList convolutions, at::TensorList weights,
    std::optional<double> eps, bool l2, const Grid& grid) {
  std::vector<Tensor> kernels;  // of x + DWC(x)
  for (const Tensor& x : convolutions) kernels.push_back(x.to(at::kFloat, false, x.dim() == 4));
  for (Tensor& x : kernels)
    if (x.dim() == 4) x.select(2, 1).select(2, 1).add_(1);
  const at::TensorList taps(kernels);
  const size_t half = taps.size() / 2;
  std::optional<Tensor> norm;
  if (eps) norm = statistics(k, *eps);
  const Tensor sums = learn(k, v, norm, taps.slice(half), weights, grid.height, grid.width, grid.first, l2);
  const double c = 1.0 / (std::sqrt(static_cast<double>(q.size(3))) * q.size(1));
  std::vector<Tensor> fitted;
  for (size_t i = 0; i < weights.size(); ++i) fitted.push_back(weights[i].to(at::kFloat).sub(sums.select(0, i), c).contiguous());
  return answer(q, taps.slice(0, half), fitted, grid.height, grid.width, grid.first);
}

Tensor aligned(
    const Tensor& q, const Tensor& k, const Tensor& v, at::TensorList convolutions, at::TensorList weights,
    std::optional<double> eps, int64_t height, int64_t width, int64_t first, bool l2) {
  const Grid grid{height, width, first};
  const Plan plan(blocks_of(q.size(1), grid, !convolutions.empty()), q.size(0) * q.size(2));
  if (plan.parts > 1) return by_part(q, k, v, convolutions, weights, eps, l2, grid);
  return by_head(q, k, v, convolutions, weights, eps, l2, grid, plan);
}

// --------------------------------------------------------------------------------------------------------------------- windows

// A window along one side: where it begins for the query at `place`, shifted inwards at the border.
struct Side {
  int64_t length, size;
  Side(int64_t length, int64_t window) : length(length), size(std::min(window, length)) {}
  int64_t start(int64_t place) const { return std::clamp(place - size / 2, int64_t{0}, length - size); }
};

// Keys and values that follow each other, (count, P) each.
struct Run {
  const float *k, *v;
  int64_t count;
};

// What a softmax's shares were divided by: their sum, of scores below their greatest.
struct Weight {
  float top, sum;
};

// Scores to shares of one, in place; there is room for whole vectors.
Weight share(int64_t count, float* scores) {
  std::fill(scores + count, scores + padded(count), -1e30f);
  Vector most = at(scores), sum = {};
  for (int64_t i = LANES; i < count; i += LANES) most = at(scores + i) > most ? at(scores + i) : most;
  const float top = greatest(most);
  for (int64_t i = 0; i < count; i += LANES) sum += at(scores + i) = exponential(at(scores + i) - top);
  const float all = total(sum);
  for (int64_t i = 0; i < count; i += LANES) at(scores + i) /= all;
  return {top, all};
}

// o (P) <- softmax attention to all that `o` and `more` have attended to, whose weights are `of` and `other`; the weight of all.
Weight join(int64_t p, Weight of, Weight other, const float* more, float* o) {
  const float top = std::max(of.top, other.top);
  const float own = of.sum * std::exp(of.top - top), its = other.sum * std::exp(other.top - top), all = own + its;
  for (int64_t i = 0; i < p; i += LANES) at(o + i) = at(o + i) * (own / all) + at(more + i) * (its / all);
  return {top, all};
}

// x and y in turns, `STEP` lanes each: what their sums over pairs of such groups are, in one vector.
template <int64_t STEP>
inline Vector fold(Vector x, Vector y) {
  Integers low = {}, high = {};
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) {
    low[i] = (i / STEP % 2 ? LANES : 0) + i / (2 * STEP) * 2 * STEP + i % STEP;
    high[i] = low[i] + STEP;
  }
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high);
}

// o (P) = softmax(q·kᵀ)·v over all runs. COLUMNS is P in vectors where that is known, else 0.
template <int64_t COLUMNS>
Weight attend(const std::vector<Run>& runs, int64_t p, const float* q, float* scores, float* o) {
  constexpr int64_t AT_ONCE = COLUMNS ? COLUMNS : 1;
  const int64_t columns = COLUMNS ? COLUMNS : p / LANES;
  Vector own[AT_ONCE];
  for (int64_t i = 0; i < AT_ONCE; ++i) own[i] = at(q + i * LANES);
  const auto product = [&](const float* k) {
    Vector sum = own[0] * at(k);
#pragma GCC unroll 8
    for (int64_t i = 1; i < columns; ++i) sum += (COLUMNS ? own[i % AT_ONCE] : at(q + i * LANES)) * at(k + i * LANES);
    return sum;
  };
  float* score = scores;
  for (const Run& run : runs) {
    const float *k = run.k, *end = k + run.count * p;
    for (; k + 4 * p <= end; k += 4 * p) {
      const Vector pairs = fold<1>(product(k), product(k + p)), others = fold<1>(product(k + 2 * p), product(k + 3 * p));
      Vector sum = fold<2>(pairs, others);
      if (LANES > 8) sum += __builtin_shuffle(sum, rotated<LANES / 2>());
      sum += __builtin_shuffle(sum, rotated<4>());
      for (int64_t i = 0; i < 4; ++i) *score++ = sum[i];
    }
    for (; k < end; k += p) *score++ = total(product(k));
  }
  const Weight weight = share(score - scores, scores);
  for (int64_t first = 0; first < columns; first += AT_ONCE) {
    Vector sum[AT_ONCE] = {};
    score = scores;
    for (const Run& run : runs)
      for (const float* v = run.v + first * LANES; v < run.v + run.count * p; v += p, ++score)
#pragma GCC unroll 8
        for (int64_t i = 0; i < AT_ONCE; ++i) sum[i] += *score * at(v + i * LANES);
    for (int64_t i = 0; i < AT_ONCE; ++i) at(o + (first + i) * LANES) = sum[i];
  }
  return weight;
}

using Attend = Weight (*)(const std::vector<Run>&, int64_t, const float*, float*, float*);

Attend attend_for(int64_t p) {
  switch (p / LANES) {
    case 2: return attend<2>;
    case 4: return attend<4>;
    case 5: return attend<5>;
    case 8: return attend<8>;
    default: return attend<0>;
  }
}

// One head's keys and values (M tokens), the grid's from token `first` on, and room for what a query sees of them.
template <typename T>
struct Seen {
  Tokens<T> keys, values;
  Grid grid;
  Side tall, wide;
  int64_t tokens, d, p;
  float *x, *k, *v, *scores, *o;  // (n, P); (seen, P); as many as are seen; (P)
  Attend attend;

  static int64_t off(const Tensor& k, const Grid& grid) { return k.size(1) - grid.height * grid.width; }
  static int64_t rows(const Grid& grid, int64_t window) {
    return window ? (std::max<int64_t>(1, TOKENS / grid.width) + std::min(window, grid.height)) * grid.width : 0;
  }
  static int64_t seen(const Tensor& k, const Grid& grid, int64_t window) {
    return padded(std::max(TOKENS, rows(grid, window) + off(k, grid)));
  }
  static int64_t size(const Tensor& k, const Grid& grid, int64_t window, int64_t n) {
    const int64_t p = padded(k.size(3)), most = seen(k, grid, window);
    return n * p + 2 * most * p + most + p;
  }

  Seen(Scratch& scratch, const Tensor& k_, const Tensor& v_, int64_t b, int64_t h, const Grid& grid, int64_t window, int64_t n)
      : keys(k_, b, h), values(v_, b, h), grid(grid), tall(grid.height, window), wide(grid.width, window), tokens(k_.size(1)),
        d(k_.size(3)), p(padded(d)), attend(attend_for(p)) {
    const int64_t most = seen(k_, grid, window);
    x = scratch.take(n * p), k = scratch.take(most * p), v = scratch.take(most * p);
    scores = scratch.take(most), o = scratch.take(p);
  }

  void read(int64_t start, int64_t count, int64_t to) const {
    copy(keys, start, count, d, p, nullptr, k + to * p);
    copy(values, start, count, d, p, nullptr, v + to * p);
  }

  // x (count, P) <- the queries from `start` on, scaled.
  void ask(Tokens<T> q, int64_t start, int64_t count) const {
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    copy(q, start, count, d, p, nullptr, x);
    for (int64_t i = 0; i < count * p; i += LANES) at(x + i) *= scale;
  }

  // put(t, o) for the grid's tokens t of some blocks: softmax attention of q (h·w) to a full window and to every token off the grid.
  template <typename F>
  void windows(Tokens<T> q, const Block* block, const Block* end, const F& put) const {
    const int64_t all = grid.height * grid.width, behind = grid.first + all, off = tokens - all;
    read(0, grid.first, 0);  // those off the grid come first
    read(behind, tokens - behind, grid.first);
    std::vector<Run> runs(tall.size + 1, Run{k, v, off});  // the last stays
    for (; block != end; ++block) {
      const int64_t top = tall.start(block->top), bottom = tall.start(block->top + block->rows - 1) + tall.size;
      ask(q, block->start, block->count);
      read(grid.first + top * grid.width, (bottom - top) * grid.width, off);
      for (int64_t t = 0; t < block->count; ++t) {
        const int64_t corner =
            off + (tall.start(block->top + t / grid.width) - top) * grid.width + wide.start(t % grid.width);
        for (int64_t row = 0; row < tall.size; ++row) {
          const int64_t from = (corner + row * grid.width) * p;
          runs[row] = {k + from, v + from, wide.size};
        }
        attend(runs, p, x + t * p, scores, o);
        put(block->start + t, o);
      }
    }
  }

  // put(t, o) for every step-th token off the grid, from the first-th on: softmax attention of q (N) to all tokens.
  template <typename F>
  void exact(Tokens<T> q, int64_t first, int64_t step, const F& put) const {
    const int64_t all = grid.height * grid.width;
    std::vector<int64_t> asking;
    for (int64_t i = first; i < tokens - all; i += step) asking.push_back(i < grid.first ? i : all + i);
    std::vector<float> answers(asking.size() * p);
    std::vector<Weight> weights(asking.size());
    std::vector<Run> run(1);
    for (int64_t start = 0; start < tokens && !asking.empty(); start += TOKENS) {
      run[0] = {k, v, std::min(TOKENS, tokens - start)};
      read(start, run[0].count, 0);
      for (size_t i = 0; i < asking.size(); ++i) {
        ask(q, asking[i], 1);
        const Weight found = attend(run, p, x, scores, start ? o : answers.data() + i * p);
        weights[i] = start ? join(p, weights[i], found, o, answers.data() + i * p) : found;
      }
    }
    for (size_t i = 0; i < asking.size(); ++i) put(asking[i], answers.data() + i * p);
  }
};

// q (B, h·w, H, D), k and v (B, M, H, D) with the grid from token `first` on -> o (B, h·w, H, D): softmax attention to a full
// window of the grid and to every token off the grid.
Tensor windows(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t height, int64_t width, int64_t window, int64_t first) {
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), d = q.size(3);
  const Grid grid{height, width, first};
  const Plan plan(blocks_of(tokens, {height, width, 0}, true), batch * heads);
  const int64_t n = largest(plan.blocks);
  Tensor out = at::empty({batch, tokens, heads, d}, q.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "windows", [&] {
    plan.run(Seen<scalar_t>::size(k, grid, window, n), [&](Scratch& scratch, int64_t head, int64_t part) {
      const int64_t b = head / heads, h = head % heads;
      const Seen<scalar_t> seen(scratch, k, v, b, h, grid, window, n);
      scalar_t* to = out.data_ptr<scalar_t>() + (b * tokens * heads + h) * d;
      seen.windows({q, b, h}, plan.begin_of(part), plan.begin_of(part + 1), [&](int64_t t, const float* o) {
        write(o, d, to + t * heads * d);
      });
    });
  });
  return out;
}

// o (B, N, H, D) of a mixer's answers and q, k, v of the same shape: on the grid (1 - m)·mixed + m·windows with a share m (H,) for
// each head, and the mixer's where `window` is 0; off it softmax attention to all, or the mixer's where that is not `exact`.
Tensor joined(
    const Tensor& mixed, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mix, int64_t height,
    int64_t width, int64_t first, int64_t window, bool exact) {
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), d = q.size(3);
  const Grid grid{height, width, first};
  const Plan plan(blocks_of(height * width, {height, width, 0}, true), batch * heads);
  const int64_t n = window ? largest(plan.blocks) : 1, behind = first + height * width;  // queries at once
  Tensor out = at::empty({batch, tokens, heads, d}, q.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "joined", [&] {
    plan.run(Seen<scalar_t>::size(k, grid, window, n), [&](Scratch& scratch, int64_t head, int64_t part) {
      const int64_t b = head / heads, h = head % heads;
      const float share = mix ? mix->const_data_ptr<float>()[h] : 0.5f;
      const Tokens<scalar_t> queries(q, b, h), answers(mixed, b, h);
      const Seen<scalar_t> seen(scratch, k, v, b, h, grid, window, n);
      scalar_t* to = out.data_ptr<scalar_t>() + (b * tokens * heads + h) * d;
      const Block *begin = plan.begin_of(part), *end = plan.begin_of(part + 1);
      const auto keep = [&](int64_t start, int64_t stop) {
        for (int64_t t = start; t < stop; ++t) std::copy_n(answers.data + t * answers.stride, d, to + t * heads * d);
      };
      if (window)
        seen.windows(queries.from(first), begin, end, [&](int64_t t, const float* o) {
          const scalar_t* other = answers.data + (first + t) * answers.stride;
          for (int64_t j = 0; j < d; ++j) {
            const float mixers = static_cast<float>(other[j]);
            to[(first + t) * heads * d + j] = static_cast<scalar_t>(mixers + share * (o[j] - mixers));
          }
        });
      else
        for (const Block* block = begin; block != end; ++block) keep(first + block->start, first + block->start + block->count);
      if (exact)
        seen.exact(queries, part, plan.parts, [&](int64_t t, const float* o) { write(o, d, to + t * heads * d); });
      else if (part == 0)
        keep(0, first), keep(behind, tokens);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lineate, library) {
  library.def("cpu_statistics(Tensor k, float eps) -> Tensor");
  library.def(
      "cpu_learn(Tensor k, Tensor v, Tensor? norm, Tensor[] taps, Tensor[] weights, SymInt height, SymInt width, SymInt first, "
      "bool l2) -> Tensor");
  library.def(
      "cpu_aligned(Tensor q, Tensor k, Tensor v, Tensor[] convolutions, Tensor[] weights, float? eps, SymInt height, SymInt width, "
      "SymInt first, bool l2) -> Tensor");
  library.def(
      "cpu_windows(Tensor q, Tensor k, Tensor v, SymInt height, SymInt width, SymInt window, SymInt first) -> Tensor");
  library.def(
      "cpu_joined(Tensor mixed, Tensor q, Tensor k, Tensor v, Tensor? mix, SymInt height, SymInt width, SymInt first, "
      "SymInt window, bool exact) -> Tensor");
  library.def("cpu_answer(Tensor q, Tensor[] taps, Tensor[] weights, SymInt height, SymInt width, SymInt first) -> Tensor");
}

TORCH_LIBRARY_IMPL(lineate, CPU, library) {
  library.impl("cpu_statistics", statistics);
  library.impl("cpu_learn", learn);
  library.impl("cpu_answer", answer);
  library.impl("cpu_aligned", aligned);
  library.impl("cpu_windows", windows);
  library.impl("cpu_joined", joined);
}
