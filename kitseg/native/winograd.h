// Winograd convolution with stride 1, padded to preserve the size.
//
// A job covers its output with tiles of MZ x M x M voxels, made of NZ x N x N input voxels. A block of tiles goes through
// three steps: input tiles are transformed to P = NZ N N points; at each point the block's tiles are a matrix
// (tiles x channels) that is multiplied by the transformed weights; the products are transformed back. Blocks are the
// same whatever the number of threads, and so are all sums.

// B^T x, in place. The points are 0, 1, -1, infinity for N = 4, with 1/2, -2 for N = 6, and with +-2, +-1/2 for N = 8;
// 0, +-0.4, +-0.8, +-1.25, +-2.5 and infinity for N = 10.
template <int N> static inline void to_points(Vec *x) {
  Vec a = x[0], b = x[1], c = x[2], d = x[3];
  if constexpr (N == 4) {
    x[0] = c - a, x[1] = c + b, x[2] = c - b, x[3] = d - b;
  } else if constexpr (N == 6) {
    Vec e = x[4], f = x[5];
    Vec q = c + 1.5f * b - a, r = d + 1.5f * c - b, s = e + 1.5f * d - c, t = f + 1.5f * e - d, even = e - c, odd = d - b;
    x[0] = s - q, x[1] = s + r, x[2] = s - r, x[3] = even + 2.f * odd, x[4] = even - .5f * odd, x[5] = t - r;
  } else if constexpr (N == 8) {
    Vec e = x[4], f = x[5], g = x[6], h = x[7];
    Vec e1 = c + g - 4.25f * e, o1 = b + f - 4.25f * d;
    Vec e2 = .25f * c + (g - 1.25f * e), o2 = .5f * b + (2.f * f - 2.5f * d);
    Vec e3 = 4.f * c + (g - 5.f * e), o3 = 2.f * b + (.5f * f - 2.5f * d);
    x[0] = 5.25f * (c - e) + (g - a), x[7] = 5.25f * (d - f) + (h - b);
    x[1] = e1 + o1, x[2] = e1 - o1, x[3] = e2 + o2, x[4] = e2 - o2, x[5] = e3 + o3, x[6] = e3 - o3;
  } else {  // the squares of the points are 0.16, 6.25 and 0.64, 1.5625, whose products are 1
    Vec outer[6], inner[6];
    for (int k = 0; k < 6; k++) outer[k] = x[k] + x[k + 4] - 2.2025f * x[k + 2];
    for (int k = 1; k < 5; k++) inner[k] = x[k] + x[k + 4] - 6.41f * x[k + 2];
    auto pair = [&](const Vec *part, float point, float square, Vec *to) {
      Vec even = part[4] - square * part[2], odd = part[3] - square * part[1];
      to[0] = even + point * odd, to[1] = even - point * odd;
    };
    x[0] = outer[0] + outer[4] - 6.41f * outer[2], x[9] = outer[1] + outer[5] - 6.41f * outer[3];
    pair(outer, .4f, 6.25f, x + 1), pair(outer, 2.5f, .16f, x + 7);
    pair(inner, .8f, 1.5625f, x + 3), pair(inner, 1.25f, .64f, x + 5);
  }
}

// A^T m for the first M outputs.
template <int N, int M> static inline void from_points(const Vec *m, Vec *y) {
  Vec s = m[1] + m[2], d = m[1] - m[2];
  if constexpr (N == 4) {
    y[0] = m[0] + s, y[1] = d + m[3];
  } else if constexpr (N == 8) {
    Vec s2 = m[3] + m[4], d2 = m[3] - m[4], s3 = m[5] + m[6], d3 = m[5] - m[6];
    y[0] = m[0] + s + (s2 + s3);
    y[1] = d + 2.f * d2 + .5f * d3;
    y[2] = s + 4.f * s2 + .25f * s3;
    y[3] = d + 8.f * d2 + .125f * d3;
    if constexpr (M == 6) y[4] = s + 16.f * s2 + .0625f * s3, y[5] = d + 32.f * d2 + .03125f * d3;
    y[M - 1] += m[7];
  } else if constexpr (N == 10) {
    Vec s2 = m[3] + m[4], d2 = m[3] - m[4], s3 = m[5] + m[6], d3 = m[5] - m[6], s4 = m[7] + m[8], d4 = m[7] - m[8];
    y[0] = m[0] + (s + s2) + (s3 + s4);
    y[1] = .4f * d + .8f * d2 + (1.25f * d3 + 2.5f * d4);
    y[2] = .16f * s + .64f * s2 + (1.5625f * s3 + 6.25f * s4);
    y[3] = .064f * d + .512f * d2 + (1.953125f * d3 + 15.625f * d4);
    y[4] = .0256f * s + .4096f * s2 + (2.44140625f * s3 + 39.0625f * s4);
    y[5] = .01024f * d + .32768f * d2 + (3.0517578125f * d3 + 97.65625f * d4) + m[9];
  } else {
    y[0] = m[0] + s + (m[3] + m[4]);
    y[1] = d + .5f * m[3] - 2.f * m[4];
    if constexpr (M == 2) y[1] += m[5];
    if constexpr (M == 4) y[2] = s + .25f * m[3] + 4.f * m[4];
    if constexpr (M == 4) y[3] = d + .125f * m[3] - 8.f * m[4] + m[5];
  }
}

// C (R x W vectors) = A (R x k) B (k x NB)
template <int R, int W> static inline void multiply(const float *A, long lda, const float *B, float *C, long ldc, long k) {
  Vec c[R][W] = {};
  for (long p = 0; p < k; p++) {
    Vec b[W];
    for (int j = 0; j < W; j++) b[j] = load(B + p * NB + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      float a = A[i * lda + p];
      for (int j = 0; j < W; j++) c[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < R; i++)
    for (int j = 0; j < W; j++) store(C + i * ldc + j * VL, c[i][j]);
}

// The same for any number of rows.
template <int W>
static inline void multiply_rows(long rows, const float *A, long lda, const float *B, float *C, long ldc, long k) {
  long t = 0;
  for (; t + ROWS <= rows; t += ROWS) multiply<ROWS, W>(A + t * lda, lda, B, C + t * ldc, ldc, k);
  for (; t + 4 <= rows; t += 4) multiply<4, W>(A + t * lda, lda, B, C + t * ldc, ldc, k);
  for (; t < rows; t++) multiply<1, W>(A + t * lda, lda, B, C + t * ldc, ldc, k);
}

template <int NZ, int MZ, int N, int M> struct Tiles {
  static constexpr int P = NZ * N * N, EDGE = (N - M) / 2, EDGE_Z = (NZ - MZ) / 2;
  const Job &job;
  const Plan &plan;
  // Whether results are written past the caches, which they would only fill.
  const bool past = job.size_y >= 1L << 22 && (job.channels_out | job.pixel_out | (long)job.y / 4) % VL == 0;

  struct Place { long image, z, y, x; };
  Place place(long tile) const {
    long x = tile % plan.tiles_x * M, y = tile / plan.tiles_x % plan.tiles_y * M;
    long rest = tile / plan.tiles_x / plan.tiles_y;
    return {rest / plan.tiles_z, rest % plan.tiles_z * MZ, y, x};
  }

  // The input index of each of a tile's n voxels along an axis; -1 for zeros outside.
  bool indices(long start, long length, long *index, int n) const {
    bool inside = start >= 0 && start + n <= length;
    for (int i = 0; i < n; i++) {
      long k = start + i;
      index[i] = k >= 0 && k < length ? k : job.replicate ? (k < 0 ? 0 : length - 1) : -1;
    }
    return inside;
  }

  void input(long tile, float *to, long stride, float *patch) const {
    Place at = place(tile);
    long zs[NZ], ys[N], xs[N];
    indices(at.z - EDGE_Z, job.depth, zs, NZ);
    indices(at.y - EDGE, job.height, ys, N);
    bool inside = indices(at.x - EDGE, job.width, xs, N);
    for (long g = 0; g < job.channels_in; g += VL) {
      bool more = g >= job.channels_x;
      long pixel = more ? job.pixel_more : job.pixel_in, left = (more ? job.channels_in : job.channels_x) - g;
      const float *start = more ? job.more + g - job.channels_x : job.x + g;
      auto row = [&](long z, long y) { return start + ((at.image * job.depth + z) * job.height + y) * job.width * pixel; };
      for (int d = 0; d < NZ; d++) for (int h = 0; h < N; h++) {
        Vec r[N];
        bool there = zs[d] >= 0 && ys[h] >= 0;
        if (there && inside && left >= VL) {
          const float *from = row(zs[d], ys[h]) + xs[0] * pixel;
          for (int w = 0; w < N; w++) r[w] = load(from + w * pixel);
          for (int w = N; w < N + M; w++) __builtin_prefetch(from + w * pixel);  // what the next tile adds
        } else {
          for (int w = 0; w < N; w++) r[w] = there && xs[w] >= 0 ? load(row(zs[d], ys[h]) + xs[w] * pixel, left) : Vec{};
        }
        to_points<N>(r);
        for (int w = 0; w < N; w++) store(patch + ((d * N + h) * N + w) * VL, r[w]);
      }
      for (int d = 0; d < NZ; d++) for (int w = 0; w < N; w++) {
        Vec r[N];
        for (int h = 0; h < N; h++) r[h] = load(patch + ((d * N + h) * N + w) * VL);
        to_points<N>(r);
        for (int h = 0; h < N; h++) {
          float *point = NZ == 1 ? to + (h * N + w) * stride + g : patch + ((d * N + h) * N + w) * VL;
          store(point, r[h]);
        }
      }
      if constexpr (NZ > 1) for (int h = 0; h < N; h++) for (int w = 0; w < N; w++) {
        Vec r[NZ];
        for (int d = 0; d < NZ; d++) r[d] = load(patch + ((d * N + h) * N + w) * VL);
        to_points<NZ>(r);
        for (int d = 0; d < NZ; d++) store(to + ((d * N + h) * N + w) * stride + g, r[d]);
      }
    }
  }

  // VL channels of a tile's output.
  void output(long tile, const float *from, long stride, float *patch, long channel, Sums *sums) const {
    Place at = place(tile);
    long left = job.channels_out - channel;
    long depth = std::min<long>(MZ, job.depth - at.z), height = std::min<long>(M, job.height - at.y);
    long width = std::min<long>(M, job.width - at.x);
    if constexpr (NZ > 1) for (int h = 0; h < N; h++) for (int w = 0; w < N; w++) {
      Vec r[NZ], o[MZ];
      for (int d = 0; d < NZ; d++) r[d] = load(from + ((d * N + h) * N + w) * stride);
      from_points<NZ, MZ>(r, o);
      for (int d = 0; d < MZ; d++) store(patch + ((d * N + h) * N + w) * VL, o[d]);
    }
    for (int d = 0; d < depth; d++) for (int w = 0; w < N; w++) {
      Vec r[N], o[M];
      for (int h = 0; h < N; h++)
        r[h] = load(NZ == 1 ? from + (h * N + w) * stride : patch + ((d * N + h) * N + w) * VL);
      from_points<N, M>(r, o);
      for (int h = 0; h < M; h++) store(patch + ((d * N + h) * N + w) * VL, o[h]);
    }
    Vec bias = job.bias ? load(job.bias + channel, left) : Vec{}, slope = job.slope ? load(job.slope + channel, left) : Vec{};
    for (int d = 0; d < depth; d++) for (int h = 0; h < height; h++) {
      Vec r[N], o[M];
      for (int w = 0; w < N; w++) r[w] = load(patch + ((d * N + h) * N + w) * VL);
      from_points<N, M>(r, o);
      long voxel = ((at.image * job.depth + at.z + d) * job.height + at.y + h) * job.width + at.x;
      float *to = job.y + voxel * job.pixel_out + channel;
      for (int w = 0; w < width; w++) {
        Vec value = o[w] + bias;
        if (sums) sums->add(value);
        if (job.slope) value = leaky(value, slope);
        if (past) stream(to + w * job.pixel_out, value);
        else store(to + w * job.pixel_out, value, left);
      }
    }
  }

  // A block of tiles and a part of the output channels.
  void run(long number, float *scratch) const {
    long block = number / plan.parts, first = number % plan.parts * plan.panels_a_part;
    long last = std::min(first + plan.panels_a_part, plan.panels);
    long tile = block * plan.tiles_a_block, count = std::min(plan.tiles_a_block, plan.tiles - tile);
    long k = job.channels_in, lda = plan.channels_in, ldc = (last - first) * NB;
    long stride = plan.tiles_a_block * std::max(lda, ldc) + 16;
    float *patch = scratch, *out = patch + P * VL, *in = out + stride;  // products of a point replace its predecessor's tiles
    for (long t = 0; t < count; t++) input(tile + t, in + t * lda, stride, patch);
    for (long p = 0; p < P; p++)
      for (long panel = first; panel < last; panel++) {
        const float *A = in + p * stride, *B = job.weights + (p * plan.panels + panel) * k * NB;
        float *C = out + p * stride + (panel - first) * NB;
        if (job.channels_out - panel * NB > VL) multiply_rows<2>(count, A, lda, B, C, ldc, k);
        else multiply_rows<1>(count, A, lda, B, C, ldc, k);
      }
    for (long channel = first * NB; channel < std::min(last * NB, job.channels_out); channel += VL) {
      Sums sums;
      const float *from = out + channel - first * NB;
      for (long t = 0; t < count; t++)
        output(tile + t, from + t * ldc, stride, patch, channel, job.moments ? &sums : nullptr);
      if (job.moments) sums.write(job.moments + block * 3 * job.channels_out, channel, job.channels_out);
    }
    if (past) _mm_sfence();
  }
};

static void convolve(const Job &job, const Plan &plan, long number, float *scratch) {
  if (job.kind == 0) Tiles<6, 4, 6, 4>{job, plan}.run(number, scratch);
  if (job.kind == 1) Tiles<8, 4, 8, 4>{job, plan}.run(number, scratch);
  if (job.kind == 2) Tiles<6, 2, 6, 2>{job, plan}.run(number, scratch);
  if (job.kind == 3) Tiles<1, 1, 6, 4>{job, plan}.run(number, scratch);
  if (job.kind == 4) Tiles<4, 2, 4, 2>{job, plan}.run(number, scratch);
  if (job.kind == 5) Tiles<8, 6, 8, 6>{job, plan}.run(number, scratch);
  if (job.kind == 6) Tiles<10, 6, 10, 6>{job, plan}.run(number, scratch);
  if (job.kind == 7) Tiles<1, 1, 8, 6>{job, plan}.run(number, scratch);
}
