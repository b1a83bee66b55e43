// Convolutions as products of matrices: with any stride, and transposed ones whose blocks don't overlap.
//
// A block of voxels is a matrix with a row for each voxel: what its taps read, one after the other (channels last), or
// just its channels for kernels of one voxel and transposed convolutions. It is multiplied by the weights; the products
// of a transposed convolution, for each of its taps, go to voxels of their own.

struct Products {
  const Product &job;
  const Plan &plan;
  const bool past = job.size_y >= 1L << 22 && (job.channels_out | (long)job.y / 4) % VL == 0;  // see winograd.h

  // What the taps of an output voxel read; zeros outside.
  void gather(const long *at, float *row) const {
    long channels = job.channels_in, run = job.kernel[2] * channels, x = at[3] * job.stride[2] - job.pad[2];
    long low = std::max(0L, -x), high = std::max(low, std::min(job.kernel[2], job.in[2] - x));
    for (long d = 0; d < job.kernel[0]; d++) for (long h = 0; h < job.kernel[1]; h++, row += run) {
      long z = at[1] * job.stride[0] - job.pad[0] + d, y = at[2] * job.stride[1] - job.pad[1] + h;
      bool there = 0 <= z && z < job.in[0] && 0 <= y && y < job.in[1];
      if (!there || low || high < job.kernel[2]) std::fill(row, row + run, 0.f);
      if (!there || high == low) continue;
      const float *from = job.x + (((at[0] * job.in[0] + z) * job.in[1] + y) * job.in[2] + x + low) * channels;
      std::copy(from, from + (high - low) * channels, row + low * channels);
    }
  }

  void run(long block, float *scratch) const {
    long first = block * plan.tiles_a_block, count = std::min(plan.tiles_a_block, plan.tiles - first);
    const long *size = job.transposed ? job.in : job.out, channels = job.channels_out, places = plan.parts;
    long at[4], to[MOST_ROWS], rest = first, k = plan.channels_in;
    for (int axis = 2; axis >= 0; rest /= size[axis--]) at[axis + 1] = rest % size[axis];
    at[0] = rest;
    float *C = scratch, *rows = scratch + plan.tiles_a_block * NB;
    for (long i = 0; i < count; i++) {
      to[i] = first + i;
      if (job.transposed)
        to[i] = ((at[0] * job.out[0] + at[1] * job.stride[0]) * job.out[1] + at[2] * job.stride[1]) * job.out[2] + at[3] * job.stride[2];
      else if (plan.lead) gather(at, rows + i * (k + VL));
      for (int axis = 3; axis > 0 && ++at[axis] == size[axis - 1]; axis--) at[axis] = 0, at[axis - 1] += axis == 1;
    }
    const float *A = plan.lead ? rows : job.x + first * k;
    long lda = plan.lead ? k + VL : k;
    for (long panel = 0; panel < plan.panels; panel++) {
      Sums sums[2];
      for (long place = 0; place < places; place++) {
        const float *B = job.weights + (place * plan.panels + panel) * k * NB;
        if (channels - panel * NB > VL) multiply_rows<2>(count, A, lda, B, C, NB, k);
        else multiply_rows<1>(count, A, lda, B, C, NB, k);
        long d = place / job.kernel[2] / job.kernel[1], h = place / job.kernel[2] % job.kernel[1], w = place % job.kernel[2];
        long shift = job.transposed ? (d * job.out[1] + h) * job.out[2] + w : 0;
        for (long half = 0; half < 2 && panel * NB + half * VL < channels; half++) {
          long channel = panel * NB + half * VL, left = channels - channel;
          Vec bias = job.bias ? load(job.bias + channel, left) : Vec{}, slope = job.slope ? load(job.slope + channel, left) : Vec{};
          for (long i = 0; i < count; i++) {
            Vec value = load(C + i * NB + half * VL) + bias;
            if (job.moments) sums[half].add(value);
            if (job.slope) value = leaky(value, slope);
            float *y = job.y + (to[i] + shift) * channels + channel;
            if (past) stream(y, value);
            else store(y, value, left);
          }
        }
      }
      for (long half = 0; job.moments && half < 2 && panel * NB + half * VL < channels; half++)
        sums[half].write(job.moments + block * 3 * channels, panel * NB + half * VL, channels);
    }
    if (past) _mm_sfence();
  }
};

static void product(const Product &job, const Plan &plan, long block, float *scratch) {
  Products{job, plan}.run(block, scratch);
}
