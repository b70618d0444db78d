// Matrix products on one thread, near the core's peak: c = a b, or c += a b, in float32.
//
// Each product runs on the calling thread; callers give different products to different threads. b is first packed into
// panels as wide as a tile of registers, so the innermost loop reads it sequentially. a is read in place or packed into
// strips; both may be transposed. Panels come from the caller's Scratch, or are a fixed buffer of each thread.
//
// Sums run over k in order. A row of c does not depend on how many other rows there are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"

namespace dsv3 {

#if defined(__AVX512F__)
constexpr int kVectors = 4;      // registers across a tile
constexpr int64_t kDepth = 512;  // rows of a panel multiplied at a time: they stay in the core's cache
#else
constexpr int kVectors = 2;
constexpr int64_t kDepth = 256;
#endif
constexpr int kTileRows = 6;
constexpr int64_t kPanelWidth = kVectors * kLanes;
constexpr int64_t kRows = 256;  // rows of a packed at a time, kDepth numbers each: they stay in cache over all panels

// Scratch memory of one thread, reused by its later calls. Each array starts at a cache line and is uninitialised. A
// thread may have one Scratch at a time, because all of them are the same memory.
class Scratch {
 public:
  // Reserves memory for `parts` arrays that have `total` floats together.
  explicit Scratch(int64_t total, int64_t parts) {
    thread_local std::vector<float> memory;
    total += (parts + 1) * kLine;
    if (static_cast<int64_t>(memory.size()) < total) memory = std::vector<float>(total);
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    next_ = memory.data() + (64 - at % 64) % 64 / sizeof(float);
  }

  // Returns the next array, of `count` floats.
  float* Take(int64_t count) {
    float* taken = next_;
    next_ += (count + kLine - 1) / kLine * kLine;
    return taken;
  }

 private:
  float* next_;
};

// Returns a distance between rows of `width` floats, chosen so that neighbouring rows map to different cache sets.
inline int64_t Step(int64_t width) { return (width + kLine - 1) / kLine * kLine + kLine; }

// Returns how many floats b [depth, width] takes when it is packed into panels.
inline int64_t PackedSize(int64_t depth, int64_t width) {
  return depth * ((width + kPanelWidth - 1) / kPanelWidth * kPanelWidth);
}

// Transposes a 4 × 4 square: to[q · kPanelWidth + r] = from[r · step + q].
inline void TransposeSquare(const float* from, int64_t step, float* to) {
#if defined(__x86_64__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + step), c = _mm_loadu_ps(from + 2 * step),
         d = _mm_loadu_ps(from + 3 * step);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + kPanelWidth, b), _mm_storeu_ps(to + 2 * kPanelWidth, c);
  _mm_storeu_ps(to + 3 * kPanelWidth, d);
#else
  for (int q = 0; q < 4; ++q)
    for (int r = 0; r < 4; ++r) to[q * kPanelWidth + r] = from[r * step + q];
#endif
}

// Packs the first `columns` columns of b into a panel [depth, kPanelWidth], padded with zeros. b is [depth, ·], or
// `transposed` [·, depth]; its rows are `step` apart.
inline void PackPanel(const float* b, int64_t step, bool transposed, int64_t depth, int64_t columns, float* to) {
  if (!transposed) {
    for (int64_t k = 0; k < depth; ++k, to += kPanelWidth) {
      const float* row = b + k * step;
      if (columns == kPanelWidth) {
        for (int v = 0; v < kVectors; ++v) Store(to + v * kLanes, Load(row + v * kLanes));
      } else {
        std::memcpy(to, row, columns * sizeof(float));
        std::fill(to + columns, to + kPanelWidth, 0.0f);
      }
    }
    return;
  }
  const int64_t square_columns = columns / 4 * 4, square_depth = depth / 4 * 4;
  for (int64_t k = 0; k < square_depth; k += kLine)  // use all of a cache line while it is in cache
    for (int64_t r = 0; r < square_columns; r += 4)
      for (int64_t q = k; q < std::min(k + kLine, square_depth); q += 4)
        TransposeSquare(b + r * step + q, step, to + q * kPanelWidth + r);
  for (int64_t k = 0; k < depth; ++k, to += kPanelWidth) {
    for (int64_t r = k < square_depth ? square_columns : 0; r < columns; ++r) to[r] = b[r * step + k];
    std::fill(to + columns, to + kPanelWidth, 0.0f);
  }
}

// Packs all of b into panels; panel j holds the columns from j · kPanelWidth on. b is [depth, width], or `transposed`
// [width, depth]; its rows are `step` apart.
inline void Pack(const float* b, int64_t step, bool transposed, int64_t depth, int64_t width, float* to) {
  for (int64_t n = 0; n < width; n += kPanelWidth, to += depth * kPanelWidth)
    PackPanel(b + n * (transposed ? step : 1), step, transposed, depth, std::min(kPanelWidth, width - n), to);
}

// c[r, :] = Σ_k a[r, k] panel[k, :], or += if `add`, for a tile of R rows and V registers. If kTransposed, a is indexed
// a[k, r]. The sums stay in registers.
template <int R, int V, bool kTransposed>
void Tile(const float* a, int64_t a_step, const float* panel, int64_t depth, float* c, int64_t c_step, bool add) {
  Vec sum[R][V] = {};
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) __builtin_prefetch(c + r * c_step + v * kLanes, 1);  // c may not be in cache
  for (int64_t k = 0; k < depth; ++k, panel += kPanelWidth) {
    Vec part[V];
    for (int v = 0; v < V; ++v) part[v] = Load(panel + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float x = kTransposed ? a[k * a_step + r] : a[r * a_step + k];
      for (int v = 0; v < V; ++v) sum[r][v] = Add(sum[r][v], x, part[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_step + v * kLanes;
      Store(to, add ? Load(to) + sum[r][v] : sum[r][v]);
    }
}

// A tile function for each number of rows; TileFor returns the one for so many rows and registers.
using TileKernel = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool);
template <int V, bool kTransposed>
constexpr TileKernel kTilesOf[kTileRows + 1] = {nullptr,
                                                Tile<1, V, kTransposed>,
                                                Tile<2, V, kTransposed>,
                                                Tile<3, V, kTransposed>,
                                                Tile<4, V, kTransposed>,
                                                Tile<5, V, kTransposed>,
                                                Tile<6, V, kTransposed>};

template <bool kTransposed>
inline TileKernel TileFor(int64_t rows, int64_t vectors) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return kTilesOf<4, kTransposed>[rows];
    if (vectors == 3) return kTilesOf<3, kTransposed>[rows];
  }
  return vectors == 2 ? kTilesOf<2, kTransposed>[rows] : kTilesOf<1, kTransposed>[rows];
}

// Rows are cut into TilesOf(rows) tiles of nearly equal height; TileAt returns tile t's first row.
inline int64_t TilesOf(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t TileAt(int64_t rows, int64_t t) { return t * rows / TilesOf(rows); }

// c = a panel, or c += a panel if `add`, for the panel's first `columns` columns. a is [rows, depth], or transposed
// [depth, rows], or strips as PackStrips writes them.
enum class Rows { kPlain, kTransposed, kStrips };
template <Rows kRowsAre>
void MultiplyPanel(const float* a, int64_t a_step, const float* panel, int64_t rows, int64_t depth, int64_t columns,
                   float* c, int64_t c_step, bool add) {
  constexpr bool kStrips = kRowsAre == Rows::kStrips, kPlain = kRowsAre == Rows::kPlain;
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t t = 0; t < TilesOf(rows); ++t) {
    const int64_t r = TileAt(rows, t), height = TileAt(rows, t + 1) - r, from_step = kStrips ? height : a_step;
    const TileKernel tile = TileFor<!kPlain>(height, vectors);
    const float* from = a + r * (kStrips ? depth : kPlain ? a_step : 1);
    float* to = c + r * c_step;
    if (columns % kLanes == 0) {
      tile(from, from_step, panel, depth, to, c_step, add);
      continue;
    }
    float edge[kTileRows * kPanelWidth];  // the last register is wider than what is left of c's row
    const int64_t bytes = columns * static_cast<int64_t>(sizeof(float));
    for (int64_t q = 0; add && q < height; ++q) std::memcpy(edge + q * kPanelWidth, to + q * c_step, bytes);
    tile(from, from_step, panel, depth, edge, kPanelWidth, add);
    for (int64_t q = 0; q < height; ++q) std::memcpy(to + q * c_step, edge + q * kPanelWidth, bytes);
  }
}

// c = a b, or c += a b if `add`, for b that Pack has packed. a is [rows, depth], or transposed [depth, rows]; c is
// [rows, width]. `packed` is the panels' depth if it is more than the `depth` rows used here; 0 means `depth`.
template <bool kTransposed>
void Multiply(const float* a, int64_t a_step, const float* panels, int64_t rows, int64_t depth, int64_t width, float* c,
              int64_t c_step, bool add, int64_t packed = 0) {
  packed = packed ? packed : depth;
  for (int64_t n = 0; n < width; n += kPanelWidth, panels += packed * kPanelWidth)
    for (int64_t k = 0; k < depth; k += kDepth)
      MultiplyPanel<kTransposed ? Rows::kTransposed : Rows::kPlain>(
          a + k * (kTransposed ? a_step : 1), a_step, panels + k * kPanelWidth, rows, std::min(kDepth, depth - k),
          std::min(kPanelWidth, width - n), c + n, c_step, add || k > 0);
}

// A matrix in memory, or its transpose if `transposed`. Rows in memory are `step` apart.
struct Matrix {
  const float* at;
  int64_t step;
  bool transposed = false;

  // Returns where element (row, column) is.
  const float* From(int64_t row, int64_t column) const {
    return at + (transposed ? column * step + row : row * step + column);
  }
};

// Packs a [rows, depth] into strips: one strip [depth, height] for each tile, which the tile's loop reads sequentially.
inline void PackStrips(Matrix a, int64_t rows, int64_t depth, float* to) {
  for (int64_t t = 0; t < TilesOf(rows); ++t) {
    const int64_t r = TileAt(rows, t), height = TileAt(rows, t + 1) - r;
    const float* from = a.From(r, 0);
    for (int64_t k = 0; k < depth; ++k, to += height)
      if (!a.transposed)
        for (int64_t q = 0; q < height; ++q) to[q] = from[q * a.step + k];
      else if (height == kTileRows)
        std::memcpy(to, from + k * a.step, kTileRows * sizeof(float));
      else
        std::copy_n(from + k * a.step, height, to);
  }
}

// c = a b, or c += a b if `add`, for a [rows, depth] and b [depth, width] in place. A panel of b is packed right before
// it is used, so it is still in the core's cache; so are kRows rows of a.
inline void Multiply(Matrix a, Matrix b, int64_t rows, int64_t depth, int64_t width, float* c, int64_t c_step,
                     bool add) {
  alignas(64) static thread_local float panel[kDepth * kPanelWidth], strips[kRows * kDepth];
  for (int64_t first = 0; first < rows; first += kRows)
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k), height = std::min(kRows, rows - first);
      PackStrips({a.From(first, k), a.step, a.transposed}, height, part, strips);
      for (int64_t n = 0; n < width; n += kPanelWidth) {
        const int64_t columns = std::min(kPanelWidth, width - n);
        PackPanel(b.From(k, n), b.step, b.transposed, part, columns, panel);
        MultiplyPanel<Rows::kStrips>(strips, 0, panel, height, part, columns, c + first * c_step + n, c_step,
                                     add || k > 0);
      }
    }
}

}  // namespace dsv3
