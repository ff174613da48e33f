// JSON as the headers of packed files hold it. Numbers other than integers are known to be there,
// but not read.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace amtl::serve {

class Json {
 public:
  enum class Kind { kNull, kBool, kInteger, kNumber, kString, kArray, kObject };

  // Throws Failure (AMTL_ERROR_DAMAGED) for what is not one JSON value.
  static Json Parse(std::string_view text);

  // All throw Failure (AMTL_ERROR_DAMAGED) for a value of another kind.
  int64_t Integer() const;
  const std::string& String() const;
  const std::vector<Json>& Array() const;
  std::vector<int64_t> Integers() const;
  // Names of an object's members, in order; values() beside them.
  const std::vector<std::string>& Names() const;
  const std::vector<Json>& values() const { return values_; }
  // A member; nullptr, or a Failure, if it is missing.
  const Json* Find(std::string_view name) const;
  const Json& operator[](std::string_view name) const;
  bool null() const { return kind_ == Kind::kNull; }

 private:
  friend class JsonReader;
  void Require(Kind kind) const;

  Kind kind_ = Kind::kNull;
  int64_t integer_ = 0;
  std::string text_;
  std::vector<std::string> names_;
  std::vector<Json> values_;
};

}  // namespace amtl::serve
