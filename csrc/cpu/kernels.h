// The inner loops, one table of function pointers for each instruction set.
//
// Everything here works on raw pointers and on ranges that the drivers (forward.cpp, backward.cpp)
// hand out; nothing allocates, nothing throws.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/heads.h"
#include "cpu/resolve.h"
#include "cpu/types.h"

// For functions that do nothing but prefetch: GCC 12 takes such a function for one without effects
// and drops calls of it that it did not inline.
#define AMTL_ALWAYS_INLINE inline __attribute__((always_inline))

namespace amtl::cpu {

constexpr int kMaxStaticRegisters = 8;
// Lookups are resolved a block at a time, asked for this far ahead of their use, and used at most a
// part of a bag at a time. Between resolving and use lie many instructions a lookup, so a processor
// sees few lookups ahead by itself: asked for 32 ahead, large tables were a quarter slower.
constexpr int64_t kSourceBlock = 32;
constexpr int64_t kSourceAhead = 64;
constexpr int64_t kSourcePart = 32;
constexpr int64_t kSourceRing = kSourcePart + kSourceAhead + kSourceBlock;
static_assert((kSourceRing & (kSourceRing - 1)) == 0, "positions are masked");
// Tables up to this size are left to the caches. From there on asking ahead costs a table that is
// the only one, and looked up all the time, at most a sixth; of sixteen that take turns, each
// small enough for a cache, lookups took twice as long without.
constexpr int64_t kPrefetchBytes = int64_t{1} << 17;
// From this size on a table is not taken to be in a cache when its turn comes.
constexpr int64_t kUncachedBytes = int64_t{4} << 20;
inline bool IsLarge(const LookupTable& table, int64_t bytes = kPrefetchBytes) {
  return table.Bytes() >= bytes;
}
constexpr int64_t kPrefetchGradBytes = int64_t{1} << 18;
// Floats of scratch that walks and updates need besides sums of padded rows.
constexpr int64_t kWalkMargin = 32;
// A segment of more items than this is summed in pieces of this many, whoever sums them: threads
// share hot rows, and the order of additions does not depend on their number.
constexpr int64_t kPieceItems = 1024;

// One pooled or plain forward over bags [begin, end). A plain lookup has begins == nullptr: bag b
// is the single lookup b.
struct PoolTask {
  const LookupTable* table;
  Faults* faults;         // of the thread
  const int64_t* begins;  // [bags + 1]
  void* out;              // [bags, dim], rows `out_stride` values apart
  int64_t out_stride;
  int64_t dim;
  bool mean;
  bool weighted;   // lookups carry a scale
  bool stream;     // write past the caches: out is 64-byte aligned, dim fills whole registers
  bool prefetch;   // rows are asked for ahead
  bool uncached;   // the table is larger than the caches
  bool unaligned;  // rows may begin anywhere in a cache line, which is worth a look
  bool whole;      // rows are whole registers of floats
  float* wide;     // [dim] scratch of the thread, for dim > kMaxStaticDim
};

// Where a row lies, how much of it is kept, and the step size of its codes.
struct PlacedRow {
  const char* row;
  int32_t size;
  float step;
};
// Lookups of bags of one in rows that have been found before.
struct PickTask {
  const PlacedRow* rows;
  int64_t count;  // of rows
  const void* indices;
  IndexType index_type;
  int64_t dim;
  DType type;
  int32_t bits, rounding;  // see LookupTable
  void* out;               // [lookups, dim]
};

// Columns that are chosen for at a time.
constexpr int kChoices = 64;

// A lookup after sorting by row: `bag` is the row of the incoming gradient.
struct Item {
  uint32_t bag;
  uint32_t row;
};
struct WeightedItem {
  uint32_t bag;
  uint32_t row;
  float scale;
};

// Rows [first_row, end_row) of a table and what a rule does to them. Without one, `weight` is
// read for the mask gradient only and `grads` [U, width] is written.
struct TableSlice {
  void* weight;
  float* state1;  // Adagrad: [rows, width]; row-wise: [rows]; Adam: first moment
  float* state2;  // Adam: second moment
  void* grads;
  int64_t first_row;
  int64_t end_row;
  int64_t first_segment;  // segment whose gradient is grads[0]
  int32_t width;
  // Of codes, which `weight` holds then: their bits, the bytes of a row, what numbers are multiples
  // of, and the rows of the block before the slice, from which rounding counts.
  int32_t bits;
  int32_t row_bytes;
  float step;
  int64_t rows_before;
};

// Lookups sorted by row, cut into segments of equal row, and what to do at a segment's end.
struct WalkTask {
  const void* grad;  // [bags, dim], rows `grad_stride` values apart
  int64_t grad_stride;
  int64_t dim;
  const void* items;        // Item or WeightedItem, sorted
  const int64_t* rows;      // [segments]
  const uint32_t* starts;   // [segments + 1] into items
  const int32_t* sizes;     // [segments] kept size
  const int32_t* groups;    // [segments], with mask_grads
  const uint32_t* order;    // [segments] walking order, or nullptr
  const int32_t* piece_of;  // [segments] first row of `pieces` of a split segment, else -1; or null
  const float* pieces;      // [pieces, padded dim] partial sums of split segments
  int64_t padded_dim;
  float* mask_grads;  // [groups, dim] or nullptr
  const TableSlice* slices;
  int64_t slice_count;
  Hyper hyper;
  int64_t segments;    // in all
  bool prefetch;       // rows are asked for ahead
  bool prefetch_grad;  // and rows of the gradient
  bool aligned;        // rows begin where cache lines do
  bool coded;          // rows are codes: SGD or row-wise Adagrad, without a mask gradient
};

// Scratch of one walking range: partial mask gradients of the groups it shares with its neighbours.
struct WalkEdges {
  int32_t first_group;  // -1: none
  int32_t last_group;   // -1: the range holds one group only
  float* first;         // [dim]
  float* last;          // [dim]
};

struct KernelTable {
  const char* name;
  int lanes;
  void (*pool)(DType type, const PoolTask& task, int64_t begin, int64_t end);
  // Finds the rows that are looked up; false if one is out of range, or its size is.
  bool (*place)(const LookupTable& table, PlacedRow* rows);
  // Lookups [begin, end); false if one is out of range.
  bool (*pick)(const PickTask& task, int64_t begin, int64_t end);
  // See choose.inl.
  void (*choose_floats)(const float* scores, const float* prices, int64_t levels, int32_t* level);
  void (*choose_doubles)(const double* scores, const double* prices, int64_t levels,
                         int64_t* level);
  // See heads.h: kGroupsAtOnce groups of a head from one on, a whole head, and again so many
  // groups.
  void (*run_twins)(const Twins& twins, int64_t head, int64_t group, float* scratch, float* out);
  void (*twins_gradient)(const Twins& twins, int64_t head, float* scratch, float* grads,
                         const float* grad, float* numbers_grad);
  void (*kernel_mask_gradient)(const KernelMasks& masks, int64_t head, float* grad);
  void (*softmax_mask_gradient)(const SoftmaxMasks& masks, int64_t group, float* scratch,
                                float* grad);
  void (*draw_bytes)(const NoisySizes& noise, float* scratch, uint8_t* out);
  void (*draw_words)(const NoisySizes& noise, float* scratch, int32_t* out);
  // Sums the gradients of `count` items into out[0..columns).
  void (*reduce)(DType type, const void* grad, int64_t stride, const void* items, bool weighted,
                 int64_t count, int columns, float* out);
  // Walks segments [begin, end); `scratch` holds 2 * padded_dim + kWalkMargin floats.
  void (*walk)(DType type, Rule rule, bool weighted, const WalkTask& task, int64_t begin,
               int64_t end, WalkEdges* edges, float* scratch);
  // Gradient of the per-sample weight of lookups [begin, end), which are in `bags`.
  void (*dot)(const LookupTable& table, Faults* faults, const void* grad, int64_t stride,
              const int64_t* bags, int64_t begin, int64_t end, void* out);
  // Kept sizes, -1 for wrong ones, and groups (unless null) of rows [begin, end), which ascend up
  // to `limit`.
  void (*describe)(const LookupTable& table, const int64_t* rows, int64_t begin, int64_t end,
                   int64_t limit, bool prefetch, int32_t* sizes, int32_t* groups);
  // Applies updates to rows[begin, end) with gradients grads [.., slice.width]; `scratch` holds a
  // padded row and kWalkMargin floats.
  void (*apply)(DType type, Rule rule, const TableSlice& slice, const Hyper& hyper,
                const int64_t* rows, const void* grads, int64_t begin, int64_t end, float* scratch);
};

const KernelTable& GenericKernels();
#if defined(__x86_64__)
const KernelTable& Avx2Kernels();
const KernelTable& Avx512Kernels();
#endif

// The best table that this processor runs; AMTL_CPU_ISA=generic|avx2|avx512 asks for a lesser one.
const KernelTable& Kernels();
// Makes Kernels() the named table, or the best one again for "". False: the processor can't run it.
bool UseKernels(const char* name);

}  // namespace amtl::cpu
