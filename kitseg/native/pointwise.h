// What follows a convolution, voxel by voxel: tensors (voxels, channels), channels last.

constexpr long SLAB = 4096;  // voxels of a job: the same whatever the number of threads, and so are all sums

// Rows of the count, the mean and the sum of squared differences to it for a slab of voxels.
static void moments(const Pointwise &job, long slab) {
  long start = slab * SLAB, end = std::min(start + SLAB, job.voxels);
  for (long channel = 0; channel < job.channels; channel += VL) {
    Sums sums;
    for (long i = start; i < end; i++) sums.add(load(job.x + i * job.channels + channel, job.channels - channel));
    sums.write(job.moments + slab * 3 * job.channels, channel, job.channels);
  }
}

// x = leaky(leaky(scale x + shift, first) + residual, second), in place; a null pointer leaves its step out.
static void affine(const Pointwise &job, long slab) {
  long start = slab * SLAB, end = std::min(start + SLAB, job.voxels), once = job.channels_residual;
  bool repeats = job.residual && !job.more && once < job.channels;
  Whole again = {};  // a few channels fill a vector several times
  for (int i = 0; repeats && i < VL; i++) again[i] = i % once;
  for (long i = start; i < end; i++)
    for (long channel = 0; channel < job.channels; channel += VL) {
      long left = job.channels - channel, at = i * job.channels + channel;
      Vec x = load(job.x + at, left) * load(job.scale + channel, left) + load(job.shift + channel, left);
      if (job.first) x = leaky(x, load(job.first + channel, left));
      const float *residual = job.residual + i * once;
      if (repeats) x += once < VL ? __builtin_shuffle(load(residual, once), again) : load(residual + channel % once);
      else if (job.residual) x += channel < once
        ? load(residual + channel, std::min(left, once - channel))
        : load(job.more + i * (job.channels - once) + channel - once, left);
      if (job.second) x = leaky(x, load(job.second + channel, left));
      store(job.x + at, x, left);
    }
}
