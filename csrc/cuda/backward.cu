#include <algorithm>

#include "cuda/backward_plan.cuh"
#include "kernels/segments.cuh"

namespace amtl::cuda {

namespace {

int bits_for(std::int64_t largest) {
  int bits = 1;
  while (bits < 63 && (largest >> bits) != 0) ++bits;
  return bits;
}

// Hands out aligned pieces of the workspace.
class Carver {
 public:
  explicit Carver(unsigned char* base) : base_(base) {}
  template <typename P>
  P* take(std::int64_t count) {
    unsigned char* place = base_ + used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(P) + 255) / 256 * 256;
    return reinterpret_cast<P*>(place);
  }
  std::size_t used() const { return used_; }

 private:
  unsigned char* base_;
  std::size_t used_ = 0;
};

// Hands out the workspace; a null one says how many bytes it takes.
void lay_out(const Backward& backward, Plan& plan) {
  const std::int64_t count = backward.lookups.count;
  const bool mask_grad = backward.mask_grads != nullptr;
  Carver carver(backward.workspace);
  plan.header = carver.take<SegmentHeader>(1);
  const std::int64_t key_bytes = count * (plan.wide_keys ? 8 : 4);
  const std::int64_t payload_bytes = count * (plan.scaled ? 8 : 4);
  // In one piece: `distinct_rows` later lies over both.
  plan.keys_in = carver.take<unsigned char>(key_bytes + payload_bytes + 256);
  plan.payloads_in = plan.keys_in + (key_bytes + 255) / 256 * 256;
  plan.distinct_rows = reinterpret_cast<std::int64_t*>(plan.keys_in);
  plan.keys = carver.take<unsigned char>(key_bytes);
  plan.payloads = carver.take<unsigned char>(payload_bytes);
  if (plan.shares) plan.bag_share = carver.take<float>(backward.lookups.bags);
  plan.block_heads = carver.take<std::int64_t>(plan.head_blocks);
  if (backward.need_rows) plan.ranks = carver.take<std::uint32_t>(count);
  if (plan.second_sort) {
    plan.group_keys = carver.take<std::uint32_t>(count);
    plan.group_order = carver.take<std::uint32_t>(count);
  }
  plan.sort_scratch = carver.take<unsigned char>(plan.sort_bytes);

  const std::size_t keys_begin = carver.used();
  for (Level& level : plan.levels) {
    level.rows.keys = carver.take<std::int64_t>(level.slots);
    if (mask_grad) level.groups.keys = carver.take<std::int64_t>(level.slots);
  }
  plan.partial_keys = backward.workspace + keys_begin;
  plan.partial_key_bytes = carver.used() - keys_begin;
  for (Level& level : plan.levels) {
    level.rows.sums = carver.take<float>(level.slots * plan.dim);
    level.rows.flags = carver.take<unsigned>(level.slots);
    level.rows.ranks = carver.take<std::int64_t>(level.slots);
    if (mask_grad) {
      if (plan.widths_differ) level.groups.ranks = carver.take<std::int64_t>(level.slots);
      level.groups.sums = carver.take<float>(level.slots * plan.dim);
      level.groups.flags = carver.take<unsigned>(level.slots);
    }
  }
  plan.bytes = carver.used();
}

std::size_t make_plan(Backward& backward, std::int64_t rows, std::int64_t groups, int dim,
                      bool widths_differ) {
  const Lookups& lookups = backward.lookups;
  const std::int64_t count = lookups.count;
  backward.plan = std::make_shared<Plan>();
  Plan& plan = *backward.plan;
  plan.dim = dim;
  plan.widths_differ = widths_differ;
  plan.scaled = lookups.per_sample_weights != nullptr || lookups.mean;
  plan.shares = lookups.mean && lookups.padding_idx >= 0;
  plan.key_bits = bits_for(rows);
  plan.group_bits = bits_for(groups);
  if (backward.mask_grads != nullptr && !backward.groups_sorted) {
    // Rows that are handed out come in order, and whether groups rise along them is found out.
    plan.second_sort = backward.need_rows;
    if (!backward.need_rows) {
      plan.group_shift = plan.key_bits;
      plan.key_bits += plan.group_bits;
    }
  }
  plan.end_key = plan.group_shift == 0 ? rows : groups << plan.group_shift | rows;
  plan.wide_keys = plan.key_bits > 32;
  // The threads per row must not change between the calls of one backward: so they are taken from
  // the shapes alone, as if all addresses allowed the widest vector.
  const int vector = backward.type == DType::kFloat32 ? 4 : 8;
  plan.chunk = first_chunk(count, lanes_for(dim, vector), backward.type);
  plan.chunks = ceil_div(count, plan.chunk);
  plan.head_blocks = ceil_div(count, kHeadsPerBlock);
  plan.sort_bytes = sort_scratch_bytes(count, plan.wide_keys, plan.scaled, plan.key_bits);
  if (plan.second_sort) {
    plan.sort_bytes =
        std::max(plan.sort_bytes, sort_scratch_bytes(count, false, false, plan.group_bits));
  }
  for (std::int64_t chunks = plan.chunks; chunks > 1;
       chunks = ceil_div(2 * chunks, kPartialChunk)) {
    plan.levels.push_back(Level{2 * chunks, {}, {}});
  }
  lay_out(backward, plan);
  return plan.bytes;
}

}  // namespace

std::size_t plan_backward(Backward& backward, const DenseTable& table) {
  return make_plan(backward, table.rows, table.groups, table.dim, false);
}
std::size_t plan_backward(Backward& backward, const TieredTable& table) {
  return make_plan(backward, table.rows, table.groups, table.dim, true);
}

void set_workspace(Backward& backward, unsigned char* workspace) {
  backward.workspace = workspace;
  lay_out(backward, *backward.plan);
}

namespace {

template <typename K, typename Table>
int launch_keys(const Backward& backward, const Table& table, dim3 grid, Stream stream) {
  const Plan& plan = *backward.plan;
  K* keys = reinterpret_cast<K*>(plan.keys_in);
  const Fill masks{reinterpret_cast<unsigned*>(backward.mask_grads),
                   backward.mask_grads != nullptr ? backward.mask_values : 0, 0};
  const Fill partials{reinterpret_cast<unsigned*>(plan.partial_keys),
                      static_cast<std::int64_t>(plan.partial_key_bytes / sizeof(unsigned)), ~0u};
  // Much to fill beside few lookups asks for blocks of its own, as many as a card runs at once.
  const std::int64_t filling = std::min<std::int64_t>(
      ceil_div(masks.count + partials.count, 16 * kBlockThreads), 8 * multiprocessors());
  grid.x = std::max(grid.x, static_cast<unsigned>(filling));
  const Lookups& lookups = backward.lookups;
  switch (backward.type) {
    case DType::kFloat32:
      AMTL_LAUNCH((lookup_keys_kernel<K, float, Table>), grid, kBlockThreads, 0, as_stream(stream),
                  table, lookups, plan.bag_share, plan.scaled, plan.group_shift, keys,
                  plan.payloads_in, masks, partials);
      break;
    case DType::kFloat16:
      AMTL_LAUNCH((lookup_keys_kernel<K, Half, Table>), grid, kBlockThreads, 0, as_stream(stream),
                  table, lookups, plan.bag_share, plan.scaled, plan.group_shift, keys,
                  plan.payloads_in, masks, partials);
      break;
    case DType::kBFloat16:
      AMTL_LAUNCH((lookup_keys_kernel<K, BFloat16, Table>), grid, kBlockThreads, 0,
                  as_stream(stream), table, lookups, plan.bag_share, plan.scaled, plan.group_shift,
                  keys, plan.payloads_in, masks, partials);
      break;
  }
  return cudaGetLastError();
}

template <typename Table>
int sort_lookups(const Backward& backward, const Table& table, Stream stream) {
  const Lookups& lookups = backward.lookups;
  const std::int64_t count = lookups.count;
  if (count == 0) {
    if (backward.mask_grads != nullptr) {
      const cudaError_t cleared = cudaMemsetAsync(
          backward.mask_grads, 0, backward.mask_values * sizeof(float), as_stream(stream));
      if (cleared != cudaSuccess) return cleared;
    }
    return cudaMemsetAsync(backward.workspace, 0, sizeof(SegmentHeader), as_stream(stream));
  }
  const Plan& plan = *backward.plan;
  dim3 grid;
  if (plan.shares && lookups.bags > 0) {
    if (!grid_for(lookups.bags, kBlockThreads / kWarp, 1, grid)) return cudaErrorInvalidValue;
    AMTL_LAUNCH((bag_share_kernel), grid, kBlockThreads, 0, as_stream(stream), lookups,
                plan.bag_share);
  }
  // Payloads hold 32-bit row numbers, sorts count in 32 bits, reductions do so up to a chunk past
  // it.
  if (count > 0x7fffffff - 256 || plan.key_bits > 63 || !grid_for(count, kBlockThreads, 1, grid)) {
    return cudaErrorInvalidValue;
  }
  int error = plan.wide_keys ? launch_keys<std::uint64_t>(backward, table, grid, stream)
                             : launch_keys<std::uint32_t>(backward, table, grid, stream);
  if (error != cudaSuccess) return error;
  error = sort_pairs(plan.sort_scratch, plan.sort_bytes, plan.keys_in, plan.keys, plan.payloads_in,
                     plan.payloads, count, plan.wide_keys, plan.scaled, plan.key_bits, stream);
  if (error != cudaSuccess || !backward.need_rows) return error;

  const SortedPairs pairs = plan.pairs(count);
  const dim3 blocks{static_cast<unsigned>(plan.head_blocks), 1, 1};
  AMTL_LAUNCH((count_heads_kernel), blocks, kBlockThreads, 0, as_stream(stream), pairs,
              plan.block_heads);
  AMTL_LAUNCH((scan_heads_kernel), 1, kBlockThreads, 0, as_stream(stream), plan.head_blocks,
              plan.block_heads, plan.header);
  AMTL_LAUNCH((write_heads_kernel<Table>), blocks, kBlockThreads, 0, as_stream(stream), table,
              pairs, plan.block_heads, plan.second_sort, plan.distinct_rows, plan.ranks,
              plan.header);
  return cudaGetLastError();
}

}  // namespace

int backward_sort(const Backward& backward, const DenseTable& table, Stream stream) {
  return sort_lookups(backward, table, stream);
}
int backward_sort(const Backward& backward, const TieredTable& table, Stream stream) {
  return sort_lookups(backward, table, stream);
}

int backward_rows(const Backward& backward, std::int64_t distinct, std::int64_t* rows,
                  Stream stream) {
  if (distinct == 0) return cudaSuccess;
  return cudaMemcpyAsync(rows, backward.plan->distinct_rows, distinct * sizeof(std::int64_t),
                         cudaMemcpyDeviceToDevice, as_stream(stream));
}

int backward_tier_counts(const Backward& backward, const TieredTable& table,
                         std::int64_t* rows_below, Stream stream) {
  const Plan& plan = *backward.plan;
  dim3 grid;
  if (!grid_for(table.tiers, kWarp, 1, grid)) return cudaErrorInvalidValue;
  AMTL_LAUNCH((tier_counts_kernel), grid, kWarp, 0, as_stream(stream), table, plan.distinct_rows,
              plan.header, rows_below);
  return cudaGetLastError();
}

int backward_tier_rows(const Backward& backward, const TieredTable& out,
                       const std::int64_t* rows_below, std::int64_t distinct, Stream stream) {
  if (distinct == 0) return cudaSuccess;
  dim3 grid;
  if (!grid_for(distinct, kBlockThreads, 1, grid)) return cudaErrorInvalidValue;
  AMTL_LAUNCH((tier_rows_kernel), grid, kBlockThreads, 0, as_stream(stream), out,
              backward.plan->distinct_rows, rows_below, distinct);
  return cudaGetLastError();
}

namespace {

template <typename Table>
int launch_sort_by_group(const Plan& plan, const Table& table, std::int64_t count, LookupList& list,
                         Stream stream) {
  const SortedPairs pairs = plan.pairs(count);
  auto* keys_in = reinterpret_cast<std::uint32_t*>(plan.keys_in);
  auto* positions = reinterpret_cast<std::uint32_t*>(plan.payloads_in);
  dim3 grid;
  if (!grid_for(count, kBlockThreads, 1, grid)) return cudaErrorInvalidValue;
  AMTL_LAUNCH((group_keys_kernel<Table>), grid, kBlockThreads, 0, as_stream(stream), table, pairs,
              keys_in, positions);
  const int error =
      sort_pairs(plan.sort_scratch, plan.sort_bytes, keys_in, plan.group_keys, positions,
                 plan.group_order, count, false, false, plan.group_bits, stream);
  if (error != cudaSuccess) return error;
  // Nobody asks for the sorted groups.
  AMTL_LAUNCH((permute_pairs_kernel), grid, kBlockThreads, 0, as_stream(stream), pairs,
              plan.group_order, plan.ranks, plan.keys_in, plan.payloads_in, plan.group_keys);
  list.pairs.keys = plan.keys_in;
  list.pairs.payloads = plan.payloads_in;
  list.ranks = plan.group_keys;
  return cudaGetLastError();
}

}  // namespace

// The pairs once more, ordered by group and within a group by row, with the numbers of their rows;
// lies over the unsorted pairs.
int sort_by_group(const Plan& plan, const DenseTable& table, std::int64_t count, LookupList& list,
                  Stream stream) {
  return launch_sort_by_group(plan, table, count, list, stream);
}
int sort_by_group(const Plan& plan, const TieredTable& table, std::int64_t count, LookupList& list,
                  Stream stream) {
  return launch_sort_by_group(plan, table, count, list, stream);
}

}  // namespace amtl::cuda
