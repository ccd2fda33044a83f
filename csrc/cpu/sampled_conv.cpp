// sampled_conv on the CPU. The data are channel-first, so a coordinate is a sum over output rows of
// dots of a row of dy with a row of x, shifted by its tap, a position in the kernel. Which outputs
// meet a padded zero depends on the tap alone: they are left out, and x is read in place. Where one
// of those is not finite the coordinate is NaN, as 0 times that is: a channel of dy is looked
// through once for all of its coordinates, while it is read anyway.
//
// Large planes are cut into boxes of outputs, so that what coordinates have in common stays in the
// cache. Neighbours of one channel of dy that leave out the same outputs share its loads.

#include "sampled_conv.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/sampled_conv_rows.h"

namespace dropinf {
namespace {

constexpr int64_t kBlock = 4096;  // coordinates whose partial sums are kept: 128 KiB

// Outputs of a box. Smaller ones would fit the L2 cache, and are slower all the same: the start of
// every piece of a channel waits for memory. A 1x1 convolution of 64 to 256 channels of 56x56, B=8,
// r=1024, one core of a 2-core AMD EPYC Zen 4, 2026-11: 3.8 ms at 1024, 3.0 ms at 4096.
constexpr int64_t kOutputs = 4096;

constexpr int64_t kGap = 256;  // elements that are looked through rather than begun anew

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
  bool whole;       // all of them
};

// A coordinate, with offsets of its channels into an example.
struct Coordinate {
  int64_t x, dy;
  int32_t tap;
  int32_t run;  // that its channel of dy is in, or -1 if it leaves no output out
  bool shares;  // dy and the outputs left out with the coordinate before
};

// Channels of dy that are looked through together.
struct Run {
  int64_t o, channels;
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

// The functions of one capability and dtype.
struct Kernels {
  void (*dots)(const Box&, const void* const* x, const void* dy, int64_t count, float* lanes);
  bool (*finite)(const void* data, int64_t step, int64_t count);
};

template <typename E>
Kernels kernels_of() {
  return {CAPABLE(dots<E>), CAPABLE(finite<E>)};
}

Kernels kernels_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernels_of<BFloat16>();
    case DType::kFloat16:
      return kernels_of<Float16>();
    default:
      return kernels_of<float>();
  }
}

class Call final : public SampledConv {
 public:
  explicit Call(const SampledConvArgs& args)
      : args_(args), element_size_(size_of(args.dtype)), kernels_(kernels_of(args.dtype)) {
    for (int d = 0; d < 3; ++d) {
      whole_.size[d] = args.dy_size[d];
      whole_.x_step[d] = args.stride[d] * args.x_stride[d];
      whole_.dy_step[d] = args.dy_stride[d];
    }
    find_taps();
    while (merge_rows()) {
    }
    for (Tap& tap : taps_) {
      tap.whole = true;
      for (int d = 0; d < 3; ++d) tap.whole &= tap.inside[d] == Range{0, whole_.size[d]};
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
    taps_.push_back({0, {{0, a.dy_size[0]}, {0, a.dy_size[1]}, {0, a.dy_size[2]}}, true});
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
    const auto [D, H, W] = whole_.size;
    const int64_t* const step = whole_.dy_step;
    const int64_t plane = D * H * W;
    const bool together = plane <= kOutputs && step[2] == 1 && (H == 1 || step[1] == W) &&
                          (D == 1 || step[0] == H * W) && a.dy_stride_c == plane;
    const int64_t most = together ? kOutputs / plane : 1;
    const int64_t farthest = together ? 1 + kGap / plane : 0;
    coordinates_.reserve(a.r);
    for (int64_t k = 0; k < a.r; ++k) {
      const int32_t o = a.o_idx[k], i = a.i_idx[k];
      Coordinate here{0, o * a.dy_stride_c, bias_, -1, false};
      if (i < I) {
        const int64_t group = a.groups == 1 ? 0 : o / outs;
        here.tap = i % bias_;
        here.x = (group * (a.C / a.groups) + i / bias_) * a.x_stride_c;
        const Tap& tap = taps_[here.tap];
        const Coordinate* last = k > 0 ? &coordinates_[k - 1] : nullptr;
        here.shares = last && last->tap != bias_ && a.o_idx[k - 1] == o &&
                      std::equal(tap.inside, tap.inside + 3, taps_[last->tap].inside);
        if (!tap.whole) here.run = run_of(o, farthest, most);
      }
      coordinates_.push_back(here);
    }
  }

  // The run that channel o is in: the last one, if it is there or close behind.
  int32_t run_of(int64_t o, int64_t farthest, int64_t most) {
    Run* last = runs_.empty() ? nullptr : &runs_.back();
    const int64_t channels = last ? o - last->o + 1 : 0;
    if (last && 0 < channels && channels <= std::min(last->channels + farthest, most)) {
      last->channels = std::max(last->channels, channels);
    } else {
      runs_.push_back({o, 1});
    }
    return static_cast<int32_t>(runs_.size() - 1);
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
          add(box, parts, x, dy, k_begin, k_end, lanes.data());
        }
      }
    }
    float* out = args_.out + b * args_.out_stride_b;
    for (int64_t k = k_begin; k < k_end; ++k) {
      const float* v = &lanes[(k - k_begin) * kLanes];
      const float sum = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
      out[k * args_.out_stride_k] = args_.weights ? weighted(args_.weights[k], sum) : sum;
    }
  }

  std::array<int64_t, 3> box_size(const Range* box) const {
    std::array<int64_t, 3> size;
    for (int d = 0; d < 3; ++d) size[d] = std::min(box[d].end, whole_.size[d]) - box[d].begin;
    return size;
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
    // Whole rows that follow one another are one.
    Box& it = part.box;
    if (t != bias_ && it.size[2] == whole_.size[2] && it.size[1] > 1 &&
        it.x_step[1] == it.size[2] * it.x_step[2] && it.dy_step[1] == it.size[2] * it.dy_step[2]) {
      it = {{1, it.size[0], it.size[1] * it.size[2]},
            {0, it.x_step[0], it.x_step[2]},
            {0, it.dy_step[0], it.dy_step[2]}};
    }
    return part;
  }

  // Whether dy, an example, is finite in a box of a run.
  bool finite(const Run& run, const Range* box, const void* dy) const {
    const auto [D, H, W] = box_size(box);
    const int64_t* const step = whole_.dy_step;
    if (run.channels > 1) {  // one behind the other
      return kernels_.finite(advance(dy, run.o * args_.dy_stride_c), 1, run.channels * D * H * W);
    }
    const bool one_row = H == 1 || step[1] == W * step[2];
    bool good = true;
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t h = 0; h < (one_row ? 1 : H); ++h) {
        const int64_t at = (box[0].begin + d) * step[0] + (box[1].begin + h) * step[1] +
                           box[2].begin * step[2] + run.o * args_.dy_stride_c;
        good &= kernels_.finite(advance(dy, at), step[2], one_row ? H * W : W);
      }
    }
    return good;
  }

  // Whether it is at the outputs of a box that a tap leaves out. Seldom asked.
  bool finite_outside(const Tap& tap, const Range* box, const void* dy) const {
    const auto [D, H, W] = box_size(box);
    const int64_t* const step = whole_.dy_step;
    const auto in = [](Range range, int64_t p) { return range.begin <= p && p < range.end; };
    bool good = true;
    for (int64_t d = box[0].begin; d < box[0].begin + D; ++d) {
      for (int64_t h = box[1].begin; h < box[1].begin + H; ++h) {
        for (int64_t w = box[2].begin; w < box[2].begin + W; ++w) {
          if (in(tap.inside[0], d) && in(tap.inside[1], h) && in(tap.inside[2], w)) continue;
          good &= kernels_.finite(advance(dy, d * step[0] + h * step[1] + w * step[2]), 1, 1);
        }
      }
    }
    return good;
  }

  // lanes += the parts of one box, in an example at x and dy.
  void add(const Range* box, const std::vector<Part>& parts, const void* x, const void* dy,
           int64_t k_begin, int64_t k_end, float* lanes) const {
    int64_t count;
    int32_t run = -1;
    bool good = true;  // whether dy is finite in that run
    for (int64_t k = k_begin; k < k_end; k += count, lanes += count * kLanes) {
      const Coordinate* here = &coordinates_[k];
      const int64_t most = std::min(kShare, k_end - k);
      for (count = 1; count < most && here[count].shares;) ++count;
      const Part& part = parts[here->tap];
      if (!part.empty) {
        const void* rows[kShare] = {ones_.data()};
        for (int64_t n = 0; n < count && here->tap != bias_; ++n) {
          rows[n] = advance(x, here[n].x + parts[here[n].tap].x);
        }
        kernels_.dots(part.box, rows, advance(dy, here->dy + part.dy), count, lanes);
      }
      if (here->run < 0) continue;
      if (here->run != run) {  // now that its first channel is in the cache
        run = here->run;
        good = finite(runs_[run], box, dy);
      }
      if (good || finite_outside(taps_[here->tap], box, advance(dy, here->dy))) continue;
      for (int64_t n = 0; n < count; ++n) lanes[n * kLanes] = NAN;
    }
  }

  SampledConvArgs args_;
  int64_t element_size_;
  Kernels kernels_;
  std::vector<Tap> taps_;
  int32_t bias_;  // the last of taps_, and the number of those before
  std::vector<Coordinate> coordinates_;
  std::vector<Run> runs_;
  Box whole_;            // all outputs, of contiguous rows merged
  int64_t box_size_[3];  // of the boxes it is cut into, from the layer alone: it orders the sums
  std::vector<char> ones_;
};

}  // namespace

std::unique_ptr<const SampledConv> SampledConv::make(const SampledConvArgs& args) {
  return std::make_unique<const Call>(args);
}

}  // namespace dropinf
