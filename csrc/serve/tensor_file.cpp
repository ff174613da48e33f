#include "serve/tensor_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <string_view>
#include <utility>

#include "serve/failure.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Packed files are little-endian, and are looked up as they lie."
#endif

namespace amtl::serve {

namespace {

constexpr char kEntry[] = "amtl.tensorfile";
constexpr char kFormat[] = "amtl-packed";
constexpr int64_t kVersion = 4;
// What other readers of the format take at most.
constexpr uint64_t kMostHeader = 100'000'000;

struct Type {
  const char* name;
  const char* torch_name;
  int64_t bytes;
};
constexpr Type kTypes[] = {
    {"F64", "float64", 8},         {"F32", "float32", 4}, {"F16", "float16", 2},
    {"BF16", "bfloat16", 2},       {"I64", "int64", 8},   {"I32", "int32", 4},
    {"I16", "int16", 2},           {"I8", "int8", 1},     {"U8", "uint8", 1},
    {"U16", "uint16", 2},          {"U32", "uint32", 4},  {"U64", "uint64", 8},
    {"C64", "complex64", 8},       {"BOOL", "bool", 1},   {"F8_E4M3", "float8_e4m3fn", 1},
    {"F8_E5M2", "float8_e5m2", 1},
};

const Type* FindType(const std::string& name) {
  for (const Type& type : kTypes) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

const Type* FindTorchType(const std::string& name) {
  for (const Type& type : kTypes) {
    if (name == type.torch_name) return &type;
  }
  return nullptr;
}

int64_t CountOf(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(count, size, &count)) {
      Damaged("the shape of a tensor is impossible");
    }
  }
  return count;
}

// zlib's, 8 bytes at a time.
class Crc32 {
 public:
  Crc32() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
      table_[0][byte] = crc;
    }
    for (size_t k = 1; k < 8; ++k) {
      for (size_t byte = 0; byte < 256; ++byte) {
        const uint32_t before = table_[k - 1][byte];
        table_[k][byte] = before >> 8 ^ table_[0][before & 0xFF];
      }
    }
  }

  // Of what `crc` is the checksum of, and these bytes behind it.
  uint32_t Add(uint32_t crc, const void* data, size_t size) const {
    const auto* bytes = static_cast<const uint8_t*>(data);
    crc = ~crc;
    for (; size >= 8; size -= 8, bytes += 8) {
      uint64_t word;
      std::memcpy(&word, bytes, 8);
      word ^= crc;
      crc = 0;
      for (size_t k = 0; k < 8; ++k) crc ^= table_[7 - k][word >> (8 * k) & 0xFF];
    }
    for (; size > 0; --size, ++bytes) crc = crc >> 8 ^ table_[0][(crc ^ *bytes) & 0xFF];
    return ~crc;
  }

 private:
  std::array<std::array<uint32_t, 256>, 8> table_;
};

const Crc32& Crc() {
  static const Crc32 crc;
  return crc;
}

uint32_t ReadHex(std::string_view text) {
  uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  if (text.size() != 8 || error != std::errc() || end != text.data() + 8) {
    Damaged("a checksum in its header is not one");
  }
  return value;
}

}  // namespace

TensorFile::TensorFile(const std::string& path) {
  Map(path);
  try {
    uint64_t length = 0;
    if (size_ < 8) Damaged("it is too short");
    std::memcpy(&length, data_, 8);
    if (length > kMostHeader || length > static_cast<uint64_t>(size_) - 8 || data_[8] != '{') {
      throw Failure(AMTL_ERROR_FORMAT, "it is truncated or not a safetensors file");
    }
    const auto* text = reinterpret_cast<const char*>(data_ + 8);
    const Json entries = Json::Parse({text, static_cast<size_t>(length)});
    const Json* metadata = entries.Find("__metadata__");
    const Json* entry = metadata != nullptr ? metadata->Find(kEntry) : nullptr;
    if (entry == nullptr) {
      throw Failure(AMTL_ERROR_FORMAT, "it is a safetensors file, but not a packed file of amtl");
    }
    ReadTensors(entries, 8 + static_cast<int64_t>(length));
    ReadSeal(entry->String());
  } catch (...) {
    munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(size_));
    throw;
  }
}

TensorFile::~TensorFile() { munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(size_)); }

void TensorFile::Map(const std::string& path) {
  const auto fail = [] { throw Failure(AMTL_ERROR_IO, std::strerror(errno)); };
  const int opened = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (opened < 0) fail();
  struct stat about;
  void* mapped = MAP_FAILED;
  const bool known = fstat(opened, &about) == 0;
  const bool plain = known && S_ISREG(about.st_mode) && about.st_size > 0;
  if (plain) {
    mapped = mmap(nullptr, static_cast<size_t>(about.st_size), PROT_READ, MAP_SHARED, opened, 0);
  }
  const int why = errno;
  close(opened);
  errno = why;
  if (known && !plain) throw Failure(AMTL_ERROR_FORMAT, "it is empty or not a plain file");
  if (mapped == MAP_FAILED) fail();
  data_ = static_cast<const uint8_t*>(mapped);
  size_ = about.st_size;
}

void TensorFile::ReadTensors(const Json& entries, int64_t begin) {
  std::vector<std::pair<int64_t, int64_t>> spans;
  for (size_t i = 0; i < entries.Names().size(); ++i) {
    const std::string& name = entries.Names()[i];
    if (name == "__metadata__") continue;
    const Json& entry = entries.values()[i];
    Tensor tensor{entry["dtype"].String(), entry["shape"].Integers(), nullptr, 0, 0};
    const std::vector<int64_t> span = entry["data_offsets"].Integers();
    if (span.size() != 2 || span[0] < 0 || span[0] > span[1] || span[1] > size_ - begin) {
      Damaged("it is truncated, or tensor \"" + name + "\" lies outside of it");
    }
    const Type* type = FindType(tensor.type);
    int64_t bytes = CountOf(tensor.shape);
    tensor.bytes = span[1] - span[0];
    tensor.data = data_ + begin + span[0];
    if (type != nullptr &&
        (__builtin_mul_overflow(bytes, type->bytes, &bytes) || bytes != tensor.bytes)) {
      Damaged("tensor \"" + name + "\" is not of the size that its shape says");
    }
    spans.emplace_back(span[0], span[1]);
    if (!tensors_.emplace(name, std::move(tensor)).second) {
      Damaged("tensor \"" + name + "\" is there twice");
    }
  }
  std::sort(spans.begin(), spans.end());
  int64_t end = 0;
  for (const auto& span : spans) {
    if (span.first != end) Damaged("tensors overlap or leave gaps");
    end = span.second;
  }
  if (end != size_ - begin) Damaged("it is truncated or too long");
}

// {"metadata": ..., "tensors": {name: [type, shape, crc32]}, "crc32": of the other two}
void TensorFile::ReadSeal(const std::string& entry) {
  constexpr std::string_view kTail = ", \"crc32\": \"";
  constexpr size_t kTailSize = kTail.size() + 8 + 2;
  const std::string_view text = entry;
  if (text.size() < kTailSize || text.substr(text.size() - kTailSize, kTail.size()) != kTail) {
    Damaged("its header has no checksum");
  }
  uint32_t crc = Crc().Add(0, text.data(), text.size() - kTailSize);
  crc = Crc().Add(crc, "}", 1);
  if (crc != ReadHex(text.substr(text.size() - 10, 8))) Damaged("checksum of its header");
  const Json seal = Json::Parse(text);

  const Json& sealed = seal["tensors"];
  if (sealed.Names().size() != tensors_.size()) Damaged("its header disagrees about the tensors");
  for (size_t i = 0; i < sealed.Names().size(); ++i) {
    const auto found = tensors_.find(sealed.Names()[i]);
    const std::vector<Json>& told = sealed.values()[i].Array();
    if (found == tensors_.end() || told.size() != 3) {
      Damaged("its header disagrees about the tensors");
    }
    Tensor& tensor = found->second;
    // Both know the type, by its two names, or both do not.
    const Type* type = FindType(tensor.type);
    const Type* named = FindTorchType(told[0].String());
    if (type != named || told[1].Integers() != tensor.shape) {
      Damaged("its header disagrees about tensor \"" + found->first + "\"");
    }
    tensor.crc = ReadHex(told[2].String());
  }

  const Json& metadata = seal["metadata"];
  const Json* format = metadata.Find("format");
  if (format == nullptr) {
    throw Failure(AMTL_ERROR_VERSION,
                  "it is of an old version, or no packed file: open and save it with Python");
  }
  if (format->String() != kFormat) {
    throw Failure(AMTL_ERROR_FORMAT, "it is of format \"" + format->String() + "\", not packed");
  }
  const std::string& version = metadata["version"].String();
  int64_t number = 0;
  const char* last = version.data() + version.size();
  const auto [end, error] = std::from_chars(version.data(), last, number);
  if (error != std::errc() || end != last || number < 1) Damaged("it names no format version");
  if (number > kVersion) {
    throw Failure(AMTL_ERROR_VERSION, "it has format version " + version +
                                          ", this library reads up to " + std::to_string(kVersion));
  }
  header_ = Json::Parse(metadata["amtl"].String());
}

const Tensor* TensorFile::Find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

void TensorFile::Verify() const {
  for (const auto& [name, tensor] : tensors_) {
    if (Crc().Add(0, tensor.data, static_cast<size_t>(tensor.bytes)) != tensor.crc) {
      Damaged("checksum of tensor \"" + name + "\"");
    }
  }
}

}  // namespace amtl::serve
