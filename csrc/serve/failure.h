// What goes wrong, on its way to the caller of the C functions.
#pragma once

#include <stdexcept>
#include <string>

#include "serve/amtl_serve.h"

namespace amtl::serve {

struct Failure : std::runtime_error {
  Failure(amtl_status why, const std::string& text) : std::runtime_error(text), status(why) {}
  amtl_status status;
};

[[noreturn]] inline void Damaged(const std::string& text) {
  throw Failure(AMTL_ERROR_DAMAGED, text);
}

}  // namespace amtl::serve
