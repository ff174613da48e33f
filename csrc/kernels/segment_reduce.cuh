// Segmented sums over sorted lookups: row gradients, mask gradients, fused optimizer steps.
//
// The sorted list is cut into chunks of equal length, one tile of threads each, whatever rows they
// hold: a row that owns a tenth of all lookups costs no more than any others. A tile adds up run
// after run of equal rows. A run that lies inside of its chunk is finished and written at once; the
// parts of one that crosses chunks become items of the next, `chunk / 2` times shorter list,
// reduced by the same kernel. Sums are taken in one fixed order, so results are reproducible bit
// for bit.
#pragma once

#include <type_traits>

#include "kernels/optimizer.cuh"
#include "kernels/sorted_pairs.cuh"

namespace amtl {

// Partial sums of runs that cross chunks: slots 2c and 2c + 1 belong to chunk c of the list that
// they come from; the first takes a run begun before the chunk, the second one that goes on after.
struct Partials {
  float* sums = nullptr;          // [2 * chunks, D]
  std::int64_t* keys = nullptr;   // [2 * chunks] row, or the group as mask_key has it; -1: empty
  std::int64_t* ranks = nullptr;  // [2 * chunks] number among the distinct rows, or columns of the
                                  // group's mask; null: not asked for, or D
  unsigned* flags = nullptr;      // [2 * chunks] kBegins | kEnds
};

constexpr unsigned kBegins = 1;
constexpr unsigned kEnds = 2;

struct ReduceShape {
  int lanes = 32;  // threads per chunk: a power of two, at most 32
  int chunk = 64;  // items per chunk: a power of two
  std::int64_t grad_stride = 0;
};

// The first list: sorted lookups and the gradient that they receive.
struct LookupList {
  SortedPairs pairs;
  const void* grad = nullptr;            // [B or L, D], read through the payloads
  const std::uint32_t* ranks = nullptr;  // [L] see write_heads_kernel; null: not asked for
};

// Every later list: the partial sums that the one before has left.
struct PartialList {
  Partials partials;
  std::int64_t count = 0;
};

struct ReduceOutput {
  void* grads = nullptr;        // [U, D] in the table's type; tiered tables: not null if wanted
  float* group_grad = nullptr;  // of every table [G_t, D_t], one after the other; null: none
  Partials rows;                // where unfinished rows go
  Partials groups;              // where unfinished groups go
};

// What becomes of the sum of a whole run: a row's gradient, a group's mask gradient, or a step.
enum class Finish { kGrads, kGroups, kSgd, kAdagrad, kRowwiseAdagrad, kAdam };

constexpr Finish finish_of(Rule rule) {
  return rule == Rule::kAdagrad          ? Finish::kAdagrad
         : rule == Rule::kRowwiseAdagrad ? Finish::kRowwiseAdagrad
         : rule == Rule::kAdam           ? Finish::kAdam
                                         : Finish::kSgd;
}

constexpr Rule rule_of(Finish finish) {
  return finish == Finish::kAdagrad          ? Rule::kAdagrad
         : finish == Finish::kRowwiseAdagrad ? Rule::kRowwiseAdagrad
         : finish == Finish::kAdam           ? Rule::kAdam
                                             : Rule::kSgd;
}

__device__ __forceinline__ void write_partial(const Partials& partials, std::int64_t slot,
                                              std::int64_t key, std::int64_t rank, unsigned flags,
                                              bool first_column) {
  if (!first_column) return;
  store<Memory::kPartial>(partials.keys + slot, key);
  if (partials.ranks != nullptr) store<Memory::kPartial>(partials.ranks + slot, rank);
  store<Memory::kPartial>(partials.flags + slot, flags);
}

// Address of a row's gradient, if any is wanted, by the row's number among the distinct ones.
template <typename T>
__device__ __forceinline__ T* grads_of(const DenseTable& table, const RowRef<T>& /*ref*/,
                                       void* grads, std::int64_t rank) {
  return static_cast<T*>(grads) + rank * table.dim;
}
// The tiers' bases are those of the outputs, set back by the distinct rows of the tiers before.
template <typename T>
__device__ __forceinline__ T* grads_of(const TieredTable& /*table*/, const RowRef<T>& ref,
                                       void* /*grads*/, std::int64_t rank) {
  return ref.data + (rank - ref.local) * ref.width;
}

// Address of a row's weights, all of them, also where the tiers' bases are those of outputs.
template <typename T>
__device__ __forceinline__ T* weights_of(const DenseTable& /*table*/, const RowRef<T>& ref,
                                         int /*dim*/) {
  return ref.data;
}
template <typename T>
__device__ __forceinline__ T* weights_of(const TieredTable& table, const RowRef<T>& ref, int dim) {
  return reinterpret_cast<T*>(load<Memory::kSizes>(&table.device_dense[ref.tier].weight)) +
         ref.local * dim;
}

// Further flags of an item.
constexpr unsigned kGroupBegins = 4;
constexpr unsigned kGroupEnds = 8;
constexpr unsigned kGroupStops = 16;  // here, if only because the chunk does
// Above them the tier of a group that stops: fewer than 2^24, for each is a tensor.
constexpr int kTierShift = 8;

// One item of a list as a lane stages it for its tile, and of the row whose run stops with it all
// that the end of a run asks for: 32 chains of dependent loads overlap, one a lane.
struct alignas(16) StagedItem {
  const void* data;  // the part of the gradient, or the partial sum, that it adds,
  int limit;         // so many columns of it,
  float factor;      // so many times
  void* weight;      // weights of the row, of which
  int reach;         // so many columns are read
  int size;          // and so many are kept
  void* first;       // optimizer state, or where the row's or group's sum goes
  void* second;
  unsigned flags;
  std::uint32_t row_term;
  std::uint32_t group;
  union {
    float moment;  // row-wise Adagrad's number of the row
    int width;     // columns of a row's gradient
  };
};

// What the row that `ref` names asks for where its run is complete.
template <typename T, typename S, int V, Finish kFinish, typename Table>
__device__ __forceinline__ void stage_finish(const Table& table, const Update& update,
                                             const ReduceOutput& out, const RowRef<T>& ref,
                                             std::int64_t rank, int lanes, StagedItem& item) {
  item.size = ref.size;
  if constexpr (kFinish == Finish::kGrads) {
    if (out.grads == nullptr) return;
    item.first = grads_of(table, ref, out.grads, rank);
    item.width = ref.width;
  } else {
    item.weight = ref.data;
    if (item.reach < ref.size) item.reach = ref.size;
    if constexpr (kFinish == Finish::kRowwiseAdagrad) {
      item.row_term = row_term(ref.local);
      item.first = locate_rowwise(table, update, ref);
      item.moment = load_rowwise<T>(update, item.first);
    } else {
      const StateRef<S> state = locate_state<rule_of(kFinish), S>(table, update, ref);
      item.row_term = state.row_term;
      item.first = state.first;
      item.second = state.second;
      if constexpr (kFinish != Finish::kSgd) {
        // The columns of this block, a line of 128 bytes at a time.
        const int begin = static_cast<int>(blockIdx.y) * lanes * V;
        const int end = begin + lanes * V < ref.size ? begin + lanes * V : ref.size;
#pragma unroll 1
        for (int c = begin; c < end; c += 128 / static_cast<int>(sizeof(S))) {
          prefetch(state.first + c);
          if constexpr (kFinish == Finish::kAdam) prefetch(state.second + c);
        }
      }
    }
  }
}

__device__ __forceinline__ std::int64_t items_of(const LookupList& in) { return in.pairs.count; }
__device__ __forceinline__ std::int64_t items_of(const PartialList& in) { return in.count; }

__device__ __forceinline__ std::int64_t key_of(const LookupList& in, std::int64_t i) {
  return row_of(in.pairs, load_key(in.pairs, i));
}
__device__ __forceinline__ std::int64_t key_of(const PartialList& in, std::int64_t i) {
  return load<Memory::kPartial>(in.partials.keys + i);
}
__device__ __forceinline__ int rank_of(const LookupList& in, int i) {
  return in.ranks != nullptr ? static_cast<int>(load<Memory::kSorted>(in.ranks + i)) : 0;
}
__device__ __forceinline__ std::int64_t rank_of(const PartialList& in, std::int64_t i) {
  return in.partials.ranks != nullptr ? load<Memory::kPartial>(in.partials.ranks + i) : 0;
}

// What a tile knows while it walks its chunk.
template <typename T, typename S, int V, Finish kFinish>
struct ChunkReducer {
  const Update& update;
  const ReduceOutput& out;
  int dim;  // of sums
  int lanes;
  int column;
  unsigned mask;
  AdamScales scales;

  unsigned flags = 0;  // of the run, and of the group in whose it lies
  float sum[V] = {};
  float group_sum[V] = {};

  __device__ __forceinline__ void finish(const StagedItem& item, const RawVector<T, V>& weights) {
    if constexpr (kFinish == Finish::kGroups) {
      store_floats<Memory::kOutput>(static_cast<float*>(item.first), column, item.size, sum, mask,
                                    lanes);
    } else if constexpr (kFinish == Finish::kGrads) {
      if (column >= item.width) return;
      store<Memory::kOutput, Cache::kStreamed>(
          reinterpret_cast<RawVector<T, V>*>(static_cast<T*>(item.first) + column),
          keep_prefix<T, V>(pack<T, V>(sum), item.size - column));
    } else {
      constexpr Rule kRule = rule_of(kFinish);
      StateRef<S> state;
      state.row_term = item.row_term;
      float denominator = 0;
      if constexpr (kRule == Rule::kRowwiseAdagrad) {
        float squares = 0;
        if (column < item.size) {
          squares = squares_of<T, V>(update, weights, item.size - column, sum);
        }
        for (int step = lanes / 2; step > 0; step /= 2) {
          squares += __shfl_xor_sync(mask, squares, step, lanes);
        }
        denominator =
            step_rowwise<T>(update, item.first, item.moment, squares, item.size, column == 0);
      } else {
        state.first = static_cast<S*>(item.first);
        state.second = static_cast<S*>(item.second);
      }
      if (column < item.size) {
        update_elements<kRule, T, S, V>(update, scales, static_cast<T*>(item.weight), weights,
                                        state, item.size, column, sum, denominator);
      }
    }
  }

  // The part of a run that goes on elsewhere; item i of the list is of it.
  template <typename List>
  __device__ __forceinline__ void write_part(std::int64_t chunk, const List& in, int i) {
    const std::int64_t slot = 2 * chunk + (flags & kBegins ? 1 : 0);
    store_floats<Memory::kPartial>(out.rows.sums + slot * dim, column, dim, sum, mask, lanes);
    if (column != 0) return;
    write_partial(out.rows, slot, key_of(in, i), rank_of(in, i), flags & (kBegins | kEnds), true);
  }

  __device__ __forceinline__ void clear_run(unsigned next_flags) {
    flags = (flags & ~(kBegins | kEnds)) | next_flags;
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] = 0;
  }

  __device__ __forceinline__ void add_products(const RawVector<T, V>& weights) {
    float w[V];
    unpack<T, V>(weights, w);
#pragma unroll
    for (int e = 0; e < V; ++e) group_sum[e] += w[e] * sum[e];
  }

  template <typename Table>
  __device__ __forceinline__ void end_group(const Table& table, std::int64_t chunk,
                                            const StagedItem& item) {
    const unsigned group_flags =
        ((flags | item.flags) & (kGroupBegins | kGroupEnds)) / kGroupBegins;
    const int tier = static_cast<int>(item.flags >> kTierShift);
    if (group_flags == (kBegins | kEnds)) {
      const MaskRow row = mask_row(table, tier, item.group);
      store_floats<Memory::kOutput>(out.group_grad + row.start, column, row.columns, group_sum,
                                    mask, lanes);
    } else {
      const std::int64_t slot = 2 * chunk + (group_flags & kBegins ? 1 : 0);
      const MaskRow key = mask_key(table, tier, item.group);
      store_floats<Memory::kPartial>(out.groups.sums + slot * dim, column, dim, group_sum, mask,
                                     lanes);
      write_partial(out.groups, slot, key.start, key.columns, group_flags, column == 0);
    }
    flags |= kGroupBegins;
#pragma unroll
    for (int e = 0; e < V; ++e) group_sum[e] = 0;
  }
};

// Loads of one step, all in flight before the first is used.
template <typename T, int V, int kUnroll, bool kLookups>
struct Batch {
  RawVector<T, V> raw[kUnroll];
  __device__ __forceinline__ void load(int u, const StagedItem& item, int column) {
    raw[u] = zero_raw<T, V>();
    // A pooled gradient is read again by the bag's other rows, so it goes the way of all data.
    if (column < item.limit) {
      raw[u] =
          load_raw<Memory::kGrad, Cache::kReadOnly, V>(static_cast<const T*>(item.data) + column);
    }
  }
  __device__ __forceinline__ void add(int u, float factor, float (&sum)[V]) const {
    float values[V];
    unpack<T, V>(raw[u], values);
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += factor * values[e];
  }
};
template <typename T, int V, int kUnroll>
struct Batch<T, V, kUnroll, false> {
  float values[kUnroll][V];
  __device__ __forceinline__ void load(int u, const StagedItem& item, int column) {
#pragma unroll
    for (int e = 0; e < V; ++e) values[u][e] = 0;
    if (column < item.limit) {
      load_floats<Memory::kPartial, Cache::kReadOnly, V>(
          static_cast<const float*>(item.data) + column, values[u]);
    }
  }
  __device__ __forceinline__ void add(int u, float /*factor*/, float (&sum)[V]) const {
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += values[u][e];
  }
};

// The lanes of a tile as bits from the lowest on.
__device__ __forceinline__ unsigned tile_ballot(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) >> (__ffs(static_cast<int>(mask)) - 1);
}

__device__ __forceinline__ int last_of(unsigned bits) { return 31 - __clz(static_cast<int>(bits)); }

// Of sorted items that a tile stages together those of one row have one table, which the last of
// them has found: the others learn it from that one, and search for nothing.
//
// @param[in] found  lanes of the tile that have found theirs
__device__ __forceinline__ int owner_of_run(const DenseTable& /*table*/, unsigned /*found*/,
                                            unsigned /*mask*/, int /*lane*/, int /*lanes*/,
                                            int owner) {
  return owner;
}
__device__ __forceinline__ int owner_of_run(const TieredTable& /*table*/, unsigned found,
                                            unsigned mask, int lane, int lanes, int owner) {
  return __shfl_sync(mask, owner, lane + __ffs(static_cast<int>(found >> lane)) - 1, lanes);
}

// One tile of `lanes` threads per chunk: blockIdx.x runs over chunks, blockIdx.y over pieces of
// lanes * V columns. Lanes stage one item each in shared memory, then the tile walks them, kUnroll
// at a time: their rows of the gradient and the weights of rows whose runs stop there are in flight
// together.
//
// Lookups: with out.group_grad the products of every row's weights and gradient are also added into
// its group; groups must rise along the list then.
// Partial sums: empty slots lie between them, and they bring along whether their runs begin and
// end.
template <typename T, typename S, int V, Finish kFinish, typename Table, typename List,
          typename Staging>
__device__ __forceinline__ void reduce_list(const Table& table, const Update& update,
                                            const List& in, const ReduceOutput& out,
                                            const ReduceShape& shape, const Staging& staging) {
  constexpr bool kLookups = std::is_same<List, LookupList>::value;
  // Fewer where a thread holds eight sums, or more state.
  constexpr int kUnroll = V > 4 ? 2 : (kFinish == Finish::kAdam ? 3 : 4);
  const int lanes = shape.lanes;
  // A power of two, which the compiler does not know.
  const int shift = last_of(static_cast<unsigned>(lanes));
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const unsigned mask = tile_mask(lanes);
  const std::int64_t of_grid =
      static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads >> shift) + (threadIdx.x >> shift);
  // A launch for rows and groups has as many blocks as the one of the two that needs more.
  if (of_grid * shape.chunk >= items_of(in)) return;
  if (static_cast<int>(blockIdx.y) * lanes * V >= table.dim) return;
  // Lists are shorter than 2^31 by more than a chunk.
  const int count = static_cast<int>(items_of(in));
  const auto staged = staging + (static_cast<int>(threadIdx.x) - lane);
  ChunkReducer<T, S, V, kFinish> reducer{
      update, out, table.dim, lanes, (static_cast<int>(blockIdx.y) * lanes + lane) * V, mask, {}};
  if constexpr (kFinish == Finish::kAdam) reducer.scales = adam_scales(update);
  const bool has_groups = kLookups && out.group_grad != nullptr;
  int open = -1;  // partial sums: the last item of the run that goes on

  int base = static_cast<int>(of_grid) * shape.chunk;
  do {
    // Found again each time: registers are short.
    const bool at_begin = (base & (shape.chunk - 1)) == 0;
    const int chunk_end = (base | (shape.chunk - 1)) + 1;
    const int end = chunk_end < count ? chunk_end : count;
    StagedItem item{};
    unsigned stops = 0;
    unsigned counted = 0;
    int items = end - base < lanes ? end - base : lanes;
    const int i = base + lane;
    if constexpr (kLookups) {
      std::int64_t key = in.pairs.end;
      std::int64_t next = in.pairs.end;
      if (i < end) {
        key = load_key(in.pairs, i);
        if (i + 1 < count) next = load_key(in.pairs, i + 1);
      }
      // What counts for nothing comes last.
      const bool counts = key < in.pairs.end;
      const bool last = i + 1 == end || next >= in.pairs.end;
      const bool stopping = counts && (last || next != key);
      counted = tile_ballot(mask, counts);
      stops = tile_ballot(mask, stopping);
      items = __popc(counted);
      if (items == 0) break;
      RowRef<T> ref;
      int owner = 0;
      // Without a mask gradient nothing past the kept prefix is asked for; with one all that the
      // other items of a run ask for is their table.
      if (stopping || (counts && (!has_groups || lane == items - 1))) {
        ref = locate<T>(table, TableView{}, row_of(in.pairs, key));
        owner = owner_of(table, ref.tier);
      }
      if (has_groups) {
        owner = owner_of_run(table, stops | 1u << (items - 1), mask, lane, lanes, owner);
      }
      if (counts) {
        const Payload payload = load_payload(in.pairs, i);
        const TableView view = view_of(table, owner);
        item.factor = payload.factor;
        item.data =
            static_cast<const T*>(in.grad) + payload.row * shape.grad_stride + view.first_column;
        item.limit = has_groups ? view.dim : ref.size;
        if (at_begin && lane == 0) {
          const std::int64_t before = i > 0 ? load_key(in.pairs, i - 1) : -1;
          if (before != key) item.flags |= kBegins;
          if (has_groups && (before < 0 || group_of(table, row_of(in.pairs, before)) !=
                                               group_of(table, row_of(in.pairs, key)))) {
            item.flags |= kGroupBegins;
          }
        }
        if (stopping) {
          if (has_groups) {
            const std::int64_t group = group_of(table, ref);
            item.group = static_cast<std::uint32_t>(group);
            item.flags |= static_cast<unsigned>(ref.tier) << kTierShift;
            item.weight = weights_of(table, ref, view.dim);
            item.reach = view.dim;
            const bool ends = next >= in.pairs.end ||
                              (next != key && group_of(table, row_of(in.pairs, next)) != group);
            if (ends) item.flags |= kGroupEnds;
            if (ends || last) item.flags |= kGroupStops;
          }
          if (next != key) {
            item.flags |= kEnds;
            int of_run = 0;
            if constexpr (kFinish == Finish::kGrads) of_run = rank_of(in, i);
            stage_finish<T, S, V, kFinish>(table, update, out, ref, of_run, lanes, item);
          }
        }
      }
    } else {
      std::int64_t key = -1;
      if (i < end) key = load<Memory::kPartial>(in.partials.keys + i);
      if (key >= 0) {
        item.flags = load<Memory::kPartial>(in.partials.flags + i);
        item.data = in.partials.sums + static_cast<std::int64_t>(i) * table.dim;
        item.limit = table.dim;
        if (item.flags & kEnds) {
          if constexpr (kFinish == Finish::kGroups) {
            const bool same_width = in.partials.ranks == nullptr;
            item.first = out.group_grad + (same_width ? key * table.dim : key);
            item.size = same_width
                            ? table.dim
                            : static_cast<int>(load<Memory::kPartial>(in.partials.ranks + i));
          } else {
            std::int64_t of_run = 0;
            if constexpr (kFinish == Finish::kGrads) {
              of_run = load<Memory::kPartial>(in.partials.ranks + i);
            }
            const RowRef<T> ref = locate<T>(table, TableView{}, key);
            stage_finish<T, S, V, kFinish>(table, update, out, ref, of_run, lanes, item);
          }
        }
      }
      counted = tile_ballot(mask, key >= 0);
      stops = tile_ballot(mask, (item.flags & kEnds) != 0);
      // The chunk's last run stops with its last item, or, if that lies behind, at once.
      if (base + lanes >= end && (counted != 0 || open >= 0)) {
        stops |= counted != 0 ? 1u << last_of(counted) : 1u;
      }
    }
    staged[lane] = item;
    __syncwarp(mask);
    if constexpr (kLookups) {
      if (at_begin) {
        const StagedItem first = staged[0];
        reducer.flags = first.flags & (kBegins | kGroupBegins);
      }
    }
    for (int step = 0; step < items; step += kUnroll) {
      Batch<T, V, kUnroll, kLookups> batch;
      RawVector<T, V> weights[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        StagedItem next{};
        if (step + u < items) next = staged[step + u];
        batch.load(u, next, reducer.column);
        weights[u] = zero_raw<T, V>();
        if (reducer.column < next.reach) {
          weights[u] = load_raw<Memory::kTable, Cache::kPlain, V>(
              static_cast<const T*>(next.weight) + reducer.column);
        }
      }
      unsigned left = stops >> step & ((1u << kUnroll) - 1);
      for (int from = 0;;) {
        const int to = left != 0 ? __ffs(static_cast<int>(left))
                                 : (items - step < kUnroll ? items - step : kUnroll);
        RawVector<T, V> of_row = weights[0];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (u + 1 == to) of_row = weights[u];
          if (u < from || u >= to) continue;
          const StagedItem next = staged[step + u];
          batch.add(u, next.factor, reducer.sum);
          if (!kLookups) reducer.flags |= next.flags & (kBegins | kEnds);
        }
        if (left == 0) break;
        const int at = step + to - 1;
        const StagedItem stop = staged[at];
        if (has_groups) reducer.add_products(of_row);
        reducer.flags |= stop.flags & kEnds;
        if ((~reducer.flags & (kBegins | kEnds)) == 0) {
          reducer.finish(stop, of_row);
        } else if (out.rows.sums != nullptr) {
          const int last = kLookups || counted >> at & 1 ? base + at : open;
          reducer.write_part(base >> last_of(static_cast<unsigned>(shape.chunk)), in, last);
        }
        reducer.clear_run(kLookups ? kBegins : 0);
        if (has_groups && (stop.flags & kGroupStops))
          reducer.end_group(table, base >> last_of(static_cast<unsigned>(shape.chunk)), stop);
        left &= left - 1;
        from = to;
      }
    }
    if (!kLookups && counted != 0) {
      open = stops >> last_of(counted) & 1 ? -1 : base + last_of(counted);
    }
    __syncwarp(mask);
    base += lanes;
  } while (base < count && (base & (shape.chunk - 1)) != 0);
}

// Finish::kGrads writes out.grads (if any), steps update the table.
template <typename T, typename S, int V, Finish kFinish, typename Table>
__global__ void __launch_bounds__(kBlockThreads, 3)
    reduce_lookups_kernel(const __grid_constant__ Table table,
                          const __grid_constant__ Update update,
                          const __grid_constant__ LookupList in,
                          const __grid_constant__ ReduceOutput out, ReduceShape shape) {
  AMTL_SHARED(StagedItem, staged, kBlockThreads);
  reduce_list<T, S, V, kFinish>(table, update, in, out, shape, staged + 0);
}

// One level of partial sums of groups, which knows no table: keys are groups.
struct GroupLevel {
  PartialList in;
  ReduceOutput out;
  ReduceShape shape;
};

template <int V, typename Staging>
__device__ __forceinline__ void reduce_group_level(const GroupLevel& groups, int dim,
                                                   const Staging& staged) {
  DenseTable none;
  none.dim = dim;
  reduce_list<float, float, V, Finish::kGroups>(none, Update{}, groups.in, groups.out, groups.shape,
                                                staged);
}

template <int V>
__global__ void __launch_bounds__(kBlockThreads, 3)
    reduce_groups_kernel(const __grid_constant__ GroupLevel groups, int dim) {
  AMTL_SHARED(StagedItem, staged, kBlockThreads);
  reduce_group_level<V>(groups, dim, staged + 0);
}

// Partial sums of rows where blockIdx.z is 0, of groups where it is 1: a launch for both.
template <typename T, typename S, int V, Finish kFinish, typename Table>
__global__ void __launch_bounds__(kBlockThreads, 3)
    reduce_both_kernel(const __grid_constant__ Table table, const __grid_constant__ Update update,
                       const __grid_constant__ PartialList in,
                       const __grid_constant__ ReduceOutput out, ReduceShape shape,
                       const __grid_constant__ GroupLevel groups) {
  AMTL_SHARED(StagedItem, staged, kBlockThreads);
  if (blockIdx.z == 0) {
    reduce_list<T, S, V, kFinish>(table, update, in, out, shape, staged + 0);
  } else {
    reduce_group_level<(V < 4 ? V : 4)>(groups, table.dim, staged + 0);
  }
}

}  // namespace amtl
