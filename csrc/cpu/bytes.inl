// Bytes that do not fill a register. Included inside the namespace of an instruction set.

// The first n <= 8 bytes at p, the first one lowest; nothing behind them is read.
inline uint64_t FirstBytes(const char* p, int n) {
  const auto from = [p](auto part, int at) {
    std::memcpy(&part, p + at, sizeof(part));
    return static_cast<uint64_t>(part) << (8 * at);
  };
  // Two parts that overlap say the same of what they share.
  if (n == 8) return from(uint64_t{}, 0);
  if (n >= 4) return from(uint32_t{}, 0) | from(uint32_t{}, n - 4);
  if (n >= 2) return from(uint16_t{}, 0) | from(uint16_t{}, n - 2);
  return n == 1 ? from(uint8_t{}, 0) : 0;
}
