// The CUDA operators over raw device pointers. Nothing here but new_findings allocates, nothing
// synchronises or knows of torch: callers bring workspaces, so every function else may be captured
// into a CUDA graph.
//
// All return a cudaError_t as int, so that this header needs no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/params.h"

namespace amtl::cuda {

using Stream = void*;

// Widest vector, in elements, that divides every given number of columns and address.
int vector_elements(DType type, const DenseTable& table, std::uint64_t addresses);
int vector_elements(DType type, const TieredTable& table, std::uint64_t addresses);

// @param[out] report [kReportSlots] set to "nothing bad"
int clear_report(unsigned long long* report, Stream stream);
// Checks that offsets start at 0, never fall and end within the indices, and tells the host of the
// first bad one, or of what the lookup launched before this has reported.
//
// @param[in]  call      what is known of a finding: number of the call, tables, whether it clamps
// @param[out] findings  gets an entry once the device has come to it; no wait is needed for that
int check_lookups(const DenseTable& table, const Lookups& lookups, const Finding& call,
                  Findings* findings, Stream stream);
int check_lookups(const TieredTable& table, const Lookups& lookups, const Finding& call,
                  Findings* findings, Stream stream);
// Memory of the host that every device may write to, for the life of the process.
int new_findings(Findings** findings);

// @param[out] out [L, D]
int lookup_forward(DType type, const DenseTable& table, const Lookups& lookups, void* out,
                   Stream stream);
int lookup_forward(DType type, const TieredTable& table, const Lookups& lookups, void* out,
                   Stream stream);

// @param[out] out [B, D], or [batch, out_stride] with several tables
int pool_forward(DType type, const DenseTable& table, const Lookups& lookups,
                 std::int64_t out_stride, void* out, Stream stream);
int pool_forward(DType type, const TieredTable& table, const Lookups& lookups,
                 std::int64_t out_stride, void* out, Stream stream);

// @param[in]  grad      [B, D]
// @param[out] psw_grad  [L]
int pool_psw_backward(DType type, const DenseTable& table, const Lookups& lookups,
                      std::int64_t grad_stride, const void* grad, void* psw_grad, Stream stream);
int pool_psw_backward(DType type, const TieredTable& table, const Lookups& lookups,
                      std::int64_t grad_stride, const void* grad, void* psw_grad, Stream stream);

// --- Backward ----------------------------------------------------------------------------------

struct BackwardHeader {
  std::int64_t distinct = 0;
  std::int64_t groups_unsorted = 0;
};

// Where everything lies in the workspace, and how sums are cut up.
struct Plan;

// What a backward needs besides its inputs. Fill in the wishes, have it planned, hand in the
// workspace; the same to every function below.
struct Backward {
  DType type = DType::kFloat32;
  Lookups lookups;
  const void* grad = nullptr;  // [B, D] or [L, D]
  std::int64_t grad_stride = 0;
  // The mask gradients, of every table [G_t, D_t], one after the other, aligned to 16 bytes; null:
  // not wanted.
  float* mask_grads = nullptr;
  std::int64_t mask_values = 0;
  bool groups_sorted = false;  // known: row_group rises with the row number
  bool need_rows = true;       // the distinct rows are wanted (not by fused updates)

  // Set by the two functions that follow.
  std::shared_ptr<Plan> plan;
  unsigned char* workspace = nullptr;
};

// Plans for tables of this shape, once a call. Returns the bytes that the workspace must have.
std::size_t plan_backward(Backward& backward, const DenseTable& table);
std::size_t plan_backward(Backward& backward, const TieredTable& table);
// @param[in] workspace 256-byte aligned
void set_workspace(Backward& backward, unsigned char* workspace);

// First half: sorts the lookups and finds the distinct rows, and clears mask gradients and partial
// sums. Afterwards the header lies at the start of the workspace (device memory), to be read by the
// host where it needs the number of rows.
int backward_sort(const Backward& backward, const DenseTable& table, Stream stream);
int backward_sort(const Backward& backward, const TieredTable& table, Stream stream);

// Copies the distinct rows out of the workspace.
// @param[out] rows [U]
int backward_rows(const Backward& backward, std::int64_t distinct, std::int64_t* rows,
                  Stream stream);

// Distinct rows below each tier's end, for tiered tables, and then `groups_unsorted` of the header.
// @param[out] rows_below [C + 1], device memory
int backward_tier_counts(const Backward& backward, const TieredTable& table,
                         std::int64_t* rows_below, Stream stream);
// @param[in] out the table with the addresses of the per-tier int64 row outputs for bases
int backward_tier_rows(const Backward& backward, const TieredTable& out,
                       const std::int64_t* rows_below, std::int64_t distinct, Stream stream);

// Second half: the reductions. For tiered tables, if `grads`, the bases of `table` are the
// addresses of the gradients of each tier less the distinct rows of the tiers before.
// @param[in]  groups_unsorted  as the header has it
// @param[out] grads            [U, D] or null
int backward_reduce(const Backward& backward, const DenseTable& table, void* grads,
                    bool groups_unsorted, Stream stream);
int backward_reduce(const Backward& backward, const TieredTable& table, bool grads,
                    bool groups_unsorted, Stream stream);

// Second half with a fused optimizer step in place of row gradients. Only what update_fits.
int backward_update(const Backward& backward, const DenseTable& table, const Update& update,
                    Stream stream);
int backward_update(const Backward& backward, const TieredTable& table, const Update& update,
                    Stream stream);
// Row-wise Adagrad holds a row's sums, and those of its mask, in a block's shared memory.
constexpr int kWidestRowwise = 6144;
bool update_fits(const Update& update, int dim);

// --- Optimizers on (rows, grads) ---------------------------------------------------------------

// @param[in] rows [U] distinct, @param[in] grads [U, D]
int apply_update(DType type, const DenseTable& table, const Update& update,
                 const std::int64_t* rows, const void* grads, std::int64_t distinct, Stream stream);

// As above, of codes, by SGD or row-wise Adagrad.
int apply_codes(int bits, const CodeRows& table, const Update& update, const std::int64_t* rows,
                const float* grads, std::int64_t distinct, Stream stream);

// --- Sorting, the one thing taken from a library -----------------------------------------------

// Stable sort of pairs by the lowest `bits` bits of their keys. Keys are uint64 if wide_keys, else
// uint32; values likewise. `scratch` of sort_scratch_bytes.
std::size_t sort_scratch_bytes(std::int64_t count, bool wide_keys, bool wide_values, int bits);
int sort_pairs(void* scratch, std::size_t scratch_bytes, const void* keys_in, void* keys_out,
               const void* values_in, void* values_out, std::int64_t count, bool wide_keys,
               bool wide_values, int bits, Stream stream);

}  // namespace amtl::cuda
