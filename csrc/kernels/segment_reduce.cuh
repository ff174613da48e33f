// Segmented sums over sorted lookups: row gradients, mask gradients, fused optimizer steps.
//
// The sorted list is cut into chunks of equal length, one tile of threads each, whatever rows they
// hold: a row that owns a tenth of all lookups costs no more than any others. A tile adds up run
// after run of equal rows. A run that lies inside of its chunk is finished and written at once; the
// parts of one that crosses chunks become items of the next, `chunk / 2` times shorter list,
// reduced by the same kernel. Sums are taken in one fixed order, so results are reproducible bit
// for bit.
#pragma once

#include "kernels/optimizer.cuh"
#include "kernels/sorted_pairs.cuh"

namespace amtl {

// Partial sums of runs that cross chunks: slots 2c and 2c + 1 belong to chunk c of the list that
// they come from; the first takes a run begun before the chunk, the second one that goes on after.
struct Partials {
  float* sums = nullptr;          // [2 * chunks, D]
  std::int64_t* keys = nullptr;   // [2 * chunks], -1: empty
  std::int64_t* ranks = nullptr;  // [2 * chunks] number among the distinct rows
  unsigned* flags = nullptr;      // [2 * chunks] kBegins | kEnds
};

constexpr unsigned kBegins = 1;
constexpr unsigned kEnds = 2;

struct ReduceShape {
  int lanes = 32;  // threads per chunk: a power of two, at most 32
  int chunk = 64;  // items per chunk
  std::int64_t grad_stride = 0;
};

// The first list: sorted lookups and the gradient that they receive.
struct LookupList {
  SortedPairs pairs;
  const void* grad = nullptr;               // [B or L, D], read through the payloads
  const std::int64_t* chunk_row = nullptr;  // [chunks] see write_heads_kernel; null: no ranks
};

// Every later list: the partial sums that the one before has left.
struct PartialList {
  Partials partials;
  std::int64_t count = 0;
};

struct ReduceOutput {
  void* grads = nullptr;        // [U, D] in the table's type; tiered tables: not null if wanted
  float* group_grad = nullptr;  // [G, D]; null: no mask gradient
  Partials rows;                // where unfinished rows go
  Partials groups;              // where unfinished groups go
};

enum class Finish { kGrads, kUpdate, kGroups };

__device__ __forceinline__ void write_partial(const Partials& partials, std::int64_t slot,
                                              std::int64_t key, std::int64_t rank, unsigned flags,
                                              bool first_column) {
  if (!first_column) return;
  store<Memory::kPartial>(partials.keys + slot, key);
  if (partials.ranks != nullptr) store<Memory::kPartial>(partials.ranks + slot, rank);
  store<Memory::kPartial>(partials.flags + slot, flags);
}

template <typename T, int V>
__device__ __forceinline__ void write_grads(const DenseTable& table, const TableView& view,
                                            void* grads, std::int64_t row, std::int64_t rank,
                                            int column, const float (&sum)[V]) {
  if (grads == nullptr || column >= table.dim) return;
  const int size = locate<T>(table, view, row).size;
  T* out = static_cast<T*>(grads) + rank * table.dim + column;
  store<Memory::kOutput, Cache::kStreamed>(reinterpret_cast<RawVector<T, V>*>(out),
                                           keep_prefix<T, V>(pack<T, V>(sum), size - column));
}

// The tiers' bases are those of the outputs, set back by the distinct rows of the tiers before;
// rows keep what their sizes say.
template <typename T, int V>
__device__ __forceinline__ void write_grads(const TieredTable& table, const TableView& view,
                                            void* grads, std::int64_t row, std::int64_t rank,
                                            int column, const float (&sum)[V]) {
  const int tier = tier_of(table, row);
  const int width = tier_width(table, tier);
  if (grads == nullptr || column >= width) return;
  int size = width;
  if (table.device_dense != nullptr) {
    const std::int64_t begin = tier == 0 ? 0 : tier_end(table, tier - 1);
    size = stored_size(table, tier, row - begin);
  }
  T* out = reinterpret_cast<T*>(tier_base(table, tier)) + rank * width + column;
  store<Memory::kOutput, Cache::kStreamed>(reinterpret_cast<RawVector<T, V>*>(out),
                                           keep_prefix<T, V>(pack<T, V>(sum), size - column));
}

// Address of a row's weights, all of them.
template <typename T>
__device__ __forceinline__ T* weights_of(const DenseTable& table, const TableView& /*view*/,
                                         std::int64_t row) {
  return static_cast<T*>(table.weight) + row * table.dim;
}
template <typename T>
__device__ __forceinline__ T* weights_of(const TieredTable& table, const TableView& view,
                                         std::int64_t row) {
  const int tier = tier_of(table, row);
  const std::int64_t begin = tier == 0 ? 0 : tier_end(table, tier - 1);
  return reinterpret_cast<T*>(load<Memory::kSizes>(&table.device_dense[tier].weight)) +
         (row - begin) * view.dim;
}

// What a tile knows while it walks its chunk.
template <typename T, typename S, int V, Finish kFinish, typename Table>
struct ChunkReducer {
  const Table& table;
  const Update& update;
  const ReduceShape& shape;
  const ReduceOutput& out;
  std::int64_t chunk;
  int column;
  unsigned mask;
  AdamScales scales;

  float sum[V];
  float group_sum[V];
  std::int64_t group;
  unsigned group_flags;

  __device__ __forceinline__ void finish_row(std::int64_t row, std::int64_t rank,
                                             const TableView& view) {
    if constexpr (kFinish == Finish::kGrads) {
      write_grads<T, V>(table, view, out.grads, row, rank, column, sum);
    } else if constexpr (kFinish == Finish::kUpdate) {
      const RowRef<T> ref = locate<T>(table, view, row);
      const StateRef<S> state = locate_state<S>(table, view, update, row);
      update_row<T, S, V>(update, scales, ref.data, state, ref.size, column, sum, mask,
                          shape.lanes);
    } else {
      store_floats<Memory::kOutput>(out.group_grad + row * table.dim, column, table.dim, sum, mask,
                                    shape.lanes);
    }
  }

  __device__ __forceinline__ void end_group(unsigned flags) {
    group_flags |= flags;
    if (group_flags == (kBegins | kEnds)) {
      store_floats<Memory::kOutput>(out.group_grad + group * table.dim, column, table.dim,
                                    group_sum, mask, shape.lanes);
    } else {
      const std::int64_t slot = 2 * chunk + (group_flags & kBegins ? 1 : 0);
      store_floats<Memory::kPartial>(out.groups.sums + slot * table.dim, column, table.dim,
                                     group_sum, mask, shape.lanes);
      write_partial(out.groups, slot, group, 0, group_flags, column == 0);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) group_sum[e] = 0;
  }

  // The run of `row` has ended in this chunk; flags say whether it begins and ends here.
  __device__ __forceinline__ void end_run(std::int64_t row, std::int64_t rank, unsigned flags,
                                          bool from_lookups) {
    TableView view;
    if constexpr (kFinish != Finish::kGroups) view = view_of_row(table, row);
    if (kFinish != Finish::kGroups && from_lookups && out.group_grad != nullptr) {
      const std::int64_t next = group_of(table, row);
      if (group >= 0 && next != group) {
        end_group(kEnds);
        group_flags = kBegins;
      }
      group = next;
      if (column < view.dim) {
        float w[V];
        add_product(view, row, w);
      }
    }
    if (flags == (kBegins | kEnds)) {
      finish_row(row, rank, view);
    } else if (out.rows.sums != nullptr) {
      const std::int64_t slot = 2 * chunk + (flags & kBegins ? 1 : 0);
      store_floats<Memory::kPartial>(out.rows.sums + slot * table.dim, column, table.dim, sum, mask,
                                     shape.lanes);
      write_partial(out.rows, slot, row, rank, flags, column == 0);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] = 0;
  }

  __device__ __forceinline__ void add_product(const TableView& view, std::int64_t row,
                                              float (&w)[V]) {
    const T* data = weights_of<T>(table, view, row);
    unpack<T, V>(load_raw<Memory::kTable, Cache::kPlain, V>(data + column), w);
#pragma unroll
    for (int e = 0; e < V; ++e) group_sum[e] += w[e] * sum[e];
  }
};

// One tile of `lanes` threads per chunk: blockIdx.x runs over chunks, blockIdx.y over pieces of
// lanes * V columns. Keys, addresses and factors are prepared one item a thread and passed around;
// kUnroll rows of the gradient are in flight.
//
// Finish::kGrads writes out.grads (if any), kUpdate steps the optimizer. With out.group_grad both
// also add the products of every row's weights and gradient into its group; groups must rise along
// the list then.
template <typename T, typename S, int V, Finish kFinish, typename Table>
__global__ void __launch_bounds__(kBlockThreads, V == 1 ? 3 : 2)
    reduce_lookups_kernel(const __grid_constant__ Table table,
                          const __grid_constant__ Update update,
                          const __grid_constant__ LookupList in,
                          const __grid_constant__ ReduceOutput out, ReduceShape shape) {
  // Three where a fourth row in flight would spill.
  constexpr int kUnroll = V > 4 && kFinish == Finish::kUpdate ? 3 : 4;
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const unsigned mask = tile_mask(shape.lanes);
  const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / shape.lanes) +
                             threadIdx.x / shape.lanes;
  const std::int64_t begin = chunk * shape.chunk;
  if (begin >= in.pairs.count) return;
  const std::int64_t left = in.pairs.count - begin;
  const int length = left < shape.chunk ? static_cast<int>(left) : shape.chunk;
  const int column = (static_cast<int>(blockIdx.y) * shape.lanes + lane) * V;
  ChunkReducer<T, S, V, kFinish, Table> reducer{table, update,       shape, out, chunk, column,
                                                mask,  AdamScales{}, {},    {},  -1,    0};
  if constexpr (kFinish == Finish::kUpdate) reducer.scales = adam_scales(update);

  std::int64_t current = load_key(in.pairs, begin);
  if (current >= in.pairs.rows) return;
  std::int64_t rank = in.chunk_row != nullptr ? load<Memory::kOther>(in.chunk_row + chunk) : 0;
  const std::int64_t before = begin > 0 ? load_key(in.pairs, begin - 1) : -1;
  unsigned flags = before == current ? 0 : kBegins;
  if (out.group_grad != nullptr) {
    const bool same = before >= 0 && group_of(table, before) == group_of(table, current);
    reducer.group_flags = same ? 0 : kBegins;
  }
  std::int64_t after = -1;  // the key that ends the chunk's last run, if it is known
  for (int base = 0; base < length && after < 0; base += shape.lanes) {
    std::int64_t key = in.pairs.rows;
    const T* data = nullptr;
    float factor = 1.0f;
    int limit = 0;
    if (base + lane < length) {
      const std::int64_t item = begin + base + lane;
      key = load_key(in.pairs, item);
      if (key < in.pairs.rows) {
        const Payload payload = load_payload(in.pairs, item);
        const TableView view = view_of_row(table, key);
        factor = payload.factor;
        data = static_cast<const T*>(in.grad) + payload.row * shape.grad_stride + view.first_column;
        // Without a mask gradient nothing past the kept prefix is asked for.
        limit = out.group_grad != nullptr ? view.dim : locate<T>(table, view, key).size;
      }
    }
    const int items = length - base < shape.lanes ? length - base : shape.lanes;
    for (int step = 0; step < items && after < 0; step += kUnroll) {
      RawVector<T, V> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int source = (step + u) % shape.lanes;
        const T* from = shuffle_pointer(mask, data, source, shape.lanes);
        const int columns = __shfl_sync(mask, limit, source, shape.lanes);
        raw[u] = zero_raw<T, V>();
        if (step + u < items && column < columns) {
          raw[u] = load_raw<Memory::kGrad, Cache::kStreamed, V>(from + column);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int source = (step + u) % shape.lanes;
        const std::int64_t next = __shfl_sync(mask, key, source, shape.lanes);
        const float weight = __shfl_sync(mask, factor, source, shape.lanes);
        if (step + u >= items || after >= 0) continue;
        if (next != current) {
          if (next >= in.pairs.rows) {
            after = next;
            continue;
          }
          reducer.end_run(current, rank, flags | kEnds, true);
          current = next;
          ++rank;
          flags = kBegins;
        }
        float values[V];
        unpack<T, V>(raw[u], values);
#pragma unroll
        for (int e = 0; e < V; ++e) reducer.sum[e] += weight * values[e];
      }
    }
  }
  if (after < 0 && length < left) after = load_key(in.pairs, begin + length);
  if (after != current) flags |= kEnds;
  reducer.end_run(current, rank, flags, true);
  if (out.group_grad != nullptr) {
    const bool goes_on =
        after >= 0 && after < in.pairs.rows && group_of(table, after) == reducer.group;
    reducer.end_group(goes_on ? 0 : kEnds);
  }
}

// The same over partial sums, whose runs bring along whether they begin and end. Finish::kGroups
// writes out.group_grad, with groups for keys.
template <typename T, typename S, int V, Finish kFinish, typename Table>
__device__ __forceinline__ void reduce_partials(const Table& table, const Update& update,
                                                const PartialList& in, const ReduceOutput& out,
                                                const ReduceShape& shape) {
  // Fewer in flight where a thread holds eight sums: what they would spill costs more.
  constexpr int kUnroll = V > 4 ? 2 : 4;
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const unsigned mask = tile_mask(shape.lanes);
  const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / shape.lanes) +
                             threadIdx.x / shape.lanes;
  const std::int64_t begin = chunk * shape.chunk;
  // A launch for rows and groups has as many blocks as the one of the two that needs more.
  if (begin >= in.count || static_cast<int>(blockIdx.y) * shape.lanes * V >= table.dim) return;
  const int length =
      in.count - begin < shape.chunk ? static_cast<int>(in.count - begin) : shape.chunk;
  const int column = (static_cast<int>(blockIdx.y) * shape.lanes + lane) * V;
  ChunkReducer<T, S, V, kFinish, Table> reducer{table, update,       shape, out, chunk, column,
                                                mask,  AdamScales{}, {},    {},  -1,    0};
  if constexpr (kFinish == Finish::kUpdate) reducer.scales = adam_scales(update);

  std::int64_t current = -1;
  std::int64_t rank = 0;
  unsigned flags = 0;
  for (int base = 0; base < length; base += shape.lanes) {
    std::int64_t key = -1;
    std::int64_t item_rank = 0;
    unsigned item_flags = 0;
    if (base + lane < length) {
      const std::int64_t item = begin + base + lane;
      key = load<Memory::kPartial>(in.partials.keys + item);
      if (key >= 0) {
        if (in.partials.ranks != nullptr) {
          item_rank = load<Memory::kPartial>(in.partials.ranks + item);
        }
        item_flags = load<Memory::kPartial>(in.partials.flags + item);
      }
    }
    const int items = length - base < shape.lanes ? length - base : shape.lanes;
    for (int step = 0; step < items; step += kUnroll) {
      float values[kUnroll][V];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const std::int64_t next = __shfl_sync(mask, key, (step + u) % shape.lanes, shape.lanes);
#pragma unroll
        for (int e = 0; e < V; ++e) values[u][e] = 0;
        if (step + u < items && next >= 0 && column < table.dim) {
          load_floats<Memory::kPartial, Cache::kReadOnly, V>(
              in.partials.sums + (begin + base + step + u) * table.dim + column, values[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int source = (step + u) % shape.lanes;
        const std::int64_t next = __shfl_sync(mask, key, source, shape.lanes);
        const unsigned next_flags = __shfl_sync(mask, item_flags, source, shape.lanes);
        const std::int64_t next_rank = __shfl_sync(mask, item_rank, source, shape.lanes);
        if (step + u >= items || next < 0) continue;
        if (next != current) {
          if (current >= 0) reducer.end_run(current, rank, flags, false);
          current = next;
          flags = 0;
        }
        flags |= next_flags;
        rank = next_rank;
#pragma unroll
        for (int e = 0; e < V; ++e) reducer.sum[e] += values[u][e];
      }
    }
  }
  if (current >= 0) reducer.end_run(current, rank, flags, false);
}

template <typename T, typename S, int V, Finish kFinish, typename Table>
__global__ void __launch_bounds__(kBlockThreads, 2)
    reduce_partials_kernel(const __grid_constant__ Table table,
                           const __grid_constant__ Update update,
                           const __grid_constant__ PartialList in,
                           const __grid_constant__ ReduceOutput out, ReduceShape shape) {
  reduce_partials<T, S, V, kFinish, Table>(table, update, in, out, shape);
}

// One level of groups, which knows no table.
struct GroupLevel {
  PartialList in;
  ReduceOutput out;
  ReduceShape shape;
};

// Partial sums of rows where blockIdx.z is 0, of groups where it is 1: a launch for both.
template <typename T, typename S, int V, Finish kFinish, typename Table>
__global__ void __launch_bounds__(kBlockThreads, 2)
    reduce_both_kernel(const __grid_constant__ Table table, const __grid_constant__ Update update,
                       const __grid_constant__ PartialList in,
                       const __grid_constant__ ReduceOutput out, ReduceShape shape,
                       const __grid_constant__ GroupLevel groups) {
  if (blockIdx.z == 0) {
    reduce_partials<T, S, V, kFinish, Table>(table, update, in, out, shape);
  } else {
    DenseTable none;
    none.dim = table.dim;
    reduce_partials<float, float, (V < 4 ? V : 4), Finish::kGroups, DenseTable>(
        none, Update{}, groups.in, groups.out, groups.shape);
  }
}

}  // namespace amtl
