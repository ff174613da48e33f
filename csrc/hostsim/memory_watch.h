// What the simulator knows of global memory: registered buffers, races, traffic. Internal.
#pragma once

#include <cstdint>
#include <string>

#include "hostsim/runtime.h"

namespace hostsim {

struct RunningThread {
  int thread = 0;
  int warp = 0;
  int lane = 0;
  std::uint64_t block = 0;
  std::uint64_t block_serial = 0;
  std::uint32_t collectives = 0;
  std::uint32_t barriers = 0;
};

RunningThread running_thread();

// Throws if the access is not ordered after the last conflicting one by another thread of the
// block; otherwise records it.
void check_hazard(Access access, Shadow& shadow, const std::string& what, Site site);

// A lane touches shared memory, by which it may be told where lanes that skip loads go on together.
void watch_shared(Site site);

void watch_begin_launch();
void watch_end_block();

}  // namespace hostsim
