// gather_grads, sampled_embedding, sampled_norm, sampled_conv and score_topk.

#pragma once

#include "cuda/gather_grads.cuh"
#include "cuda/sampled_conv.cuh"
#include "cuda/sampled_embedding.cuh"
#include "cuda/sampled_norm.cuh"
#include "cuda/score_topk.cuh"
#include "inputs.cuh"

namespace dropinf {
namespace bench {

inline Case gather(const Pools& pools, int64_t L, int64_t numel, int64_t r) {
  const Pool<BFloat16>& pool = pools.halves;
  std::vector<int64_t> at;
  for (int64_t l = 0; l < L; ++l) {
    for (const int64_t n : positions(r, numel)) at.push_back((n + 7919 * l) % numel);
  }
  const Device<int64_t> idx(at);
  const std::vector<float> factors = weights(L * r);
  const Device<float> device_weights(factors), out(L * r);

  Case it;
  it.name = label("gather_grads, %d layers, r=%d", L, r);
  it.num_bytes = L * r * (8 + 4 + kSector);
  it.run = [=, &pool](int64_t turn) {
    const BFloat16* const data = pool.data() + pool.at(turn, L * numel);
    std::vector<GradEntries> layers(static_cast<size_t>(L));
    for (int64_t l = 0; l < L; ++l) {
      GradEntries& grad = layers[l];
      grad = {};
      grad.data = data + l * numel;
      grad.dtype = DType::kBFloat16;
      grad.numel = numel;
      grad.idx = idx.data() + l * r;
      grad.weights = device_weights.data() + l * r;
      grad.r = r, grad.s = 1;
      grad.out = out.data() + l * r, grad.out_stride = 1;
    }
    return cuda::gather_grads(layers.data(), L, nullptr);
  };
  it.wrong = [=, &pool] {
    return compare(out.on_host(), 1, 0,
                   [&](int64_t n) { return factors[n] * pool[n / r * numel + at[n]]; });
  };
  return it;
}

inline Case embedding(const Pools& pools, int64_t B, int64_t T, int64_t vocabulary, int64_t O,
                      int64_t r) {
  const Pool<BFloat16>& pool = pools.halves;
  const Coordinates at(r, vocabulary, O);
  std::mt19937_64 generator(2);
  std::vector<int64_t> tokens;
  for (int64_t n = 0; n < B * T; ++n) tokens.push_back(generator() % vocabulary);
  const Device<int64_t> ids(tokens);
  const Device<int32_t> o_idx(at.column), i_idx(at.row);
  const std::vector<float> factors = weights(r);
  const Device<float> device_weights(factors), out(B * r);

  Case it;
  it.name = label("sampled_embedding %d x %d, r=%d", vocabulary, O, r);
  it.num_bytes = 8 * (B * T + r) + B * T * r / vocabulary * kSector;
  it.run = [=, &pool](int64_t turn) {
    SampledEmbeddingArgs args{};
    args.ids = ids.data();
    args.dtype = DType::kBFloat16;
    args.dy = pool.data() + pool.at(turn, B * T * O);
    args.B = B, args.T = T, args.O = O, args.r = r;
    args.dy_stride_b = T * O, args.dy_stride_t = O;
    args.o_idx = o_idx.data(), args.i_idx = i_idx.data();
    args.weights = device_weights.data();
    args.out = out.data(), args.out_stride_b = r, args.out_stride_k = 1;
    return cuda::sampled_embedding(args, nullptr);
  };
  it.wrong = [=, &pool] {
    return compare(out.on_host(), T, 0, [&](int64_t n) {
      const int64_t b = n / r, k = n % r;
      double sum = 0;
      for (int64_t t = b * T; t < (b + 1) * T; ++t) {
        if (tokens[t] == at.row[k]) sum += pool[t * O + at.column[k]];
      }
      return factors[k] * sum;
    });
  };
  return it;
}

inline Case norm(const Pools& pools, int64_t B, int64_t T, int64_t I, int64_t r) {
  const Pool<BFloat16>& pool = pools.halves;
  std::vector<int32_t> at;
  for (const int64_t n : positions(r, 2 * I)) at.push_back(static_cast<int32_t>(n));
  const Device<int32_t> index(at);
  const std::vector<float> factors = weights(r);
  const Device<float> device_weights(factors), out(B * r);

  SampledNormArgs args{};
  args.dtype = DType::kBFloat16;
  args.B = B, args.T = T, args.I = I, args.r = r, args.s = 1;
  args.x_stride_b = args.dy_stride_b = T * I;
  args.x_stride_t = args.dy_stride_t = I;
  args.eps = 1e-5f;
  const Device<float> scratch(cuda::sampled_norm_scratch(args));

  Case it;
  it.name = label("sampled_norm, T=%d, I=%d, r=%d", T, I, r);
  it.num_bytes = 2 * 2 * B * T * I;
  it.run = [=, &pool](int64_t turn) {
    SampledNormArgs call = args;
    call.x = pool.data() + pool.at(turn, 2 * B * T * I);
    call.dy = static_cast<const BFloat16*>(call.x) + B * T * I;
    call.index = index.data(), call.weights = device_weights.data();
    call.out = out.data(), call.out_stride_b = r, call.out_stride_k = 1;
    return cuda::sampled_norm(call, scratch.data(), nullptr);
  };
  it.wrong = [=, &pool] {
    std::vector<double> mean, deviation;
    for (int64_t row = 0; row < B * T; ++row) {
      double sum = 0, square = 0;
      for (int64_t i = 0; i < I; ++i) sum += pool[row * I + i];
      for (int64_t i = 0; i < I; ++i) square += std::pow(pool[row * I + i] - sum / I, 2);
      mean.push_back(sum / I);
      deviation.push_back(std::sqrt(square / I + 1e-5));
    }
    return compare(out.on_host(), T, 1e-5 * T, [&](int64_t n) {
      const int64_t b = n / r, k = n % r, i = at[k] % I;
      double sum = 0;
      for (int64_t row = b * T; row < (b + 1) * T; ++row) {
        const double x = at[k] < I ? (pool[row * I + i] - mean[row]) / deviation[row] : 1;
        sum += x * pool[B * T * I + row * I + i];
      }
      return factors[k] * sum;
    });
  };
  return it;
}

// C to C channels of `side` x `side`, 3 x 3 with a padding of 1.
inline Case conv(const Pools& pools, int64_t B, int64_t C, int64_t side, int64_t r,
                 bool channels_last) {
  const Pool<BFloat16>& pool = pools.halves;
  const Coordinates at(r, C, C * 9);
  const Device<int32_t> o_idx(at.row), i_idx(at.column);
  const std::vector<float> factors = weights(r);
  const Device<float> device_weights(factors), out(B * r);
  const int64_t size = C * side * side, stride_c = channels_last ? 1 : side * side;
  const int64_t stride_w = channels_last ? C : 1, stride_h = side * stride_w;

  Case it;
  it.name = label("sampled_conv, %d channels of %d^2, r=%d", C, side, r) +
            (channels_last ? ", channels last" : "");
  it.num_bytes = 2 * 2 * B * size;
  it.run = [=, &pool](int64_t turn) {
    SampledConvArgs args{};
    args.dtype = DType::kBFloat16;
    args.x = pool.data() + pool.at(turn, 2 * B * size);
    args.dy = static_cast<const BFloat16*>(args.x) + B * size;
    args.B = B, args.C = C, args.O = C, args.groups = 1, args.I = C * 9, args.r = r;
    args.x_stride_b = args.dy_stride_b = size;
    args.x_stride_c = args.dy_stride_c = stride_c;
    const int64_t strides[3] = {side * stride_h, stride_h, stride_w};
    for (int d = 0; d < 3; ++d) {
      args.x_size[d] = args.dy_size[d] = d ? side : 1;
      args.x_stride[d] = args.dy_stride[d] = strides[d];
      args.kernel_size[d] = d ? 3 : 1;
      args.padding[d] = d ? 1 : 0;
      args.stride[d] = args.dilation[d] = 1;
    }
    args.o_idx = o_idx.data(), args.i_idx = i_idx.data();
    args.weights = device_weights.data();
    args.out = out.data(), args.out_stride_b = r, args.out_stride_k = 1;
    return cuda::sampled_conv(args, nullptr);
  };
  it.wrong = [=, &pool] {
    return compare(out.on_host(), side * side, 0, [&](int64_t n) {
      const int64_t k = n % r, x = n / r * size, dy = x + B * size;
      const int64_t channel = at.column[k] / 9, q = at.column[k] % 9;
      double sum = 0;
      for (int64_t h = 0; h < side; ++h) {
        for (int64_t w = 0; w < side; ++w) {
          const int64_t x_h = h + q / 3 - 1, x_w = w + q % 3 - 1;
          if (x_h < 0 || x_h >= side || x_w < 0 || x_w >= side) continue;
          sum += pool[x + channel * stride_c + x_h * stride_h + x_w * stride_w] *
                 pool[dy + at.row[k] * stride_c + h * stride_h + w * stride_w];
        }
      }
      return factors[k] * sum;
    });
  };
  return it;
}

// Turn after turn scores of more rows, as in a pass over a store.
inline Case topk(const Pool<float>& pool, int64_t m, int64_t c, int64_t k) {
  const Device<float> values(std::vector<float>(static_cast<size_t>(m * k), -INFINITY));
  const Device<int64_t> indices(std::vector<int64_t>(static_cast<size_t>(m * k), -1));

  ScoreTopkArgs args{};
  args.m = m, args.c = c, args.scores_stride = c, args.k = k;
  args.values = values.data(), args.indices = indices.data();
  int64_t num_parts = 1;
  check(cuda::score_topk_parts(args, &num_parts), "score_topk_parts");
  const Device<float> scratch(cuda::score_topk_scratch(args, num_parts));

  Case it;
  it.name = label("score_topk, m=%d, %d scores, k=%d", m, c, k) + label(", parts: %d", num_parts);
  it.num_bytes = 4 * m * c;
  it.run = [=, &pool](int64_t turn) {
    ScoreTopkArgs call = args;
    call.scores = pool.data() + pool.at(turn, m * c);
    call.first = turn * c;
    return cuda::score_topk(call, num_parts, scratch.data(), nullptr);
  };
  it.wrong = [=, &pool] {
    const auto all_values = values.on_host();
    const auto all_rows = indices.on_host();
    for (int64_t q = 0; q < m; ++q) {
      std::vector<std::pair<double, int64_t>> best;  // of equal ones the lower row first
      for (int64_t row = 0; row < c; ++row) best.push_back({-pool[q * c + row], row});
      std::partial_sort(best.begin(), best.begin() + k, best.end());
      for (int64_t n = 0; n < k; ++n) {
        const bool same =
            all_values[q * k + n] == -best[n].first && all_rows[q * k + n] == best[n].second;
        if (!same) return label("query %d has another row at place %d", q, n);
      }
    }
    return std::string();
  };
  return it;
}

}  // namespace bench
}  // namespace dropinf
