// A T⁵ core's middle on CPUs: key norm, convolutions and inner step, on blocks of tokens that stay in a core's cache.
//
//     statistics   offset -mean·r and scale r = 1/√(var + ε) of every key channel; tokens about their own mean, joined exactly
//     learn        G = Σ ∂(L/c)/∂W (k̂, v)
//     answer       o = f_W'(q̂)
//
//     windows      neighborhood attention;  joined  that beside a mixer's answers, and exact attention off the grid
//     core         all of these, head by head: what lies between them stays in a core's cache, and one call does it
//
// The equations are those of lineate/ops/ttt.py; lineate/core.py calls `core` where nothing learns, and otherwise
// lineate/ops/aligned_cpu.py the first three, which it differentiates. Everything is computed in fp32. A block is read out of the projection as it lies,
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
constexpr int64_t PAD = 16;      // P is a multiple of it, and so are the lengths of most rows
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
template <int64_t COLS, int64_t HIGH = ROWS>
inline void tile(
    int64_t depth, const float* a, int64_t a_row, int64_t a_inner, const float* b, float* c, int64_t width, bool add) {
  Vector sum[HIGH][COLS];
  for (int64_t r = 0; r < HIGH; ++r)
    for (int64_t j = 0; j < COLS; ++j) sum[r][j] = add ? at(c + r * width + j * LANES) : Vector{};
  for (int64_t p = 0; p < depth; ++p) {
    Vector row[COLS];
    for (int64_t j = 0; j < COLS; ++j) row[j] = at(b + p * width + j * LANES);
#pragma GCC unroll 8
    for (int64_t r = 0; r < HIGH; ++r)
#pragma GCC unroll 4
      for (int64_t j = 0; j < COLS; ++j) sum[r][j] += a[r * a_row + p * a_inner] * row[j];
  }
  for (int64_t r = 0; r < HIGH; ++r)
    for (int64_t j = 0; j < COLS; ++j) at(c + r * width + j * LANES) = sum[r][j];
}

// c (rows, width) (+)= a (rows, depth)·b (depth, width), where the width is a multiple of PAD.
void product(
    int64_t rows, int64_t depth, int64_t width, const float* a, int64_t a_row, int64_t a_inner, const float* b, float* c,
    bool add) {
  for (int64_t start = 0; start < depth; start += DEPTH) {
    const int64_t deep = std::min(DEPTH, depth - start);
    const bool sum = add || start > 0;
    for (int64_t column = 0; column < width;) {
      const bool full = width - column >= COLUMNS * LANES;
      for (int64_t row = 0; row < rows;) {
        const float *left = a + row * a_row + start * a_inner, *right = b + start * width + column;
        float* out = c + row * width + column;
        const bool high = rows - row >= ROWS;
        const auto one = high ? full ? tile<COLUMNS> : tile<1> : full ? tile<COLUMNS, 1> : tile<1, 1>;
        one(deep, left, a_row, a_inner, right, out, width, sum);
        row += high ? ROWS : 1;
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

// The kernel of x + DWC(x) of a convolution, weight (C, 1, 3, 3) and bias (C,): head h's taps and its bias as (10, P).
void pack_taps(at::TensorList convolution, int64_t h, int64_t d, int64_t p, float* out) {
  if (convolution.empty()) return;
  const Tensor &weight = convolution[0], &bias = convolution[1];
  numbers_of(weight, [&](auto* taps) {
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < 9; ++j) out[j * p + i] = static_cast<float>(taps[(h * d + i) * 9 + j]) + (j == 4);
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
    see(k, *block, grid, d, p, lens, m.pixels, m.x);
    copy(v, block->start, block->count, d, p, nullptr, m.e);
    step(m, block->count, p);
  }
}

// k, v (B, N, H, D), norm (B, 2, H, D), a convolution or nothing, weights (H, D, D) each -> G, (M, B, H, D, D).
Tensor learn(
    const Tensor& k, const Tensor& v, const std::optional<Tensor>& norm, at::TensorList convolution, at::TensorList weights,
    int64_t height, int64_t width, int64_t first, bool l2) {
  const int64_t batch = k.size(0), tokens = k.size(1), heads = k.size(2), d = k.size(3), p = padded(d);
  const int64_t matrices = weights.size();
  const Grid grid{height, width, first};
  const Plan plan(blocks_of(tokens, grid, !convolution.empty()), batch * heads);
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
      pack_taps(convolution, h, d, p, kernel);
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
    see(q, *block, grid, d, p, {nullptr, taps}, pixels, x);
    times(block->count, p, x, in, z);
    if (gates) times(block->count, p, x, gates, y);
    gate(block->count * p, z, gates ? y : nullptr);
    times(block->count, p, z, back, x);
    T* row = to + block->start * stride;
    for (int64_t t = 0; t < block->count; ++t, row += stride) write(x + t * p, d, row);
  }
}

// q (B, N, H, D), a convolution or nothing, fitted weights (B, H, D, D) each -> o (B, N, H, D) in q's type.
Tensor answer(
    const Tensor& q, at::TensorList convolution, at::TensorList weights, int64_t height, int64_t width, int64_t first) {
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), d = q.size(3), p = padded(d);
  const bool gated = weights.size() == 3;
  const Grid grid{height, width, first};
  const Plan plan(blocks_of(tokens, grid, !convolution.empty()), batch * heads);
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
      pack_taps(convolution, h, d, p, kernel);
      answer_blocks<scalar_t>(
          {q, b, h}, out.data_ptr<scalar_t>() + (b * tokens * heads + h) * d, heads * d, plan.begin_of(part),
          plan.begin_of(part + 1), grid, d, p, kernel, in, gated ? gates : nullptr, back, pixels, x, z, y);
    });
  });
  return out;
}

// --------------------------------------------------------------------------------------------------------------------- windows

// A window along one side: where it begins for the query at `place`, shifted inwards at the border.
struct Side {
  int64_t length, size;
  Side(int64_t length, int64_t window) : length(length), size(std::min(window, length)) {}
  int64_t start(int64_t place) const { return std::clamp(place - size / 2, int64_t{0}, length - size); }
};

// LANES vectors <- their transpose.
template <int64_t STEP = 1>
inline void transpose(Vector* x) {
  Integers low = {}, high = {};
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) {
    low[i] = i & STEP ? LANES + i - STEP : i;
    high[i] = i & STEP ? LANES + i : i + STEP;
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i)
    if (!(i & STEP)) {
      const Vector a = x[i], b = x[i + STEP];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + STEP] = __builtin_shuffle(a, b, high);
    }
  if constexpr (2 * STEP < LANES) transpose<2 * STEP>(x);
}

// P / LANES blocks of LANES × LANES, `step` after each other, are transposed to where `out` is; rows lie `pitch` apart.
inline void turn(int64_t p, const float* x, int64_t pitch, int64_t step, float* out, int64_t out_pitch, int64_t out_step) {
  for (int64_t i = 0; i < p; i += LANES, x += step, out += out_step) {
    Vector part[LANES];
#pragma GCC unroll 16
    for (int64_t j = 0; j < LANES; ++j) part[j] = at(x + j * pitch);
    transpose(part);
#pragma GCC unroll 16
    for (int64_t j = 0; j < LANES; ++j) at(out + j * out_pitch) = part[j];
  }
}

// out (P, pitch) <- the transpose of x (count, D), in whole vectors of tokens; `tile` has room for one, (LANES, P).
template <typename T>
void copy_turned(Tokens<T> x, int64_t start, int64_t count, int64_t d, int64_t p, float* tile, float* out, int64_t pitch) {
  for (int64_t t = 0; t < count; t += LANES) {
    copy(x, start + t, std::min(LANES, count - t), d, p, nullptr, tile);
    turn(p, tile, p, LANES, out + t, pitch, LANES * pitch);
  }
}

// f(`some` as a constant), which is at most MOST.
template <int64_t MOST, typename F>
inline void constant(int64_t some, const F& f) {
  if constexpr (MOST > 1)
    if (some < MOST) return constant<MOST - 1>(some, f);
  f(std::integral_constant<int64_t, MOST>());
}

// What LANES queries of a row of the grid see, and those of the next row, which see mostly the same and are answered with them: the
// `off` tokens off the grid, x (off, P), and of `rows` rows of the grid from top[query row] on, which lie channel by channel in
// slots (P, pitch), `columns` tokens each from column left + to[i] on.
struct Sight {
  static constexpr int64_t AT_ONCE = 5, TOGETHER = 2;
  int64_t d, p, off, pitch, rows, columns, together = 1, top[TOGETHER] = {}, left = 0;
  Integers to = {};
  bool shifted = false;  // or the i-th sees from left + i on

  int64_t count() const { return off + rows * columns; }

  // f(first query row, how many as a constant, how many keys as a constant, each query row's number of the first key, x(channel, j)
  // of the j-th), until all are named.
  template <typename F>
  void each(const float* around, const float* grid, const F& f) const {
    const auto name = [&](int64_t query, int64_t queries, int64_t keys, const int64_t* number, const auto& x) {
      constant<TOGETHER>(queries, [&](auto many) { constant<AT_ONCE>(keys, [&](auto some) { f(query, many, some, number, x); }); });
    };
    int64_t number[TOGETHER] = {};
    const auto count_on = [&](int64_t query, int64_t queries, int64_t keys) {
      for (int64_t i = 0; i < queries; ++i) number[query + i] += keys;
    };
    for (int64_t t = 0, some; t < off; t += some, count_on(0, together, some)) {
      const float* from = around + t * p;
      some = std::min(AT_ONCE, off - t);
      name(0, together, some, number, [=, this](int64_t c, int64_t j) { return Vector{} + from[j * p + c]; });
    }
    for (int64_t row = top[0]; row < top[together - 1] + rows; ++row) {
      const int64_t query = row >= top[0] + rows, queries = (row < top[together - 1] ? 1 : together) - query;
      for (int64_t column = 0, some; column < columns; column += some, count_on(query, queries, some)) {
        const float* from = grid + row % (rows + 1) * p * pitch + left + column;
        some = std::min(AT_ONCE, columns - column);
        if (shifted)
          name(query, queries, some, number + query, [from, wide = pitch, by = to](int64_t c, int64_t j) {
            return __builtin_shuffle(at(from + c * wide + j), by);
          });
        else
          name(query, queries, some, number + query, [from, wide = pitch](int64_t c, int64_t j) { return at(from + c * wide + j); });
      }
    }
  }

  // The queries from `column` on.
  void look(const Side& wide, int64_t column) {
    left = wide.start(column), shifted = false;
    for (int64_t i = 0; i < LANES; ++i) {
      to[i] = wide.start(std::min(column + i, wide.length - 1)) - left;
      shifted |= to[i] != i;
    }
  }

  // o (query rows, P, LANES) = softmax(q·kᵀ/√D)·v of q alike; `scores` has room for one (LANES) of every query row and key.
  void attend(
      const float* q, const float* around_k, const float* k, const float* around_v, const float* v, float* scores,
      float* o) const {
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    const int64_t depth = d, all = count() * LANES, size = p * LANES;
    Vector most[TOGETHER], sum[TOGETHER];
    for (Vector& x : most) x = Vector{} - 1e30f;
    each(around_k, k, [&](int64_t query, auto many, auto some, const int64_t* number, const auto& key) {
      Vector score[many][some] = {};
      const float* own = q + query * size;
      for (int64_t c = 0; c < depth; ++c)
#pragma GCC unroll 8
        for (int64_t j = 0; j < some; ++j) {
          const Vector x = key(c, j);
#pragma GCC unroll 2
          for (int64_t i = 0; i < many; ++i) score[i][j] += at(own + i * size + c * LANES) * x;
        }
      for (int64_t i = 0; i < many; ++i)
        for (int64_t j = 0; j < some; ++j) {
          Vector& top = most[query + i];
          top = score[i][j] > top ? score[i][j] : top;
          at(scores + (query + i) * all + (number[i] + j) * LANES) = score[i][j];
        }
    });
    for (int64_t i = 0; i < together; ++i) {
      sum[i] = Vector{};
      for (int64_t j = i * all; j < (i + 1) * all; j += LANES)
        sum[i] += at(scores + j) = exponential((at(scores + j) - most[i]) * scale);
      sum[i] = 1.0f / sum[i];
    }
    std::fill_n(o, together * size, 0.0f);
    each(around_v, v, [&](int64_t query, auto many, auto some, const int64_t* number, const auto& value) {
      Vector share[many][some];
      for (int64_t i = 0; i < many; ++i)
        for (int64_t j = 0; j < some; ++j)
          share[i][j] = at(scores + (query + i) * all + (number[i] + j) * LANES) * sum[query + i];
      float* own = o + query * size;
      for (int64_t c = 0; c < depth; ++c) {
        Vector out[many];
#pragma GCC unroll 2
        for (int64_t i = 0; i < many; ++i) out[i] = at(own + i * size + c * LANES);
#pragma GCC unroll 8
        for (int64_t j = 0; j < some; ++j) {
          const Vector x = value(c, j);
#pragma GCC unroll 2
          for (int64_t i = 0; i < many; ++i) out[i] += share[i][j] * x;
        }
#pragma GCC unroll 2
        for (int64_t i = 0; i < many; ++i) at(own + i * size + c * LANES) = out[i];
      }
    });
  }
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
  std::fill(scores + (count + LANES - 1) / LANES * LANES, scores + padded(count), 0.0f);
  return {top, all};
}

// o (P) <- softmax attention to all that `o` and `more` have attended to, whose weights are `of` and `other`; the weight of all.
Weight merge(int64_t p, Weight of, Weight other, const float* more, float* o) {
  const float top = std::max(of.top, other.top);
  const float own = of.sum * std::exp(of.top - top), its = other.sum * std::exp(other.top - top), all = own + its;
  for (int64_t i = 0; i < p; i += LANES) at(o + i) = at(o + i) * (own / all) + at(more + i) * (its / all);
  return {top, all};
}

// How much room a head's softmax branches take; `window` 0 is no window, and without `exact` nobody asks for all.
struct Room {
  Grid grid;
  Side tall, wide;
  int64_t tokens, d, p, off, asking, pitch, slots, around, seen, piece;

  Room(const Tensor& k, const Grid& grid, int64_t window, bool exact)
      : grid(grid), tall(grid.height, window), wide(grid.width, window), tokens(k.size(1)), d(k.size(3)), p(padded(d)),
        off(tokens - grid.height * grid.width), asking(exact ? off : 0), pitch(padded(grid.width)),
        slots((tall.size + 1) * p * pitch + PAD), around(window ? off * p : 0), seen(window ? off + tall.size * wide.size : 0),
        piece(asking ? TOKENS * p : 0) {}

  int64_t size() const {
    return 2 * (slots + around + piece) + (5 * LANES + 3 * asking) * p + Sight::TOGETHER * seen * LANES + asking * TOKENS;
  }
};

// A head's softmax branches: windows for tokens of the grid, which see those off it too, and for these exact attention to all.
template <typename T>
class Branches : Room {
 public:
  Branches(Scratch& scratch, const Room& room, const Tensor& k_, const Tensor& v_, int64_t b, int64_t h)
      : Room(room), keys(k_, b, h), values(v_, b, h) {
    for (float** rows : {&k, &v}) *rows = scratch.take(slots);
    for (float** some : {&around_k, &around_v}) *some = scratch.take(around);
    tile = scratch.take(LANES * p);
    for (float** block : {&queries, &o}) *block = scratch.take(Sight::TOGETHER * LANES * p);
    scores = scratch.take(Sight::TOGETHER * seen * LANES);
    for (float** part : {&all_k, &all_v}) *part = scratch.take(piece);
    for (float** block : {&all_q, &answers, &more}) *block = scratch.take(asking * p);
    all_scores = scratch.take(asking * TOKENS);
  }

  // put(t, o) for the grid's tokens of some rows: softmax attention of q (h·w) to a full window and to every token off the grid.
  template <typename F>
  void windows(Tokens<T> q, int64_t row, int64_t end, const F& put) const {
    const int64_t behind = grid.first + grid.height * grid.width;
    for (const auto& [all, some] : {std::pair(keys, around_k), std::pair(values, around_v)}) {
      copy(all, 0, grid.first, d, p, nullptr, some);
      copy(all, behind, tokens - behind, d, p, nullptr, some + grid.first * p);
    }
    Sight sight{d, p, off, pitch, tall.size, wide.size};
    for (int64_t read = tall.start(row); row < end; row += sight.together) {
      sight.together = std::min(Sight::TOGETHER, end - row);
      for (int64_t i = 0; i < sight.together; ++i) sight.top[i] = tall.start(row + i);
      for (; read < tall.start(row + sight.together - 1) + tall.size; ++read) {  // each row of the grid once
        const int64_t slot = read % (tall.size + 1) * p * pitch, start = grid.first + read * grid.width;
        copy_turned(keys, start, grid.width, d, p, tile, k + slot, pitch);
        copy_turned(values, start, grid.width, d, p, tile, v + slot, pitch);
      }
      for (int64_t column = 0; column < grid.width; column += LANES) {
        const int64_t count = std::min(LANES, grid.width - column);
        sight.look(wide, column);
        for (int64_t i = 0; i < sight.together; ++i)
          copy_turned(q, (row + i) * grid.width + column, count, d, p, tile, queries + i * p * LANES, LANES);
        sight.attend(queries, around_k, k, around_v, v, scores, o);
        for (int64_t i = 0; i < sight.together; ++i) {
          turn(p, o + i * p * LANES, LANES, LANES * LANES, tile, p, LANES);
          for (int64_t t = 0; t < count; ++t) put((row + i) * grid.width + column + t, tile + t * p);
        }
      }
    }
  }

  // put(t, o) for every step-th token off the grid, from the first-th on: softmax attention of q (N) to all tokens.
  template <typename F>
  void exact(Tokens<T> q, int64_t first, int64_t step, const F& put) const {
    std::vector<int64_t> who;
    for (int64_t i = first; i < asking; i += step) who.push_back(i < grid.first ? i : grid.height * grid.width + i);
    if (who.empty()) return;
    const int64_t count = who.size();
    for (int64_t i = 0; i < count; ++i) copy(q, who[i], 1, d, p, nullptr, all_q + i * p);
    for (int64_t i = 0; i < count * p; i += LANES) at(all_q + i) /= std::sqrt(static_cast<float>(d));
    std::vector<Weight> weights(count);
    for (int64_t start = 0; start < tokens; start += TOKENS) {
      const int64_t some = std::min(TOKENS, tokens - start), whole = padded(some);
      copy_turned(keys, start, some, d, p, tile, all_k, whole);
      copy(values, start, some, d, p, nullptr, all_v);
      std::fill_n(all_v + some * p, (whole - some) * p, 0.0f);
      product(count, d, whole, all_q, p, 1, all_k, all_scores, false);
      std::vector<Weight> found;
      for (int64_t i = 0; i < count; ++i) found.push_back(share(some, all_scores + i * whole));
      product(count, whole, p, all_scores, whole, 1, all_v, start ? more : answers, false);
      for (int64_t i = 0; i < count; ++i)
        weights[i] = start ? merge(p, weights[i], found[i], more + i * p, answers + i * p) : found[i];
    }
    for (int64_t i = 0; i < count; ++i) put(who[i], answers + i * p);
  }

  // to (N, D with a stride), a mixer's answers to q (N): on the grid's rows <- (1 - m)·to + m·windows where there are some, and
  // off it exact attention's for every parts-th token, where that is asked for.
  void join(Tokens<T> q, T* to, int64_t stride, float m, int64_t row, int64_t end, int64_t part, int64_t parts) const {
    if (tall.size)
      windows(q.from(grid.first), row, end, [&](int64_t t, const float* near) {
        T* own = to + (grid.first + t) * stride;
        for (int64_t i = 0; i < d; ++i) {
          const float mixers = static_cast<float>(own[i]);
          own[i] = static_cast<T>(mixers + m * (near[i] - mixers));
        }
      });
    exact(q, part, parts, [&](int64_t t, const float* all) { write(all, d, to + t * stride); });
  }

 private:
  Tokens<T> keys, values;
  float *k, *v, *around_k, *around_v;           // (P, pitch) of each row of a window; (off, P)
  float *tile, *queries, *o, *scores;           // (LANES, P), (P, LANES), (P, LANES), (seen, LANES)
  float *all_k, *all_v;                         // (P, n), (n, P)
  float *all_q, *answers, *more, *all_scores;   // (asking, P), (asking, n)
};

// The rows of a grid that are a part of some work.
std::pair<int64_t, int64_t> rows_of(const Plan& plan, int64_t part) {
  const Block& last = plan.begin_of(part + 1)[-1];
  return {plan.begin_of(part)->top, last.top + last.rows};
}

// q (B, h·w, H, D), k and v (B, M, H, D) with the grid from token `first` on -> o (B, h·w, H, D): softmax attention to a full
// window of the grid and to every token off the grid.
Tensor windows(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t height, int64_t width, int64_t window, int64_t first) {
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), d = q.size(3);
  const Plan plan(blocks_of(tokens, {height, width, 0}, true), batch * heads);
  const Room room(k, {height, width, first}, window, false);
  Tensor out = at::empty({batch, tokens, heads, d}, q.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "windows", [&] {
    plan.run(room.size(), [&](Scratch& scratch, int64_t head, int64_t part) {
      const int64_t b = head / heads, h = head % heads;
      const auto [row, end] = rows_of(plan, part);
      scalar_t* to = out.data_ptr<scalar_t>() + (b * tokens * heads + h) * d;
      Branches<scalar_t>(scratch, room, k, v, b, h).windows({q, b, h}, row, end, [&](int64_t t, const float* o) {
        write(o, d, to + t * heads * d);
      });
    });
  });
  return out;
}

// What joins a mixer: windows where `window` is not 0, with a share sigmoid(logit) for each head or one half, and exact attention.
struct Joins {
  const std::optional<Tensor>& mix_logit;  // (H,)
  int64_t window;
  bool exact;
  bool any() const { return window > 0 || exact; }
  float mix(int64_t h) const {
    float share = 0.5f;
    if (mix_logit)
      numbers_of(*mix_logit, [&](auto* logits) {
        share = 1.0f / (1.0f + std::exp(-static_cast<float>(logits[h * mix_logit->stride(0)])));
      });
    return share;
  }
};

// out (B, N, H, D), dense, are a mixer's answers to q, k, v of the same shape, and become those with all that joins them.
void join_in_place(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Joins& joins, const Grid& grid) {
  const int64_t tokens = q.size(1), heads = q.size(2), d = q.size(3);
  const Plan plan(blocks_of(grid.height * grid.width, {grid.height, grid.width, 0}, true), q.size(0) * heads);
  const Room room(k, grid, joins.window, joins.exact);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "joined", [&] {
    plan.run(room.size(), [&](Scratch& scratch, int64_t head, int64_t part) {
      const int64_t b = head / heads, h = head % heads;
      const auto [row, end] = rows_of(plan, part);
      scalar_t* to = out.data_ptr<scalar_t>() + (b * tokens * heads + h) * d;
      Branches<scalar_t>(scratch, room, k, v, b, h).join({q, b, h}, to, heads * d, joins.mix(h), row, end, part, plan.parts);
    });
  });
}

// The same, of answers (B, N, H, D) that stay as they are.
Tensor joined(
    const Tensor& mixed, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mix_logit, int64_t height,
    int64_t width, int64_t first, int64_t window, bool exact) {
  Tensor out = mixed.clone(at::MemoryFormat::Contiguous);
  join_in_place(out, q, k, v, {mix_logit, window, exact}, {height, width, first});
  return out;
}

// ------------------------------------------------------------------------------------------------------------------------ core

// w (P, P) <- w - c·g
void descend(int64_t p, float c, const float* g, float* w) {
  for (int64_t i = 0; i < p * p; i += LANES) at(w + i) -= c * at(g + i);
}

// q, k, v (B, N, H, D), the queries' and the keys' convolutions, weights (H, D, D) each -> o (B, N, H, D), where every head is one
// thread's.
Tensor by_head(
    const Tensor& q, const Tensor& k, const Tensor& v, at::TensorList convolutions, at::TensorList weights,
    std::optional<double> eps, bool l2, const Joins& joins, const Grid& grid, const Plan& plan) {
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), d = q.size(3), p = padded(d);
  const int64_t n = largest(plan.blocks), image = image_size(plan.blocks, grid, p);
  const Block *begin = plan.blocks.data(), *end = begin + plan.blocks.size();
  const float c = 1.0f / (std::sqrt(static_cast<float>(d)) * tokens);
  const Room room(k, grid, joins.window, joins.exact);
  const int64_t joining = joins.any() ? room.size() : 0;
  Tensor out = at::empty({batch, tokens, heads, d}, q.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "core", [&] {
    plan.run(Inner::size(image, n, p) + (22 + FEW + 2) * p + joining, [&](Scratch& scratch, int64_t head, int64_t) {
      const int64_t b = head / heads, h = head % heads;
      const Tokens<scalar_t> queries(q, b, h), keys(k, b, h), values(v, b, h);
      const Inner m(scratch, weights, h, l2, image, n, p);
      float *norm = scratch.take(2 * p), *q_kernel = scratch.take(10 * p), *k_kernel = scratch.take(10 * p);
      if (eps) affine(moments(keys, 0, tokens, d, scratch), *eps, d, norm, norm + p);
      pack_taps(convolutions.slice(0, convolutions.size() / 2), h, d, p, q_kernel);
      pack_taps(convolutions.slice(convolutions.size() / 2), h, d, p, k_kernel);
      learn_blocks(m, keys, values, begin, end, grid, d, p, {eps ? norm : nullptr, k_kernel});
      descend(p, c, m.g_in, m.in);
      if (m.gated) descend(p, c, m.g_gate, m.gate);
      descend(p, c, m.g_out, m.out);
      scalar_t* to = out.data_ptr<scalar_t>() + (b * tokens * heads + h) * d;
      answer_blocks(
          queries, to, heads * d, begin, end, grid, d, p, q_kernel, m.in, m.gated ? m.gate : nullptr, m.out, m.pixels, m.x, m.z,
          m.y);
      if (joins.any())
        Branches<scalar_t>(scratch, room, k, v, b, h).join(queries, to, heads * d, joins.mix(h), 0, grid.height, 0, 1);
    });
  });
  return out;
}

// The same, a part of a head a thread, one of the three after the other.
Tensor by_part(
    const Tensor& q, const Tensor& k, const Tensor& v, at::TensorList convolutions, at::TensorList weights,
    std::optional<double> eps, bool l2, const Grid& grid) {
  std::optional<Tensor> norm;
  if (eps) norm = statistics(k, *eps);
  const Tensor sums = learn(k, v, norm, convolutions.slice(convolutions.size() / 2), weights, grid.height, grid.width, grid.first, l2);
  const double c = 1.0 / (std::sqrt(static_cast<double>(q.size(3))) * q.size(1));
  std::vector<Tensor> fitted;
  for (size_t i = 0; i < weights.size(); ++i) fitted.push_back(weights[i].to(at::kFloat).sub(sums.select(0, i), c).contiguous());
  return answer(q, convolutions.slice(0, convolutions.size() / 2), fitted, grid.height, grid.width, grid.first);
}

// q, k, v (B, H, N, D) as they lie -> o (B, H, N, D), laid out by tokens: T⁵'s three steps, and what joins them.
Tensor core(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, at::TensorList convolutions_, at::TensorList weights_,
    std::optional<double> eps, const std::optional<Tensor>& mix_logit, int64_t height, int64_t width, int64_t first, bool l2,
    int64_t window, bool exact) {
  const auto by_token = [](const Tensor& x) { return (x.stride(-1) == 1 ? x : x.contiguous()).transpose(1, 2); };
  const auto dense = [](at::TensorList all) {
    std::vector<Tensor> lie;
    for (const Tensor& x : all) lie.push_back(x.contiguous());
    return lie;
  };
  const Tensor q = by_token(q_), k = by_token(k_), v = by_token(v_);
  const std::vector<Tensor> convolutions = dense(convolutions_), weights = dense(weights_);
  const Grid grid{height, width, first};
  const Joins joins{mix_logit, window, exact};
  const Plan plan(blocks_of(q.size(1), grid, !convolutions.empty()), q.size(0) * q.size(2));
  if (plan.parts == 1) return by_head(q, k, v, convolutions, weights, eps, l2, joins, grid, plan).transpose(1, 2);
  const Tensor out = by_part(q, k, v, convolutions, weights, eps, l2, grid);
  if (joins.any()) join_in_place(out, q, k, v, joins, grid);
  return out.transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lineate, library) {
  library.def("cpu_statistics(Tensor k, float eps) -> Tensor");
  library.def(
      "cpu_learn(Tensor k, Tensor v, Tensor? norm, Tensor[] convolution, Tensor[] weights, SymInt height, SymInt width, SymInt first, "
      "bool l2) -> Tensor");
  library.def(
      "cpu_core(Tensor q, Tensor k, Tensor v, Tensor[] convolutions, Tensor[] weights, float? eps, Tensor? mix_logit, SymInt height, "
      "SymInt width, SymInt first, bool l2, SymInt window, bool exact) -> Tensor");
  library.def(
      "cpu_windows(Tensor q, Tensor k, Tensor v, SymInt height, SymInt width, SymInt window, SymInt first) -> Tensor");
  library.def(
      "cpu_joined(Tensor mixed, Tensor q, Tensor k, Tensor v, Tensor? mix_logit, SymInt height, SymInt width, SymInt first, "
      "SymInt window, bool exact) -> Tensor");
  library.def("cpu_answer(Tensor q, Tensor[] convolution, Tensor[] weights, SymInt height, SymInt width, SymInt first) -> Tensor");
}

TORCH_LIBRARY_IMPL(lineate, CPU, library) {
  library.impl("cpu_statistics", statistics);
  library.impl("cpu_learn", learn);
  library.impl("cpu_answer", answer);
  library.impl("cpu_core", core);
  library.impl("cpu_windows", windows);
  library.impl("cpu_joined", joined);
}
