// Vectors of VL floats. kernels.cpp includes this and the kernels in a namespace for each instruction set.

typedef float Vec __attribute__((vector_size(4 * VL)));
typedef int Whole __attribute__((vector_size(4 * VL)));
typedef float Loose __attribute__((vector_size(4 * VL), aligned(4), may_alias));
constexpr int NB = 2 * VL;  // output channels of a panel of weights

static inline Vec load(const float *p) { return *(const Loose *)p; }
static inline void store(float *p, Vec x) { *(Loose *)p = x; }
// Past the caches, to an address that is a multiple of a vector.
static inline void stream(float *p, Vec x) {
#ifdef __SANITIZE_ADDRESS__
  store(p, x);
#elif defined(WIDE)
  _mm512_stream_ps(p, (__m512)x);
#else
  _mm256_stream_ps(p, (__m256)x);
#endif
}
// The first n floats only: the rest of memory is neither read nor written. Sanitizers see what plain loops do.
static inline Vec load(const float *p, long n) {
  if (n >= VL) return load(p);
  Vec x = {};
#ifdef __SANITIZE_ADDRESS__
  for (long i = 0; i < n; i++) x[i] = p[i];
#elif defined(WIDE)
  x = (Vec)_mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), p);
#else
  x = (Vec)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *)(MASKS + VL - n)));
#endif
  return x;
}
static inline void store(float *p, Vec x, long n) {
  if (n >= VL) return store(p, x);
#ifdef __SANITIZE_ADDRESS__
  for (long i = 0; i < n; i++) p[i] = x[i];
#elif defined(WIDE)
  _mm512_mask_storeu_ps(p, (__mmask16)((1 << n) - 1), (__m512)x);
#else
  _mm256_maskstore_ps(p, _mm256_loadu_si256((const __m256i *)(MASKS + VL - n)), (__m256)x);
#endif
}
static inline Vec leaky(Vec x, Vec slope) { return x > 0 ? x : x * slope; }

// Sums over a block of voxels, one lane a channel, of the differences to the first value and of their squares.
struct Sums {
  Vec pivot = {}, sum = {}, squares = {};
  long count = 0;
  void add(Vec x) {
    if (count++ == 0) pivot = x;
    Vec d = x - pivot;
    sum += d, squares += d * d;
  }
  // Rows of the count, the mean and the sum of squared differences to it, each for all channels.
  void write(double *row, long channel, long channels) const {
    for (long i = 0; i < VL && channel + i < channels; i++) {
      double mean = sum[i] / (double)count;
      row[channel + i] = count;
      row[channels + channel + i] = pivot[i] + mean;
      row[2 * channels + channel + i] = squares[i] - mean * sum[i];
    }
  }
};
