#include "hostsim/memory_watch.h"

#include <algorithm>
#include <sstream>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace hostsim {

namespace {

struct Buffer {
  std::string name;
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  bool writable = false;
  bool of_host = false;
  std::vector<bool> written;  // empty: initialised from the start
};

// Races are watched in units of two bytes, the smallest element that kernels write.
constexpr std::uintptr_t kRaceUnit = 2;

struct GlobalShadow {
  Shadow in_block;
  std::uint64_t writer_block = ~0ull;
  std::uint64_t reader_block = ~0ull;
  bool several_readers = false;
  bool atomic = false;
};

// A place in the code as a warp executes it between two collectives.
struct PlaceKey {
  std::uint64_t site = 0;
  std::uint64_t warp_and_time = 0;
  unsigned class_and_write = 0;
  bool operator==(const PlaceKey& other) const {
    return site == other.site && warp_and_time == other.warp_and_time &&
           class_and_write == other.class_and_write;
  }
};

std::uint64_t mixed(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t h = (a * 0x9E3779B97F4A7C15ull ^ b) * 0xC2B2AE3D27D4EB4Full;
  return h ^ h >> 32;
}

struct HashKey {
  std::size_t operator()(const PlaceKey& key) const {
    return mixed(mixed(key.site, key.warp_and_time), key.class_and_write);
  }
};

// A sector that a lane asks for. Lanes of the same turn execute one instruction together; which
// those are can be told in two ways.
struct Request {
  std::uint64_t sector = 0;
  std::uint64_t turn = 0;         // times that the lane has been here since the last collective
  std::uint64_t turn_shared = 0;  // the same since it touched shared memory last, and that touch
};

// What a lane has done since its last collective.
struct LaneHistory {
  std::uint32_t collectives = 0;
  std::uint32_t barriers = 0;
  std::uint64_t last_shared = 0;
  std::unordered_map<std::uint64_t, std::uint32_t> executions;
};

struct Watch {
  std::vector<Buffer> buffers;
  std::array<Traffic, kMaxMemoryClasses> traffic{};
  std::unordered_map<std::uintptr_t, GlobalShadow> races;
  std::unordered_map<PlaceKey, std::vector<Request>, HashKey> requests;
  std::unordered_map<int, LaneHistory> lanes;
  std::array<std::unordered_set<std::uint64_t>, 2 * kMaxMemoryClasses> unique;
};

Watch& watch() {
  static Watch instance;
  return instance;
}

std::string range_text(std::uintptr_t begin, std::size_t bytes, const Buffer& buffer) {
  std::ostringstream out;
  out << bytes << " bytes at byte " << static_cast<std::int64_t>(begin - buffer.begin) << " of '"
      << buffer.name << "' (" << buffer.end - buffer.begin << " bytes)";
  return out.str();
}

void check_buffers(Access access, std::uintptr_t begin, std::size_t bytes, Site site) {
  Watch& w = watch();
  if (w.buffers.empty() || !options().watch_bounds) return;
  const Buffer* nearest = nullptr;
  std::uintptr_t distance = ~std::uintptr_t{0};
  for (Buffer& buffer : w.buffers) {
    if (begin >= buffer.begin && begin + bytes <= buffer.end) {
      if (access != Access::kRead && !buffer.writable) {
        fail("read-only", "writes " + range_text(begin, bytes, buffer) + ", which is an input, " +
                              describe(site));
      }
      if (!buffer.written.empty()) {
        for (std::size_t i = begin - buffer.begin; i < begin - buffer.begin + bytes; ++i) {
          if (access != Access::kWrite && !buffer.written[i]) {
            fail("uninitialised-global", "reads " + range_text(begin, bytes, buffer) +
                                             " before it is written, " + describe(site));
          }
          if (access != Access::kRead) buffer.written[i] = true;
        }
      }
      return;
    }
    const std::uintptr_t gap =
        begin < buffer.begin ? buffer.begin - begin : begin + bytes - buffer.end;
    if (gap < distance) {
      distance = gap;
      nearest = &buffer;
    }
  }
  fail("out-of-bounds", std::string(access == Access::kRead ? "reads " : "writes ") +
                            "outside of every buffer; nearest: " +
                            range_text(begin, bytes, *nearest) + ", " + describe(site));
}

void check_global_race(Access access, std::uintptr_t begin, std::size_t bytes, Site site) {
  Watch& w = watch();
  const RunningThread self = running_thread();
  const bool write = access != Access::kRead;
  for (std::uintptr_t unit = begin / kRaceUnit; unit <= (begin + bytes - 1) / kRaceUnit; ++unit) {
    GlobalShadow& shadow = w.races[unit];
    const bool both_atomic = access == Access::kAtomic && shadow.atomic;
    const bool after_other_write =
        shadow.writer_block != ~0ull && shadow.writer_block != self.block && !both_atomic;
    const bool after_other_read = write && shadow.reader_block != ~0ull &&
                                  (shadow.several_readers || shadow.reader_block != self.block);
    if (after_other_write || after_other_read) {
      fail("race",
           std::string("global memory ") + (write ? "written" : "read") + " at " + describe(site) +
               " is also " + (after_other_write ? "written" : "read") + " by block " +
               std::to_string(after_other_write ? shadow.writer_block : shadow.reader_block) +
               " of the same launch");
    }
    if (shadow.in_block.block_serial != self.block_serial) {
      shadow.in_block = Shadow{};
      shadow.in_block.block_serial = self.block_serial;
    }
    check_hazard(access, shadow.in_block, "global memory", site);
    if (write) {
      shadow.writer_block = self.block;
      shadow.atomic = access == Access::kAtomic;
    } else {
      if (shadow.reader_block != ~0ull && shadow.reader_block != self.block) {
        shadow.several_readers = true;
      }
      shadow.reader_block = self.block;
    }
  }
}

std::uint64_t place_of(Site site) {
  return reinterpret_cast<std::uintptr_t>(site.file) * 65536 + static_cast<unsigned>(site.line);
}

LaneHistory& history_of(const RunningThread& self) {
  LaneHistory& lane = watch().lanes[self.thread];
  if (lane.collectives != self.collectives || lane.barriers != self.barriers) {
    lane.collectives = self.collectives;
    lane.barriers = self.barriers;
    lane.last_shared = 0;
    lane.executions.clear();
  }
  return lane;
}

void count_traffic(Access access, std::uintptr_t begin, std::size_t bytes, int memory_class,
                   Site site) {
  Watch& w = watch();
  const RunningThread self = running_thread();
  LaneHistory& lane = history_of(self);
  const bool write = access != Access::kRead;
  const std::uint64_t place = place_of(site) * 2 + write;
  PlaceKey key;
  key.site = place;
  key.warp_and_time = static_cast<std::uint64_t>(self.warp) << 48 |
                      static_cast<std::uint64_t>(self.barriers & 0xffff) << 32 | self.collectives;
  key.class_and_write = static_cast<unsigned>(memory_class) << 1 | write;
  Request request;
  request.turn = lane.executions[place]++;
  request.turn_shared = mixed(lane.last_shared, lane.executions[mixed(place, lane.last_shared)]++);
  auto& requests = w.requests[key];
  for (request.sector = begin / kSectorBytes; request.sector <= (begin + bytes - 1) / kSectorBytes;
       ++request.sector) {
    requests.push_back(request);
  }
  Traffic& t = w.traffic[memory_class];
  (access == Access::kRead ? t.read_bytes : t.write_bytes) += bytes;
}

// Instructions, and the distinct sectors of each.
struct Counts {
  std::uint64_t instructions = 0;
  std::uint64_t sectors = 0;
};

Counts distinct(std::vector<Request>& requests, std::uint64_t Request::* turn) {
  std::sort(requests.begin(), requests.end(), [turn](const Request& a, const Request& b) {
    return a.*turn != b.*turn ? a.*turn < b.*turn : a.sector < b.sector;
  });
  Counts counts;
  const Request* last = nullptr;
  for (const Request& request : requests) {
    const bool next = last == nullptr || last->*turn != request.*turn;
    counts.instructions += next;
    counts.sectors += next || last->sector != request.sector;
    last = &request;
  }
  return counts;
}

}  // namespace

void watch_shared(Site site) {
  if (!options().track_traffic) return;
  LaneHistory& lane = history_of(running_thread());
  const std::uint64_t place = mixed(place_of(site), 1);
  lane.last_shared = mixed(place, ++lane.executions[place]);
}

std::array<Traffic, kMaxMemoryClasses>& traffic() { return watch().traffic; }

void reset_traffic() { watch().traffic = {}; }

void register_buffer(const std::string& name, const void* data, std::size_t bytes, bool writable,
                     bool initialised) {
  Buffer buffer;
  buffer.name = name;
  buffer.begin = reinterpret_cast<std::uintptr_t>(data);
  buffer.end = buffer.begin + bytes;
  buffer.writable = writable;
  if (!initialised) buffer.written.assign(bytes, false);
  watch().buffers.push_back(std::move(buffer));
}

void forget_buffer(const void* data) {
  std::erase_if(watch().buffers, [=](const Buffer& buffer) {
    return buffer.begin == reinterpret_cast<std::uintptr_t>(data);
  });
}

void register_host_buffer(const std::string& name, const void* data, std::size_t bytes) {
  register_buffer(name, data, bytes, true, true);
  watch().buffers.back().of_host = true;
}

void clear_buffers() {
  std::erase_if(watch().buffers, [](const Buffer& buffer) { return !buffer.of_host; });
}

void library_access(Access access, const void* data, std::size_t bytes, const char* what) {
  check_buffers(access, reinterpret_cast<std::uintptr_t>(data), bytes, Site{what, 0});
}

void watch_begin_launch() {
  Watch& w = watch();
  w.races.clear();
  w.requests.clear();
  w.lanes.clear();
  for (auto& set : w.unique) set.clear();
}

void watch_end_block() {
  Watch& w = watch();
  for (auto& [key, requests] : w.requests) {
    // Lanes that skip an access in a loop fall behind by the first way of telling turns, lanes that
    // touch shared memory alone by the second: the better one is taken, place by place.
    const Counts by_turn = distinct(requests, &Request::turn);
    const Counts by_shared = distinct(requests, &Request::turn_shared);
    const Counts& counts = by_shared.sectors < by_turn.sectors ? by_shared : by_turn;
    const bool write = key.class_and_write & 1;
    const auto memory_class = static_cast<int>(key.class_and_write >> 1);
    Traffic& t = w.traffic[memory_class];
    (write ? t.write_sectors : t.read_sectors) += counts.sectors;
    t.requests += counts.instructions;
    auto& unique = w.unique[memory_class * 2 + write];
    for (const Request& request : requests) {
      if (unique.insert(request.sector).second) {
        ++(write ? t.unique_write_sectors : t.unique_read_sectors);
      }
    }
  }
  w.requests.clear();
  w.lanes.clear();
}

void global_access(Access access, const void* address, std::size_t bytes, int memory_class,
                   Site site) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  if (bytes > 1 && begin % bytes != 0) {
    std::ostringstream out;
    out << bytes << "-byte access at an address that is " << begin % bytes
        << " bytes off its alignment, " << describe(site);
    fail("misaligned", out.str());
  }
  check_buffers(access, begin, bytes, site);
  const Options& o = options();
  if (o.track_races) check_global_race(access, begin, bytes, site);
  if (o.track_traffic) count_traffic(access, begin, bytes, memory_class, site);
}

}  // namespace hostsim
