// Vectors of VL floats. kernels.cpp includes this and the kernels in a namespace for each instruction set.

typedef float Vec __attribute__((vector_size(4 * VL)));
typedef float Loose __attribute__((vector_size(4 * VL), aligned(4), may_alias));
constexpr int NB = 2 * VL;  // output channels of a panel of weights

static inline Vec load(const float *p) { return *(const Loose *)p; }
static inline void store(float *p, Vec x) { *(Loose *)p = x; }
static inline Vec load(const float *p, long n) {  // the first n floats only
  if (n >= VL) return load(p);
  Vec x = {};
  for (long i = 0; i < n; i++) x[i] = p[i];
  return x;
}
static inline void store(float *p, Vec x, long n) {
  if (n >= VL) return store(p, x);
  for (long i = 0; i < n; i++) p[i] = x[i];
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
