// The scan of score_topk, once for each capability.

// The largest key of `count` scores; a loop that compilers make vectors of.
TARGET inline int32_t largest_key(const float* scores, int64_t count) {
  int32_t largest = kLeastKey;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, key_of(scores[i]));
  return largest;
}
