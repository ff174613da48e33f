// A safetensors file of amtl, mapped and checked: python/amtl/store/tensors.py writes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "serve/json.h"

namespace amtl::serve {

struct Tensor {
  std::string type;  // as in safetensors: "F32", "U8", ...
  std::vector<int64_t> shape;
  const uint8_t* data;
  int64_t bytes;
  uint32_t crc;
};

// The tensors of a file by name, and what its header says. Throws Failure.
class TensorFile {
 public:
  explicit TensorFile(const std::string& path);
  ~TensorFile();
  TensorFile(const TensorFile&) = delete;
  TensorFile& operator=(const TensorFile&) = delete;

  const Tensor* Find(const std::string& name) const;
  // Compares all checksums.
  void Verify() const;
  // The file's own header: kind, layers, aliases and more.
  const Json& header() const { return header_; }

 private:
  void Map(const std::string& path);
  void ReadTensors(const Json& entries, int64_t begin);
  void ReadSeal(const std::string& entry);

  const uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  std::map<std::string, Tensor> tensors_;
  Json header_;
};

}  // namespace amtl::serve
