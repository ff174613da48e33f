// Row-wise Adagrad, fused, for rows wider than the registers of one warp hold.
//
// The rule needs the squares of a row's whole gradient before it may write any of the row, so the
// columns cannot be spread over blocks as other rules spread them. A warp takes all columns of its
// chunk, and keeps the sums in shared memory: the gradient is still read once. Lists, chunks, flags
// and partial sums are those of segment_reduce.cuh, and so is the order of every sum.
#pragma once

#include "kernels/segment_reduce.cuh"

namespace amtl {

// Sums of one list's runs. Every lane has the same V columns of every piece of 32 * V, and is the
// only one to touch their sums, so the lanes wait for each other only where they add up squares.
template <typename T, int V, typename Table, typename Sums>
struct RowwiseReducer {
  // Floats a lane moves at once, and how often for its V: neighbouring lanes in neighbouring banks.
  static constexpr int kQuad = V < 4 ? V : 4;
  static constexpr int kQuads = V / kQuad;
  // Pieces of a row's weights that are on their way together.
  static constexpr int kAhead = V > 4 ? 2 : 4;

  const Table& table;
  const Update& update;
  const ReduceOutput& out;
  int chunk;
  Sums sums;  // [2][pieces][kQuads][32] of kQuad floats: the row's, then the group's
  int lane;
  int pieces;
  bool has_groups;
  unsigned flags = 0;  // of the run, and of the group in which it lies

  __device__ __forceinline__ int column_of(int piece) const { return (piece * kWarp + lane) * V; }

  __device__ __forceinline__ void load_sum(int which, int piece, float (&values)[V]) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const RawVector<float, kQuad> raw =
          sums[((which * pieces + piece) * kQuads + q) * kWarp + lane];
      memcpy(values + q * kQuad, &raw, sizeof(raw));
    }
  }

  __device__ __forceinline__ void store_sum(int which, int piece, const float (&values)[V]) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      RawVector<float, kQuad> raw;
      memcpy(&raw, values + q * kQuad, sizeof(raw));
      sums[((which * pieces + piece) * kQuads + q) * kWarp + lane] = raw;
    }
  }

  // Writes a whole sum to `to` [columns].
  template <Memory kMemory>
  __device__ __forceinline__ void write_sum(int which, float* to, int columns) const {
    // Stores wait for nothing, so copies of this loop would be code and no more.
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      float values[V];
      load_sum(which, piece, values);
      store_floats<kMemory>(to, column_of(piece), columns, values, 0xffffffffu, kWarp);
    }
  }

  __device__ __forceinline__ void clear_group() const {
    const float zeros[V] = {};
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) store_sum(1, piece, zeros);
  }

  // The group of `ref` has ended in this chunk, or the chunk has.
  __device__ __forceinline__ void end_group(const RowRef<T>& ref) {
    const std::int64_t group = group_of(table, ref);
    const unsigned group_flags = (flags & (kGroupBegins | kGroupEnds)) / kGroupBegins;
    if (group_flags == (kBegins | kEnds)) {
      const MaskRow row = mask_row(table, ref.tier, group);
      write_sum<Memory::kOutput>(1, out.group_grad + row.start, row.columns);
    } else {
      const std::int64_t slot = 2 * std::int64_t{chunk} + (group_flags & kBegins ? 1 : 0);
      const MaskRow key = mask_key(table, ref.tier, group);
      write_sum<Memory::kPartial>(1, out.groups.sums + slot * table.dim, table.dim);
      write_partial(out.groups, slot, key.start, key.columns, group_flags, lane == 0);
    }
    flags = kGroupBegins;
    clear_group();
  }

  // Weights of kAhead pieces from `first` on, those of columns below `columns`.
  __device__ __forceinline__ void load_weights(const T* data, int first, int columns,
                                               RawVector<T, V> (&raw)[kAhead]) const {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int column = column_of(first + u);
      raw[u] = zero_raw<T, V>();
      if (column < columns) {
        raw[u] = load_raw<Memory::kTable, Cache::kPlain, V>(data + column);
      }
    }
  }

  // Adds the products of the row's weights and gradient to its group, all columns.
  __device__ __forceinline__ void add_products(const RowRef<T>& ref, int dim) const {
    const T* data = weights_of(table, ref, dim);
#pragma unroll 1
    for (int first = 0; first < pieces; first += kAhead) {
      RawVector<T, V> raw[kAhead];
      load_weights(data, first, dim, raw);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (column_of(first + u) >= dim) continue;
        float sum[V];
        float products[V];
        float w[V];
        load_sum(0, first + u, sum);
        load_sum(1, first + u, products);
        unpack<T, V>(raw[u], w);
#pragma unroll
        for (int e = 0; e < V; ++e) products[e] += w[e] * sum[e];
        store_sum(1, first + u, products);
      }
    }
  }

  __device__ __forceinline__ void step_row(const RowRef<T>& ref) const {
    float squares = 0;
#pragma unroll 1
    for (int first = 0; first < pieces; first += kAhead) {
      RawVector<T, V> raw[kAhead];
      load_weights(ref.data, first, ref.size, raw);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int column = column_of(first + u);
        if (column >= ref.size) continue;
        float sum[V];
        load_sum(0, first + u, sum);
        squares += squares_of<T, V>(update, raw[u], ref.size - column, sum);
      }
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, step);
    }
    StateRef<float> state;
    state.row_term = row_term(ref.local);
    void* moment = locate_rowwise(table, update, ref);
    const float before = load_rowwise<T>(update, moment);
    // All have read it before one replaces it.
    __syncwarp();
    const float denominator = step_rowwise<T>(update, moment, before, squares, ref.size, lane == 0);
    // The weights are close by, for the squares have been taken of them, and the code is long.
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      const int column = column_of(piece);
      if (column >= ref.size) continue;
      float sum[V];
      load_sum(0, piece, sum);
      const auto old = load_raw<Memory::kTable, Cache::kPlain, V>(ref.data + column);
      update_elements<Rule::kRowwiseAdagrad, T, float, V>(
          update, AdamScales{}, ref.data, old, state, ref.size, column, sum, denominator);
    }
  }

  // The run of `row` has ended in this chunk, or the chunk has.
  __device__ __forceinline__ void end_run(std::int64_t row) {
    const RowRef<T> ref = locate<T>(table, TableView{}, row);
    if (has_groups) add_products(ref, view_of(table, owner_of(table, ref.tier)).dim);
    if ((~flags & (kBegins | kEnds)) == 0) {
      step_row(ref);
    } else {
      const std::int64_t slot = 2 * std::int64_t{chunk} + (flags & kBegins ? 1 : 0);
      write_sum<Memory::kPartial>(0, out.rows.sums + slot * table.dim, table.dim);
      write_partial(out.rows, slot, row, 0, flags & (kBegins | kEnds), lane == 0);
    }
    if (has_groups && (flags & kGroupStops) != 0) {
      end_group(ref);
    } else {
      flags &= kGroupBegins;
    }
  }
};

// One entry of a list as a lane prepares it: a key below zero counts for nothing.
template <typename E>
struct ReduceItem {
  std::int64_t key = -1;
  unsigned flags = 0;  // whether the row's run, and the group, begin and end with it
  const E* data = nullptr;
  // Of lookups alone, for partial sums are whole.
  float factor = 1.0f;
  int limit = 0;   // columns to read
  int owner = -1;  // table of the row, if it has been looked for
};

template <typename T, typename Table>
__device__ __forceinline__ ReduceItem<T> stage_item(const LookupList& in, int i, int end,
                                                    const Table& table, bool whole_rows, bool last,
                                                    std::int64_t grad_stride) {
  ReduceItem<T> item;
  const std::int64_t key = load_key(in.pairs, i);
  if (key >= in.pairs.end) return item;
  item.key = row_of(in.pairs, key);
  const std::int64_t before = i > 0 ? load_key(in.pairs, i - 1) : -1;
  const std::int64_t next = i + 1 < in.pairs.count ? load_key(in.pairs, i + 1) : in.pairs.end;
  if (before != key) item.flags |= kBegins;
  if (next != key) item.flags |= kEnds;
  const Payload payload = load_payload(in.pairs, i);
  item.factor = payload.factor;
  item.data = static_cast<const T*>(in.grad) + payload.row * grad_stride;
  // As in reduce_list: of whole rows the last of a run tells the others of which table they are.
  if (whole_rows && !last && (item.flags & kEnds) == 0) return item;
  const RowRef<T> ref = locate<T>(table, TableView{}, item.key);
  item.owner = owner_of(table, ref.tier);
  if (whole_rows) {
    if ((item.flags & kEnds) != 0 || i + 1 == end) {
      const bool ends =
          next >= in.pairs.end ||
          (next != key && group_of(table, row_of(in.pairs, next)) != group_of(table, ref));
      if (ends) item.flags |= kGroupEnds;
      if (ends || i + 1 == end) item.flags |= kGroupStops;
    }
    return item;
  }
  item.data += view_of(table, item.owner).first_column;
  item.limit = ref.size;
  return item;
}

template <typename T, typename Table>
__device__ __forceinline__ ReduceItem<float> stage_item(const PartialList& in, int i, int /*end*/,
                                                        const Table& table, bool /*whole_rows*/,
                                                        bool /*last*/,
                                                        std::int64_t /*grad_stride*/) {
  ReduceItem<float> item;
  item.key = load<Memory::kPartial>(in.partials.keys + i);
  if (item.key < 0) return item;
  item.flags = load<Memory::kPartial>(in.partials.flags + i);
  item.data = in.partials.sums + static_cast<std::int64_t>(i) * table.dim;
  return item;
}

// A warp per chunk of either kind of list, with dynamic shared memory for the sums of every warp of
// the block: [pieces * 32 * V] floats, twice that with out.group_grad, which only a list of lookups
// may ask for, whose groups must rise along it.
template <typename T, int V, typename List, typename Table>
__global__ void __launch_bounds__(kBlockThreads, 3)
    reduce_rowwise_kernel(const __grid_constant__ Table table,
                          const __grid_constant__ Update update, const __grid_constant__ List in,
                          const __grid_constant__ ReduceOutput out, ReduceShape shape) {
  constexpr bool kLookups = std::is_same<List, LookupList>::value;
  constexpr unsigned kAll = 0xffffffffu;
  // Pieces in flight; fewer where a thread holds eight floats of each.
  constexpr int kUnroll = V > 4 && !kLookups ? 2 : 4;
  using Quad = RawVector<float, (V < 4 ? V : 4)>;
  AMTL_DYNAMIC_SHARED(Quad, memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const std::int64_t of_grid = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (of_grid * shape.chunk >= items_of(in)) return;
  // Lists are shorter than 2^31 by more than a chunk.
  const int chunk = static_cast<int>(of_grid);
  const int begin = chunk * shape.chunk;
  const int count = static_cast<int>(items_of(in));
  const int end = begin + shape.chunk < count ? begin + shape.chunk : count;
  const bool has_groups = kLookups && out.group_grad != nullptr;
  const int pieces = (table.dim + kWarp * V - 1) / (kWarp * V);
  const int quads = pieces * kWarp * V / static_cast<int>(sizeof(Quad) / sizeof(float));
  const auto sums = memory + warp * (has_groups ? 2 : 1) * quads;
  RowwiseReducer<T, V, Table, decltype(memory + 0)> reducer{table, update, out,    chunk,
                                                            sums,  lane,   pieces, has_groups};
  if constexpr (kLookups) {
    if (has_groups) {
      const std::int64_t first = load_key(in.pairs, begin);
      if (first >= in.pairs.end) return;
      // The even lanes' is the group of the first row, the odd lanes' that of the row before it.
      const std::int64_t before = begin > 0 ? load_key(in.pairs, begin - 1) : first;
      const std::int64_t group = group_of(table, row_of(in.pairs, lane % 2 == 0 ? first : before));
      const bool same = group == __shfl_xor_sync(kAll, group, 1);
      reducer.flags = begin > 0 && same ? 0 : kGroupBegins;
      reducer.clear_group();
    }
  }

  std::int64_t current = -1;
  for (int base = begin; base < end; base += kWarp) {
    using Element = typename std::conditional<kLookups, T, float>::type;
    const int items = end - base < kWarp ? end - base : kWarp;
    ReduceItem<Element> mine;
    if (lane < items) {
      mine = stage_item<T>(in, base + lane, end, table, has_groups, lane == items - 1,
                           shape.grad_stride);
    }
    if constexpr (kLookups) {
      if (has_groups) {
        const unsigned found = __ballot_sync(kAll, mine.owner >= 0);
        const int owner = owner_of_run(table, found, kAll, lane, kWarp, mine.owner);
        if (mine.key >= 0) {
          const TableView view = view_of(table, owner);
          mine.data += view.first_column;
          mine.limit = view.dim;
        }
      }
    }
    // The chunk's last run stops with its last item, or, if that lies behind, at once. Runs stop in
    // one place, because the code for it is long.
    const unsigned counted = __ballot_sync(kAll, mine.key >= 0);
    const int stop = base + kWarp < end ? kWarp : (counted != 0 ? last_of(counted) : 0);
    for (int source = 0; source < items; ++source) {
      const std::int64_t key = __shfl_sync(kAll, mine.key, source);
      const unsigned item_flags = __shfl_sync(kAll, mine.flags, source);
      const Element* data = shuffle_pointer(kAll, mine.data, source, kWarp);
      float factor = 1.0f;
      int limit = table.dim;
      if constexpr (kLookups) {
        factor = __shfl_sync(kAll, mine.factor, source);
        limit = __shfl_sync(kAll, mine.limit, source);
      }
      const bool fresh = current < 0;
      if (key >= 0) current = key;
      reducer.flags |= item_flags;
      for (int first = 0; key >= 0 && first < pieces; first += kUnroll) {
        RawVector<T, V> raw[kUnroll];
        float values[kUnroll][V];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int column = reducer.column_of(first + u);
          if constexpr (kLookups) {
            raw[u] = zero_raw<T, V>();
            if (column < limit) {
              raw[u] = load_raw<Memory::kGrad, Cache::kReadOnly, V>(data + column);
            }
          } else {
#pragma unroll
            for (int e = 0; e < V; ++e) values[u][e] = 0;
            if (column < limit) {
              load_floats<Memory::kPartial, Cache::kReadOnly, V>(data + column, values[u]);
            }
          }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (first + u >= pieces) continue;
          if constexpr (kLookups) unpack<T, V>(raw[u], values[u]);
          float sum[V] = {};
          if (!fresh) reducer.load_sum(0, first + u, sum);
#pragma unroll
          for (int e = 0; e < V; ++e) sum[e] += factor * values[u][e];
          reducer.store_sum(0, first + u, sum);
        }
      }
      if (current >= 0 && ((reducer.flags & kEnds) != 0 || source == stop)) {
        reducer.end_run(current);
        current = -1;
      }
    }
  }
}

}  // namespace amtl
