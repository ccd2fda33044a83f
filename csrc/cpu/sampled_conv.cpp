// sampled_conv on the CPU. The data are channel-first, so a coordinate is a sum over output rows of
// dots of a row of dy with a row of x, shifted by its tap, a position in the kernel. Which outputs
// meet a padded zero depends on the tap alone: they are left out, and x is read in place.
//
// Large planes are cut into boxes of outputs, so that what coordinates have in common stays in the
// cache. Neighbours of one channel of dy that leave out the same outputs share its loads.

#include "sampled_conv.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/lanes.h"

namespace dropinf {
namespace {

constexpr int64_t kShare = 3;     // coordinates that share the loads of dy
constexpr int64_t kBlock = 4096;  // coordinates whose partial sums are kept: 128 KiB

// Outputs of a box. Smaller ones would fit the L2 cache, and are slower all the same: the start of
// every piece of a channel waits for memory. A 1x1 convolution of 64 to 256 channels of 56x56, B=8,
// r=1024, one core of a 2-core AMD EPYC Zen 4, 2026-11: 3.8 ms at 1024, 3.0 ms at 4096.
constexpr int64_t kOutputs = 4096;

// ns on one core of a 2-core AMD EPYC Zen 4, 2026-11: they only decide when a thread pays.
constexpr double kEntryNs = 20;
constexpr double kRowNs = 2;
constexpr double kOutputNs = 0.05;

struct Range {
  int64_t begin, end;
  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

// A position in the kernel, or the bias.
struct Tap {
  int64_t x;        // offset of what output 0 meets, which may be in the padding
  Range inside[3];  // outputs that meet no padding
};

// A coordinate, with offsets of its channels into an example.
struct Coordinate {
  int64_t x, dy;
  int32_t tap;
  bool shares;  // dy and the outputs left out with the coordinate before
};

// What a dot runs over: sizes, and steps in elements.
struct Box {
  int64_t size[3], x_step[3], dy_step[3];
};

// The outputs of a box that meet a tap, with offsets into a channel.
struct Part {
  Box box;
  int64_t x, dy;
  bool empty;
};

// The outputs p in [0, size) with p * stride + offset in [0, x_size).
Range inside(int64_t size, int64_t x_size, int64_t stride, int64_t offset) {
  const auto ceil_div = [&](int64_t n) { return n <= 0 ? 0 : (n + stride - 1) / stride; };
  const Range range{ceil_div(-offset), std::min(size, ceil_div(x_size - offset))};
  return range.begin < range.end ? range : Range{0, 0};
}

// lanes[n * kLanes + w % kLanes] += the products of dy and x[n].
template <bool kUnit, typename E>
void dots_portable(const Box& box, const E* const* x, const E* dy, int64_t count, float* lanes) {
  const int64_t W = box.size[2];
  const int64_t x_step = kUnit ? 1 : box.x_step[2], dy_step = kUnit ? 1 : box.dy_step[2];
  for (int64_t n = 0; n < count; ++n, lanes += kLanes) {
    for (int64_t d = 0; d < box.size[0]; ++d) {
      for (int64_t h = 0; h < box.size[1]; ++h) {
        const E* u = x[n] + d * box.x_step[0] + h * box.x_step[1];
        const E* v = dy + d * box.dy_step[0] + h * box.dy_step[1];
        int64_t w = 0;
        for (; w + kLanes <= W; w += kLanes, u += kLanes * x_step, v += kLanes * dy_step) {
          for (int64_t j = 0; j < kLanes; ++j) {
            lanes[j] += to_float(u[j * x_step]) * to_float(v[j * dy_step]);
          }
        }
        for (int64_t j = 0; w < W; ++w, ++j) {
          lanes[j] += to_float(u[j * x_step]) * to_float(v[j * dy_step]);
        }
      }
    }
  }
}

template <typename E>
void dots_portable(const Box& box, const void* const* x, const void* dy, int64_t count,
                   float* lanes) {
  const E* pointers[kShare];
  for (int64_t n = 0; n < count; ++n) pointers[n] = static_cast<const E*>(x[n]);
  const bool unit = box.x_step[2] == 1 && box.dy_step[2] == 1;
  const auto dots = unit ? dots_portable<true, E> : dots_portable<false, E>;
  dots(box, pointers, static_cast<const E*>(dy), count, lanes);
}

#if DROPINF_AVX2

using avx2::load1;
using avx2::widen;

// Steps between elements that are known when compiled; kAny is the box's.
constexpr int kAny = 0;

AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }

template <typename E>
AVX2 inline __m256 load8(const E* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), E{});
}

// 8 elements `step` apart.
template <int kStep, typename E>
AVX2 inline __m256 load8(const E* p, int64_t step) {
  if (kStep == 1) return load8(p);
  if (kStep == 2) {  // the last element read is the last one wanted
    const __m256 both = _mm256_shuffle_ps(load8(p), load8(p + 7), 0xd8);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(both), 0xd8));
  }
  return _mm256_setr_ps(load1(p), load1(p + step), load1(p + 2 * step), load1(p + 3 * step),
                        load1(p + 4 * step), load1(p + 5 * step), load1(p + 6 * step),
                        load1(p + 7 * step));
}

// The first `count` of 8 elements, 0 < count < 8, and zeros. Nothing beyond them is read.
AVX2 inline __m256 load_first(const float* p, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  return _mm256_maskload_ps(p, wanted);
}

template <typename T, typename E>
AVX2 inline uint64_t bits_at(const E* p) {
  T bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

// 16-bit elements have no masked load: two loads of half the width that overlap.
AVX2 inline uint64_t first_bits(const void* data, int64_t count) {
  const auto* p = static_cast<const uint16_t*>(data);
  if (count >= 4) return bits_at<uint64_t>(p);
  if (count == 1) return *p;
  return bits_at<uint32_t>(p) | uint64_t{p[count - 1]} << 16 * (count - 1);
}

template <typename E>
AVX2 inline __m256 load_first(const E* p, int64_t count) {
  const uint64_t low = first_bits(p, count);
  const uint64_t high = count > 4 ? bits_at<uint64_t>(p + count - 4) >> 16 * (8 - count) : 0;
  return widen(_mm_set_epi64x(high, low), E{});
}

template <int kStep, typename E>
AVX2 inline __m256 load_first(const E* p, int64_t step, int64_t count) {
  if (kStep == 1) return load_first(p, count);
  float v[8] = {};
  for (int64_t j = 0; j < count; ++j) v[j] = load1(p + j * step);
  return _mm256_loadu_ps(v);
}

constexpr int kChains = 4;  // independent sums of a coordinate: the latency of an FMA

// sums[n] += 8 products.
template <int kXStep, int kDyStep, int kCount, typename E>
AVX2 inline void add8(const E* const* x, int64_t x_step, const E* dy, int64_t dy_step, int64_t w,
                      __m256* sums) {
  const __m256 v = load8<kDyStep>(dy + w * dy_step, dy_step);
  for (int n = 0; n < kCount; ++n) {
    sums[n] = _mm256_fmadd_ps(v, load8<kXStep>(x[n] + w * x_step, x_step), sums[n]);
  }
}

template <int kXStep, int kDyStep, int kCount, typename E>
AVX2 void dots_avx2(const Box& box, const void* const* x_data, const void* dy_data, float* lanes) {
  const int64_t W = box.size[2], rest = W % 8, whole = W - rest;
  const int64_t x_step = kXStep ? kXStep : box.x_step[2];
  const int64_t dy_step = kDyStep ? kDyStep : box.dy_step[2];
  // Each chain has a name: the compiler keeps an array of them in memory.
  __m256 a[kCount], b[kCount], c[kCount], d[kCount];
  for (int n = 0; n < kCount; ++n) a[n] = b[n] = c[n] = d[n] = _mm256_setzero_ps();
  for (int64_t p = 0; p < box.size[0]; ++p) {
    for (int64_t q = 0; q < box.size[1]; ++q) {
      const E* dy = static_cast<const E*>(dy_data) + p * box.dy_step[0] + q * box.dy_step[1];
      const E* x[kCount];
      for (int n = 0; n < kCount; ++n) {
        x[n] = static_cast<const E*>(x_data[n]) + p * box.x_step[0] + q * box.x_step[1];
      }
      int64_t w = 0;
      for (; w + 32 <= W; w += 32) {
        add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w, a);
        add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 8, b);
        add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 16, c);
        add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 24, d);
      }
      if (w + 8 <= W) add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w, a);
      if (w + 16 <= W) add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 8, b);
      if (w + 24 <= W) add8<kXStep, kDyStep, kCount>(x, x_step, dy, dy_step, w + 16, c);
      if (rest == 0) continue;
      const __m256 v = load_first<kDyStep>(dy + whole * dy_step, dy_step, rest);
      for (int n = 0; n < kCount; ++n) {
        const __m256 u = load_first<kXStep>(x[n] + whole * x_step, x_step, rest);
        d[n] = _mm256_fmadd_ps(v, u, d[n]);
      }
    }
  }
  for (int n = 0; n < kCount; ++n, lanes += kLanes) {
    const __m256 sum = _mm256_add_ps(_mm256_add_ps(a[n], b[n]), _mm256_add_ps(c[n], d[n]));
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_loadu_ps(lanes), sum));
  }
}

template <int kXStep, int kDyStep, typename E>
AVX2 void dots_avx2(const Box& box, const void* const* x, const void* dy, int64_t count,
                    float* lanes) {
  switch (count) {
    case 1:
      return dots_avx2<kXStep, kDyStep, 1, E>(box, x, dy, lanes);
    case 2:
      return dots_avx2<kXStep, kDyStep, 2, E>(box, x, dy, lanes);
    default:
      return dots_avx2<kXStep, kDyStep, kShare, E>(box, x, dy, lanes);
  }
}

template <typename E>
AVX2 void dots_avx2(const Box& box, const void* const* x, const void* dy, int64_t count,
                    float* lanes) {
  const int64_t x_step = box.x_step[2];
  if (box.dy_step[2] != 1) return dots_avx2<kAny, kAny, E>(box, x, dy, count, lanes);
  if (x_step == 1) return dots_avx2<1, 1, E>(box, x, dy, count, lanes);
  if (x_step == 2) return dots_avx2<2, 1, E>(box, x, dy, count, lanes);
  return dots_avx2<kAny, 1, E>(box, x, dy, count, lanes);
}

#endif  // DROPINF_AVX2

using Dots = void (*)(const Box&, const void* const* x, const void* dy, int64_t count,
                      float* lanes);

template <typename E>
Dots dots_of() {
#if DROPINF_AVX2
  if (use_avx2()) return dots_avx2<E>;
#endif
  return dots_portable<E>;
}

Dots dots_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return dots_of<BFloat16>();
    case DType::kFloat16:
      return dots_of<Float16>();
    default:
      return dots_of<float>();
  }
}

class Call final : public SampledConv {
 public:
  explicit Call(const SampledConvArgs& args)
      : args_(args),
        element_size_(args.dtype == DType::kFloat32 ? 4 : 2),
        dots_(dots_of(args.dtype)) {
    for (int d = 0; d < 3; ++d) {
      whole_.size[d] = args.dy_size[d];
      whole_.x_step[d] = args.stride[d] * args.x_stride[d];
      whole_.dy_step[d] = args.dy_stride[d];
    }
    find_taps();
    while (merge_rows()) {
    }
    find_coordinates();
    const auto [D, H, W] = whole_.size;
    box_size_[2] = std::min(W, kOutputs);
    box_size_[1] = std::clamp<int64_t>(kOutputs / box_size_[2], 1, H);
    box_size_[0] = std::clamp<int64_t>(kOutputs / (box_size_[1] * box_size_[2]), 1, D);
    make_ones();
    entry_ns = kEntryNs + D * H * (kRowNs + kOutputNs * W);
  }

  void entries(int64_t b, int64_t k_begin, int64_t k_end) const override {
    for (; k_begin < k_end; k_begin += kBlock) {
      block(b, k_begin, std::min(k_begin + kBlock, k_end));
    }
  }

 private:
  // taps_ of the whole kernel, and last the bias, which meets ones at every output.
  void find_taps() {
    const SampledConvArgs& a = args_;
    int64_t q[3];
    for (q[0] = 0; q[0] < a.kernel_size[0]; ++q[0]) {
      for (q[1] = 0; q[1] < a.kernel_size[1]; ++q[1]) {
        for (q[2] = 0; q[2] < a.kernel_size[2]; ++q[2]) {
          Tap tap{};
          for (int d = 0; d < 3; ++d) {
            const int64_t offset = q[d] * a.dilation[d] - a.padding[d];
            tap.x += offset * a.x_stride[d];
            tap.inside[d] = inside(a.dy_size[d], a.x_size[d], a.stride[d], offset);
          }
          taps_.push_back(tap);
        }
      }
    }
    bias_ = taps_.size();
    taps_.push_back({0, {{0, a.dy_size[0]}, {0, a.dy_size[1]}, {0, a.dy_size[2]}}});
  }

  // Where rows of outputs are contiguous and no tap leaves out a part of one, as in a 1x1
  // convolution, they are one row.
  bool merge_rows() {
    const auto [D, H, W] = whole_.size;
    if (D == 1 && H == 1) return false;
    if (H > 1 &&
        (whole_.x_step[1] != W * whole_.x_step[2] || whole_.dy_step[1] != W * whole_.dy_step[2])) {
      return false;
    }
    for (const Tap& tap : taps_) {
      if (!(tap.inside[2] == Range{0, W} || tap.inside[2] == Range{0, 0})) return false;
    }
    for (Tap& tap : taps_) {
      auto& [d, h, w] = tap.inside;
      if (w.end > 0) w = {h.begin * W, h.end * W};
      h = d;
      d = {0, 1};
    }
    whole_.size[2] = H * W;
    whole_.size[1] = D;
    whole_.size[0] = 1;
    whole_.x_step[1] = whole_.x_step[0];
    whole_.dy_step[1] = whole_.dy_step[0];
    return true;
  }

  void find_coordinates() {
    const SampledConvArgs& a = args_;
    const int64_t I = a.C / a.groups * bias_, outs = a.O / a.groups;
    coordinates_.reserve(a.r);
    for (int64_t k = 0; k < a.r; ++k) {
      const int32_t o = a.o_idx[k], i = a.i_idx[k];
      Coordinate here{0, o * a.dy_stride_c, bias_, false};
      if (i < I) {
        here.tap = i % bias_;
        here.x = (o / outs * (a.C / a.groups) + i / bias_) * a.x_stride_c;
        const Coordinate* last = k > 0 ? &coordinates_[k - 1] : nullptr;
        here.shares =
            last && last->tap != bias_ && a.o_idx[k - 1] == o &&
            std::equal(taps_[here.tap].inside, taps_[here.tap].inside + 3, taps_[last->tap].inside);
      }
      coordinates_.push_back(here);
    }
  }

  // A row of ones for the bias to meet.
  void make_ones() {
    const float wide = 1.0f;
    const uint16_t narrow = args_.dtype == DType::kBFloat16 ? 0x3f80 : 0x3c00;
    const void* one = element_size_ == sizeof wide ? static_cast<const void*>(&wide) : &narrow;
    ones_.resize(box_size_[2] * element_size_);
    for (size_t at = 0; at < ones_.size(); at += element_size_) {
      std::memcpy(&ones_[at], one, element_size_);
    }
  }

  const void* advance(const void* data, int64_t elements) const {
    return static_cast<const char*>(data) + elements * element_size_;
  }

  // out[b, k_begin:k_end].
  void block(int64_t b, int64_t k_begin, int64_t k_end) const {
    const void* x = advance(args_.x, b * args_.x_stride_b);
    const void* dy = advance(args_.dy, b * args_.dy_stride_b);
    std::vector<float> lanes((k_end - k_begin) * kLanes);
    std::vector<Part> parts(taps_.size());
    const auto [D, H, W] = whole_.size;
    for (int64_t d = 0; d < D; d += box_size_[0]) {
      for (int64_t h = 0; h < H; h += box_size_[1]) {
        for (int64_t w = 0; w < W; w += box_size_[2]) {
          const Range box[3] = {
              {d, d + box_size_[0]}, {h, h + box_size_[1]}, {w, w + box_size_[2]}};
          for (size_t t = 0; t < taps_.size(); ++t) parts[t] = part_of(t, box);
          add(parts, x, dy, k_begin, k_end, lanes.data());
        }
      }
    }
    float* out = args_.out + b * args_.out_stride_b;
    for (int64_t k = k_begin; k < k_end; ++k) {
      const float* v = &lanes[(k - k_begin) * kLanes];
      const float sum = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
      out[k * args_.out_stride_k] = args_.scale * sum;
    }
  }

  Part part_of(int32_t t, const Range* box) const {
    const Tap& tap = taps_[t];
    Part part{whole_, tap.x, 0, false};
    for (int d = 0; d < 3; ++d) {
      const int64_t begin = std::max(box[d].begin, tap.inside[d].begin);
      const int64_t end = std::min(box[d].end, tap.inside[d].end);
      part.empty |= begin >= end;
      part.box.size[d] = end - begin;
      part.x += begin * whole_.x_step[d];
      part.dy += begin * whole_.dy_step[d];
      if (t == bias_) part.box.x_step[d] = d == 2;
    }
    return part;
  }

  // lanes += the parts of one box, in an example at x and dy.
  void add(const std::vector<Part>& parts, const void* x, const void* dy, int64_t k_begin,
           int64_t k_end, float* lanes) const {
    int64_t count;
    for (int64_t k = k_begin; k < k_end; k += count, lanes += count * kLanes) {
      const Coordinate* here = &coordinates_[k];
      const int64_t most = std::min(kShare, k_end - k);
      for (count = 1; count < most && here[count].shares;) ++count;
      const Part& part = parts[here->tap];
      if (part.empty) continue;
      const void* rows[kShare] = {ones_.data()};
      for (int64_t n = 0; n < count && here->tap != bias_; ++n) {
        rows[n] = advance(x, here[n].x + parts[here[n].tap].x);
      }
      dots_(part.box, rows, advance(dy, here->dy + part.dy), count, lanes);
    }
  }

  SampledConvArgs args_;
  int64_t element_size_;
  Dots dots_;
  std::vector<Tap> taps_;
  int32_t bias_;  // the last of taps_, and the number of those before
  std::vector<Coordinate> coordinates_;
  Box whole_;            // all outputs, of contiguous rows merged
  int64_t box_size_[3];  // of the boxes it is cut into, from the layer alone: it orders the sums
  std::vector<char> ones_;
};

}  // namespace

std::unique_ptr<const SampledConv> SampledConv::make(const SampledConvArgs& args) {
  return std::make_unique<const Call>(args);
}

}  // namespace dropinf
