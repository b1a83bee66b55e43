// The plain C interface of kitseg's kernels, and the choice of an instruction set. Every size is checked here, before any
// pointer is used; the caller states how many values each buffer has. Functions return 0, or -1 for sizes that don't fit.

#include <algorithm>
#include <atomic>
#include <immintrin.h>
#include <thread>
#include <vector>

#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
#error "kitseg's kernels need GCC and x86-64"
#endif
#pragma GCC diagnostic ignored "-Wpsabi"
#define EXPORT extern "C" __attribute__((visibility("default")))

// A convolution. Pointers to bias, slope (of a leaky ReLU) and moments may be null; sizes are numbers of values. The
// first channels_x channels of the input are those of x; the others, of another tensor, more.
struct Job {
  const float *x, *more, *weights, *bias, *slope;
  float *y, *scratch;
  double *moments;
  long size_x, size_more, size_weights, size_bias, size_slope, size_y, size_scratch, size_moments;
  long images, depth, height, width, channels_in, channels_x, channels_out;
  long pixel_in, pixel_more, pixel_out;  // values from a voxel to the next: channels of the tensor that x is a part of
  long kind, replicate;      // of KINDS; whether to pad with the edge instead of zeros
  long lanes, threads;       // floats a vector: 16 (AVX-512) or 8 (AVX2)
};

// A convolution with a stride, or a transposed one whose stride is its kernel; axes are depth, height, width.
struct Product {
  const float *x, *weights, *bias, *slope;
  float *y, *scratch;
  double *moments;
  long size_x, size_weights, size_bias, size_slope, size_y, size_scratch, size_moments;
  long images, channels_in, channels_out, in[3], out[3], kernel[3], stride[3], pad[3], transposed, lanes, threads;
};

// How a job is done. The caller needs the first five.
struct Plan {
  long panel, weights, blocks, scratch;  // channels of a weight panel; values of all weights; blocks; floats a thread
  long lead;  // voxels by which a part of the input must lie behind the results to be overwritten by them; 0: it can't be
  long tiles_z, tiles_y, tiles_x, tiles, tiles_a_block, channels_in, panels, parts, panels_a_part;
};

// What follows a convolution, on voxels x channels. The pointers from shift on may be null, but see pointwise.h. The
// first channels_residual channels of what is added are those of residual; the others, of another tensor, more, or the
// same ones again without it.
struct Pointwise {
  float *x;
  const float *scale, *shift, *first, *second, *residual, *more;
  double *moments;
  long size_x, size_channels, size_residual, size_more, size_moments;  // size_channels: of scale, shift, first, second
  long voxels, channels, channels_residual, lanes, threads;
};

struct Kind {
  long nz, mz, n, m;
};
constexpr Kind KINDS[] = {
    {6, 4, 6, 4}, {8, 4, 8, 4},   {6, 2, 6, 2}, {1, 1, 6, 4},  // 3^3, 5^3, 5^3, 1 x 3^2
    {4, 2, 4, 2}, {8, 6, 8, 6}, {10, 6, 10, 6}, {1, 1, 8, 6},  // 3^3, 3^3, 5^3, 1 x 3^2
};
constexpr long LARGEST = 1L << 40, MOST_CHANNELS = 1L << 14, MOST_THREADS = 1024, MOST_ROWS = 192;

constexpr int MASKS[16] = {-1, -1, -1, -1, -1, -1, -1, -1};  // and as many zeros: where lanes count, and where not
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw")
#define WIDE
namespace avx512 {
constexpr int VL = 16, ROWS = 12;
#include "vectors.h"
#include "winograd.h"
#include "product.h"
#include "pointwise.h"
}  // namespace avx512
#undef WIDE
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int VL = 8, ROWS = 6;
#include "vectors.h"
#include "winograd.h"
#include "product.h"
#include "pointwise.h"
}  // namespace avx2
#pragma GCC pop_options
constexpr long SLAB = avx2::SLAB;

static long ceiling(long a, long b) { return (a + b - 1) / b; }
static bool between(long low, long x, long high) { return low <= x && x <= high; }

// Whether the first channels of all can be those of one tensor, and the others those of a second one.
static bool parts(long first, long channels, long lanes) {
  return first == channels || (between(1, first, channels) && first % lanes == 0);
}

// The product of positive numbers; 0 if one isn't positive or the product is beyond LARGEST.
static long product(std::initializer_list<long> factors) {
  long all = 1;
  for (long factor : factors) {
    if (factor <= 0 || factor > LARGEST / all) return 0;
    all *= factor;
  }
  return all;
}

#ifdef KITSEG_SOURCES  // kitseg_sources_ and the checksum of the sources, see library.py
EXPORT void KITSEG_SOURCES() {}
#endif

EXPORT long kitseg_lanes() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  return wide ? 16 : 8;
}

static bool lanes_exist(long lanes) { return (lanes == 8 || lanes == 16) && lanes <= kitseg_lanes(); }

// Calls what(number, thread) for each number below count.
template <class What> static void parallel(long count, long threads, const What &what) {
  std::atomic<long> next{0};
  auto work = [&](long thread) {
    for (long number; (number = next++) < count;) what(number, thread);
  };
  std::vector<std::thread> others;
  try {
    for (long thread = 1; thread < std::min(threads, count); thread++) others.emplace_back(work, thread);
  } catch (...) {  // the system gives no more threads: those that there are do the work
  }
  work(0);
  for (auto &other : others) other.join();
}

EXPORT int kitseg_plan(const Job *job, Plan *plan) {
  const Job &j = *job;
  if (!between(0, j.kind, (long)std::size(KINDS) - 1) || !lanes_exist(j.lanes) || !between(1, j.threads, MOST_THREADS)) return -1;
  if (!between(1, j.channels_in, MOST_CHANNELS) || !between(1, j.channels_out, MOST_CHANNELS)) return -1;
  if (!product({j.images, j.depth, j.height, j.width, std::max(j.channels_in, j.channels_out)})) return -1;
  const Kind kind = KINDS[j.kind];
  long points = kind.nz * kind.n * kind.n;
  Plan p{};
  p.panel = 2 * j.lanes;
  p.tiles_z = ceiling(j.depth, kind.mz), p.tiles_y = ceiling(j.height, kind.m), p.tiles_x = ceiling(j.width, kind.m);
  p.tiles = j.images * p.tiles_z * p.tiles_y * p.tiles_x;
  p.channels_in = ceiling(j.channels_in, j.lanes) * j.lanes;
  p.panels = ceiling(j.channels_out, p.panel);
  p.weights = points * p.panels * p.panel * j.channels_in;
  long work = j.channels_in * p.panels * p.panel;
  p.tiles_a_block = std::min(p.tiles, work <= 64 * 64 ? 12L : 24L);  // what they need stays near the core
  p.blocks = ceiling(p.tiles, p.tiles_a_block);
  p.parts = std::min(p.panels, ceiling(8, p.blocks));  // few blocks: threads share the channels
  p.panels_a_part = ceiling(p.panels, p.parts);
  p.parts = ceiling(p.panels, p.panels_a_part);
  long widest = std::max(p.channels_in, p.panels_a_part * p.panel);
  p.scratch = points * j.lanes + (points + 1) * (p.tiles_a_block * widest + 16);
  // A layer of blocks reads from the slice before its first one, and writes up to the end of the next layer.
  bool layers = p.tiles_y * p.tiles_x >= p.tiles_a_block;
  p.lead = layers ? (2 * kind.mz + (kind.nz - kind.mz) / 2) * j.height * j.width : 0;
  *plan = p;
  return 0;
}

// Whether results overwrite a part of the input, and whether that is safe when layers follow each other.
static bool overlap(const Job &j, const float *part, long size) { return part && part < j.y + j.size_y && j.y < part + size; }
static bool behind(const Job &j, const Plan &plan, const float *part, long pixel) {
  return plan.lead && pixel == j.pixel_out && part - j.y >= plan.lead * pixel;
}

EXPORT int kitseg_convolve(const Job *job) {
  const Job &j = *job;
  Plan plan;
  if (kitseg_plan(job, &plan)) return -1;
  long voxels = j.images * j.depth * j.height * j.width;
  long channels_more = j.channels_in - j.channels_x;
  if (j.pixel_in < j.channels_x || j.pixel_out < j.channels_out || !parts(j.channels_x, j.channels_in, j.lanes)) return -1;
  long need_x = product({voxels, j.pixel_in}), need_y = product({voxels, j.pixel_out});
  if (!need_x || !need_y || j.size_x < need_x - j.pixel_in + j.channels_x) return -1;
  if (channels_more) {
    long need = product({voxels, j.pixel_more});
    if (!j.more || !need || j.pixel_more < channels_more || j.size_more < need - j.pixel_more + channels_more) return -1;
  }
  if (j.size_y < need_y - j.pixel_out + j.channels_out || j.size_weights < plan.weights) return -1;
  if ((j.bias && j.size_bias < j.channels_out) || (j.slope && j.size_slope < j.channels_out)) return -1;
  if (j.moments && (j.images > 1 || j.size_moments < plan.blocks * 3 * j.channels_out)) return -1;
  if (!j.x || !j.y || !j.weights || !j.scratch || j.size_scratch < plan.scratch * j.threads) return -1;
  auto convolve = j.lanes == 16 ? avx512::convolve : avx2::convolve;
  bool over_x = overlap(j, j.x, j.size_x), over_more = overlap(j, j.more, j.size_more);
  if ((over_x && !behind(j, plan, j.x, j.pixel_in)) || (over_more && !behind(j, plan, j.more, j.pixel_more))) return -1;
  long all = plan.blocks * plan.parts;
  long layer = over_x || over_more ? plan.tiles_y * plan.tiles_x / plan.tiles_a_block * plan.parts : all;
  for (long first = 0; first < all; first += layer)
    parallel(std::min(layer, all - first), j.threads, [&](long number, long thread) {
      convolve(j, plan, first + number, j.scratch + thread * plan.scratch);
    });
  return 0;
}

// tiles: voxels that are rows; channels_in: values of a row; parts: products a row; lead: whether rows are gathered.
EXPORT int kitseg_product_plan(const Product *job, Plan *plan) {
  const Product &j = *job;
  if (!lanes_exist(j.lanes) || !between(1, j.threads, MOST_THREADS) || !between(0, j.transposed, 1)) return -1;
  if (!between(1, j.channels_in, MOST_CHANNELS) || !between(1, j.channels_out, MOST_CHANNELS)) return -1;
  bool direct = true;
  for (int axis = 0; axis < 3; axis++) {
    long in = j.in[axis], out = j.out[axis], kernel = j.kernel[axis], stride = j.stride[axis], pad = j.pad[axis];
    if (!between(1, in, LARGEST) || !between(1, out, LARGEST) || !between(1, kernel, 64) || !between(1, stride, 64)) return -1;
    if (!between(0, pad, j.transposed ? 0 : kernel - 1) || (j.transposed && stride != kernel)) return -1;
    if (!j.transposed && in + 2 * pad < kernel) return -1;
    if (out != (j.transposed ? in * stride : (in + 2 * pad - kernel) / stride + 1)) return -1;
    direct = direct && kernel == 1 && stride == 1;
  }
  long taps = j.kernel[0] * j.kernel[1] * j.kernel[2];
  const long *rows = j.transposed ? j.in : j.out;
  Plan p{};
  p.panel = 2 * j.lanes, p.panels = ceiling(j.channels_out, p.panel);
  p.channels_in = j.transposed ? j.channels_in : taps * j.channels_in;
  p.parts = j.transposed ? taps : 1;
  p.lead = !j.transposed && !direct;
  p.tiles = product({j.images, rows[0], rows[1], rows[2]});
  p.weights = product({p.parts, p.panels, p.channels_in, p.panel});
  if (!p.tiles || !p.weights || !product({p.tiles, taps, std::max(j.channels_in, j.channels_out)})) return -1;
  long most = std::min(ceiling(1 << 18, p.channels_in), ceiling(p.tiles, 8));  // what a block needs stays near the core
  p.tiles_a_block = std::min(MOST_ROWS, ceiling(most, 12) * 12);
  p.blocks = ceiling(p.tiles, p.tiles_a_block);
  p.scratch = p.tiles_a_block * (p.panel + (p.lead ? p.channels_in + j.lanes : 0));
  *plan = p;
  return 0;
}

EXPORT int kitseg_product(const Product *job) {
  const Product &j = *job;
  Plan plan;
  if (kitseg_product_plan(job, &plan)) return -1;
  long need_x = product({j.images, j.in[0], j.in[1], j.in[2], j.channels_in});
  long need_y = product({j.images, j.out[0], j.out[1], j.out[2], j.channels_out});
  if (!need_x || !need_y || j.size_x < need_x || j.size_y < need_y || j.size_weights < plan.weights) return -1;
  if ((j.bias && j.size_bias < j.channels_out) || (j.slope && j.size_slope < j.channels_out)) return -1;
  if (j.moments && (j.images > 1 || j.size_moments < plan.blocks * 3 * j.channels_out)) return -1;
  if (!j.x || !j.y || !j.weights || !j.scratch || j.size_scratch < plan.scratch * j.threads) return -1;
  if (j.x < j.y + need_y && j.y < j.x + need_x) return -1;
  auto run = j.lanes == 16 ? avx512::product : avx2::product;
  parallel(plan.blocks, j.threads, [&](long block, long thread) { run(j, plan, block, j.scratch + thread * plan.scratch); });
  return 0;
}

static bool fits(const Pointwise &j) {
  if (!lanes_exist(j.lanes) || !between(1, j.threads, MOST_THREADS) || !between(1, j.channels, MOST_CHANNELS)) return false;
  long values = product({j.voxels, j.channels});
  return values && j.x && j.size_x >= values;
}

EXPORT int kitseg_moments(const Pointwise *job) {
  long slabs = fits(*job) ? ceiling(job->voxels, SLAB) : 0;
  if (!slabs || !job->moments || job->size_moments < slabs * 3 * job->channels) return -1;
  auto moments = job->lanes == 16 ? avx512::moments : avx2::moments;
  parallel(slabs, job->threads, [&](long slab, long) { moments(*job, slab); });
  return 0;
}

EXPORT int kitseg_affine(const Pointwise *job) {
  if (!fits(*job) || !job->scale || !job->shift || job->size_channels < job->channels) return -1;
  long first = job->channels_residual, more = job->channels - first;
  if (job->residual && (!between(1, first, job->channels) || job->size_residual < job->voxels * first)) return -1;
  if (job->residual && job->more && (!parts(first, job->channels, job->lanes) || job->size_more < job->voxels * more)) return -1;
  if (job->residual && !job->more && (job->channels % first || (first % job->lanes && more && job->lanes % first))) return -1;
  auto affine = job->lanes == 16 ? avx512::affine : avx2::affine;
  parallel(ceiling(job->voxels, SLAB), job->threads, [&](long slab, long) { affine(*job, slab); });
  return 0;
}
