// The best of several levels. A part of kernels.inl.

// For each of kChoices columns the first level whose score less its price is the largest. Scores
// are [levels, kChoices]. The compiler makes vectors of the inner loop.
template <class T, class Level>
inline void ChooseLevels(const T* scores, const T* prices, int64_t levels, Level* level) {
  T best[kChoices];
  for (int i = 0; i < kChoices; ++i) best[i] = scores[i] - prices[0];
  for (int i = 0; i < kChoices; ++i) level[i] = 0;
  for (int64_t m = 1; m < levels; ++m) {
    const T* here = scores + m * kChoices;
    const T price = prices[m];
    const auto number = static_cast<Level>(m);
    for (int i = 0; i < kChoices; ++i) {
      const T value = here[i] - price;
      const bool better = value > best[i];
      best[i] = better ? value : best[i];
      level[i] = better ? number : level[i];
    }
  }
}

void ChooseFloats(const float* scores, const float* prices, int64_t levels, int32_t* level) {
  ChooseLevels(scores, prices, levels, level);
}
void ChooseDoubles(const double* scores, const double* prices, int64_t levels, int64_t* level) {
  ChooseLevels(scores, prices, levels, level);
}
