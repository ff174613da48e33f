#include "serve/json.h"

#include <charconv>
#include <cstring>

#include "serve/failure.h"

namespace amtl::serve {

namespace {

// Python's own reader gives up at about a thousand.
constexpr int kMostNested = 500;

void AppendUtf8(uint32_t code, std::string* out) {
  const auto put = [&](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

}  // namespace

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json Whole() {
    Json value = Value(0);
    SkipSpace();
    if (at_ != text_.size()) Fail();
    return value;
  }

 private:
  [[noreturn]] void Fail() const {
    Damaged("its header is not JSON (at byte " + std::to_string(at_) + ")");
  }

  void SkipSpace() {
    while (at_ < text_.size() && std::strchr(" \t\n\r", text_[at_]) != nullptr &&
           text_[at_] != '\0') {
      ++at_;
    }
  }

  bool Skip(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  void Expect(char c) {
    SkipSpace();
    if (!Skip({&c, 1})) Fail();
  }

  // Whether a list that ends with `end` goes on with another item.
  bool More(char end, bool first) {
    SkipSpace();
    if (Skip({&end, 1})) return false;
    if (!first) Expect(',');
    return true;
  }

  Json Value(int depth) {
    if (depth > kMostNested) Fail();
    SkipSpace();
    Json value;
    if (Skip("{")) {
      value.kind_ = Json::Kind::kObject;
      for (bool first = true; More('}', first); first = false) {
        SkipSpace();
        value.names_.push_back(String());
        Expect(':');
        value.values_.push_back(Value(depth + 1));
      }
    } else if (Skip("[")) {
      value.kind_ = Json::Kind::kArray;
      for (bool first = true; More(']', first); first = false) {
        value.values_.push_back(Value(depth + 1));
      }
    } else if (at_ < text_.size() && text_[at_] == '"') {
      value.kind_ = Json::Kind::kString;
      value.text_ = String();
    } else if (Skip("null")) {
      value.kind_ = Json::Kind::kNull;
    } else if (Skip("true") || Skip("false")) {
      value.kind_ = Json::Kind::kBool;
    } else if (Skip("NaN") || Skip("Infinity") || Skip("-Infinity")) {
      value.kind_ = Json::Kind::kNumber;
    } else {
      Number(&value);
    }
    return value;
  }

  void Number(Json* value) {
    const size_t begin = at_;
    while (at_ < text_.size() && text_[at_] != '\0' &&
           std::strchr("+-.0123456789eE", text_[at_]) != nullptr) {
      ++at_;
    }
    if (at_ == begin) Fail();
    const char *first = text_.data() + begin, *last = text_.data() + at_;
    const auto [end, error] = std::from_chars(first, last, value->integer_);
    const bool whole = error == std::errc() && end == last;
    value->kind_ = whole ? Json::Kind::kInteger : Json::Kind::kNumber;
  }

  uint32_t Hex() {
    uint32_t code = 0;
    const std::string_view digits = text_.substr(at_, 4);
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (digits.size() < 4 || error != std::errc() || end != digits.data() + 4) Fail();
    at_ += 4;
    return code;
  }

  std::string String() {
    if (!Skip("\"")) Fail();
    std::string out;
    while (true) {
      const size_t stop = text_.find_first_of("\"\\", at_);
      if (stop == std::string_view::npos) Fail();
      out.append(text_, at_, stop - at_);
      at_ = stop + 1;
      if (text_[stop] == '"') return out;
      if (at_ == text_.size()) Fail();
      const char kind = text_[at_++];
      static constexpr char kKinds[] = "\"\\/bfnrt", kMeant[] = "\"\\/\b\f\n\r\t";
      if (kind == 'u') {
        uint32_t code = Hex();
        if (code >= 0xD800 && code < 0xDC00 && Skip("\\u")) {
          code = 0x10000 + ((code - 0xD800) << 10) + ((Hex() - 0xDC00) & 0x3FF);
        }
        AppendUtf8(code, &out);
      } else if (const char* found = kind ? std::strchr(kKinds, kind) : nullptr) {
        out.push_back(kMeant[found - kKinds]);
      } else {
        Fail();
      }
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::Parse(std::string_view text) { return JsonReader(text).Whole(); }

void Json::Require(Kind kind) const {
  if (kind_ != kind) Damaged("a value in its header is of another kind than it should be");
}

int64_t Json::Integer() const {
  Require(Kind::kInteger);
  return integer_;
}

const std::string& Json::String() const {
  Require(Kind::kString);
  return text_;
}

const std::vector<Json>& Json::Array() const {
  Require(Kind::kArray);
  return values_;
}

std::vector<int64_t> Json::Integers() const {
  std::vector<int64_t> numbers;
  for (const Json& value : Array()) numbers.push_back(value.Integer());
  return numbers;
}

const std::vector<std::string>& Json::Names() const {
  Require(Kind::kObject);
  return names_;
}

const Json* Json::Find(std::string_view name) const {
  const std::vector<std::string>& names = Names();
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return &values_[i];
  }
  return nullptr;
}

const Json& Json::operator[](std::string_view name) const {
  const Json* found = Find(name);
  if (found == nullptr) Damaged("its header has no \"" + std::string(name) + "\"");
  return *found;
}

}  // namespace amtl::serve
