// The quantisers of tiles.py in one pass over memory each, for a CPU: the same bits, by the same float32 arithmetic.
//
// Built by compiled_tiles.py, which says with which flags: no product may be fused with a sum, nothing reordered.
// Inputs are bfloat16 (uint16_t) or float32; rows have a stride, elements of a row lie side by side.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t TILE = 128;
constexpr uint32_t SIGN = 0x80000000u, INFINITE = 0x7F800000u;
constexpr float LARGEST = 448.0f, LEAST_SCALE = 0x1p-126f;
// The exponent of E4M3's least normal value, 2^-6, where float32 has it.
constexpr uint32_t LEAST = 121u << 23;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float wide(float x) { return x; }
inline float wide(uint16_t x) { return of_bits(uint32_t(x) << 16); }

inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// blockwise.scales_of, from the bits of the largest magnitude: as whole numbers magnitudes keep their order, and an
// infinity or a NaN is above all others.
inline float scale_of(uint32_t amax, bool power_of_two) {
  if (amax >= INFINITE) return of_bits(0x7FC00000u);
  if (amax == 0) return 1.0f;
  if (power_of_two) {
    // The mantissa of 448 is 0x600000, its exponent 8; a larger mantissa carries.
    const int32_t exponent = int32_t((amax + 0x1FFFFFu) >> 23) - 8;
    return of_bits(uint32_t(exponent < 1 ? 1 : exponent) << 23);
  }
  const float scale = of_bits(amax) / LARGEST;
  return scale < LEAST_SCALE ? LEAST_SCALE : scale;
}

// tiles.round_to for E4M3; zeros keep their sign.
inline float rounded(float x) {
  const uint32_t bits = bits_of(x);
  const float magic = of_bits(larger(bits & INFINITE, LEAST) + ((20u << 23) | 0x400000u));
  const float magnitude = (of_bits(bits & ~SIGN) + magic) - magic;
  return of_bits(bits_of(magnitude) | (bits & SIGN));
}

// The byte of an E4M3 value.
inline uint8_t encoded(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & ~SIGN;
  const bool subnormal = magnitude < LEAST;
  const uint32_t small = uint32_t(int32_t(of_bits(subnormal ? magnitude : 0) * 512.0f));
  const uint32_t large = magnitude > INFINITE ? 0x7Fu : (magnitude >> 20) - (120u << 3);
  return uint8_t((subnormal ? small : large) | (bits >> 24 & 0x80u));
}

// The value of a byte; a NaN's is left to its scale, which is one too.
inline float decoded(uint8_t byte) {
  const uint32_t magnitude = byte & 0x7Fu;
  const float small = float(int32_t(magnitude)) * 0x1p-9f, large = of_bits((magnitude << 20) + (120u << 23));
  return of_bits(bits_of(magnitude < 8 ? small : large) | uint32_t(byte & 0x80u) << 24);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// x [m, k] in tiles of 1 x 128: dequantised to `out` [m, k], bytes to `values` [m, k], scales to `scales` [m, tiles].
template <class T, bool DEQUANTISES, bool KEEPS>
void rows(const T* x, int64_t stride, int64_t m, int64_t k, bool power_of_two, float* out, uint8_t* values,
          float* scales, int threads) {
  const int64_t num_tiles = (k + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t t = 0; t < num_tiles; ++t) {
      const T* from = x + i * stride + t * TILE;
      const int64_t width = least(TILE, k - t * TILE), to = i * k + t * TILE;
      uint32_t amax = 0;
      for (int64_t j = 0; j < width; ++j) amax = larger(amax, bits_of(wide(from[j])) & ~SIGN);
      const float scale = scale_of(amax, power_of_two);
      for (int64_t j = 0; j < width; ++j) {
        const float value = rounded(wide(from[j]) / scale);
        if (DEQUANTISES) out[to + j] = value * scale;
        if (KEEPS) values[to + j] = encoded(value);
      }
      if (KEEPS) scales[i * num_tiles + t] = scale;
    }
  }
}

template <class T>
void any_rows(const T* x, int64_t stride, int64_t m, int64_t k, bool power_of_two, float* out, uint8_t* values,
              float* scales, int threads) {
  auto run = !values ? rows<T, true, false> : out ? rows<T, true, true> : rows<T, false, true>;
  run(x, stride, m, k, power_of_two, out, values, scales, threads);
}

// x [n, k], n and k at most 128, in tiles of n x 1, to `out` with rows of `out_stride`.
template <class T>
void column_tile(const T* x, int64_t stride, int64_t n, int64_t k, bool power_of_two, float* out, int64_t out_stride) {
  uint32_t amax[TILE] = {};
  float scale[TILE];
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) amax[j] = larger(amax[j], bits_of(wide(x[i * stride + j])) & ~SIGN);
  for (int64_t j = 0; j < k; ++j) scale[j] = scale_of(amax[j], power_of_two);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j)
      out[i * out_stride + j] = rounded(wide(x[i * stride + j]) / scale[j]) * scale[j];
}

// Rows `first` to `first + length` of x [., k] of each group, in tiles of 128 x 1 that begin with the group's first
// row, to `out` [sum of lengths, k].
template <class T>
void columns(const T* x, int64_t stride, int64_t k, const int64_t* first, const int64_t* length, int64_t num_groups,
             bool power_of_two, float* out, int threads) {
  const int64_t num_strips = (k + TILE - 1) / TILE;
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t n = length[group], num_tiles = (n + TILE - 1) / TILE * num_strips;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t i = tile / num_strips * TILE, j = tile % num_strips * TILE;
      column_tile(x + (first[group] + i) * stride + j, stride, least(TILE, n - i), least(TILE, k - j), power_of_two,
                  out + i * k + j, k);
    }
    out += n * k;
  }
}

// x [num, n, k], contiguous, in blocks of 128 x 128 to `out`, the same shape.
template <class T>
void blocks(const T* x, int64_t num, int64_t n, int64_t k, bool power_of_two, float* out, int threads) {
  const int64_t down = (n + TILE - 1) / TILE, across = (k + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < num * down * across; ++block) {
    const int64_t row = block / across % down * TILE, column = block % across * TILE;
    const int64_t at = (block / (down * across) * n + row) * k + column;
    const int64_t height = least(TILE, n - row), width = least(TILE, k - column);
    uint32_t amax = 0;
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) amax = larger(amax, bits_of(wide(x[at + i * k + j])) & ~SIGN);
    const float scale = scale_of(amax, power_of_two);
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) out[at + i * k + j] = rounded(wide(x[at + i * k + j]) / scale) * scale;
  }
}

}  // namespace

extern "C" {

// is_bf16 says what `x` is. Without `values` and `scales`, or without `out`, these are not made.
void halocline_rows(const void* x, int is_bf16, int64_t stride, int64_t m, int64_t k, int power_of_two, float* out,
                    uint8_t* values, float* scales, int threads) {
  if (is_bf16) return any_rows(static_cast<const uint16_t*>(x), stride, m, k, power_of_two, out, values, scales, threads);
  any_rows(static_cast<const float*>(x), stride, m, k, power_of_two, out, values, scales, threads);
}

// What halocline_rows has kept, dequantised.
void halocline_restore(const uint8_t* values, const float* scales, int64_t m, int64_t k, float* out, int threads) {
  const int64_t num_tiles = (k + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < m; ++i)
    for (int64_t t = 0; t < num_tiles; ++t) {
      const float scale = scales[i * num_tiles + t];
      for (int64_t j = t * TILE; j < least(t * TILE + TILE, k); ++j) out[i * k + j] = decoded(values[i * k + j]) * scale;
    }
}

void halocline_columns(const void* x, int is_bf16, int64_t stride, int64_t k, const int64_t* first,
                       const int64_t* length, int64_t num_groups, int power_of_two, float* out, int threads) {
  if (is_bf16)
    return columns(static_cast<const uint16_t*>(x), stride, k, first, length, num_groups, power_of_two, out, threads);
  columns(static_cast<const float*>(x), stride, k, first, length, num_groups, power_of_two, out, threads);
}

void halocline_blocks(const void* x, int is_bf16, int64_t num, int64_t n, int64_t k, int power_of_two, float* out,
                      int threads) {
  if (is_bf16) return blocks(static_cast<const uint16_t*>(x), num, n, k, power_of_two, out, threads);
  blocks(static_cast<const float*>(x), num, n, k, power_of_two, out, threads);
}

}  // extern "C"
