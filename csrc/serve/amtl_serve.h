/*
 * Lookups in packed files of amtl, for programs without Python and torch.
 *
 * A file is mapped into memory, not read: it opens in milliseconds at any size, and processes share
 * its pages. Handles never change once they are open, so any number of threads may look up in one
 * at the same time, without locks. Nothing is written to the file. Whoever replaces it while it is
 * open must rename a new one over it, as amtl.save() does; cutting an open file short is fatal to
 * its readers, as with every mapped file.
 *
 * Functions that can fail return an amtl_status, and amtl_error() says in words what was wrong.
 *
 * What is looked up equals what Python gives on the CPU, bit for bit, but for the order of sums
 * where a table has a basis: see docs/serving.md.
 */
#ifndef AMTL_SERVE_H
#define AMTL_SERVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define AMTL_API __attribute__((visibility("default")))
#else
#define AMTL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum amtl_status {
  AMTL_OK = 0,
  AMTL_ERROR_ARGUMENT = 1,    /* a null pointer, offsets out of order, weights with means */
  AMTL_ERROR_INDEX = 2,       /* an index outside its table */
  AMTL_ERROR_IO = 3,          /* the file cannot be opened or mapped */
  AMTL_ERROR_FORMAT = 4,      /* not a packed file of amtl */
  AMTL_ERROR_VERSION = 5,     /* a packed file of a version that this library does not read */
  AMTL_ERROR_DAMAGED = 6,     /* truncated, corrupted or inconsistent */
  AMTL_ERROR_UNSUPPORTED = 7, /* a layer that is not served: with max_norm, or of float64 */
  AMTL_ERROR_MEMORY = 8       /* no memory for the handle */
} amtl_status;

typedef enum amtl_mode { AMTL_SUM = 0, AMTL_MEAN = 1 } amtl_mode;

/* Flags of amtl_open. */
enum {
  AMTL_VERIFY = 1 /* compare the checksums of all tensors, which reads the whole file once */
};

typedef struct amtl_file amtl_file;
/* A table: a layer of a file, or one table of a collection. Belongs to its file. */
typedef struct amtl_layer amtl_layer;

/*
 * Opens a packed file of any kind. Sizes, types and the checksum of everything but the values are
 * always checked; values are with AMTL_VERIFY only.
 *
 * path: a file of amtl.save() or `amtl pack`.
 * flags: 0 or AMTL_VERIFY.
 * file: where the handle goes; NULL if opening fails.
 *
 * Errors: ARGUMENT, IO, FORMAT, VERSION, DAMAGED, MEMORY.
 */
AMTL_API amtl_status amtl_open(const char* path, unsigned flags, amtl_file** file);

/* Unmaps the file. Its layers must not be in use, nor be used again. NULL is allowed. */
AMTL_API void amtl_close(amtl_file* file);

/* What the calling thread's last failure was, in one line; "" if nothing has failed yet. */
AMTL_API const char* amtl_error(void);

/* Version of this library. */
AMTL_API const char* amtl_version(void);

/* What was saved: "layer", "layers", "model" or "run". */
AMTL_API const char* amtl_kind(const amtl_file* file);

/* Number of layers; and the layer of a number below it, by name; NULL beyond. */
AMTL_API size_t amtl_layer_count(const amtl_file* file);
AMTL_API const amtl_layer* amtl_layer_at(const amtl_file* file, size_t number);

/* A layer by its name, or another name that the model has for it; NULL if there is none. The name
 * of a layer that was saved alone is "". */
AMTL_API const amtl_layer* amtl_find(const amtl_file* file, const char* name);

/* Tables of a collection, in its order: each is looked up by itself, by rows of its own. A layer
 * that is no collection has none. By number below the count, or by name; NULL if there is none. */
AMTL_API size_t amtl_table_count(const amtl_layer* layer);
AMTL_API const amtl_layer* amtl_table_at(const amtl_layer* layer, size_t number);
AMTL_API const amtl_layer* amtl_find_table(const amtl_layer* layer, const char* name);

AMTL_API const char* amtl_name(const amtl_layer* layer);
/* Rows N: indices are 0..N-1. */
AMTL_API int64_t amtl_rows(const amtl_layer* layer);
/* Width D of what is looked up. */
AMTL_API int64_t amtl_dim(const amtl_layer* layer);
/* Bits of a stored number: 32 or 16 of floats, 16, 8, 4 or 2 of codes. */
AMTL_API int amtl_bits(const amtl_layer* layer);
/* The row that counts for nothing in bags, or -1; of a collection as a whole, one of them. */
AMTL_API int64_t amtl_padding(const amtl_layer* layer);
/* How the layer pools bags in Python; AMTL_SUM for one that has none. */
AMTL_API amtl_mode amtl_layer_mode(const amtl_layer* layer);

/*
 * Looks rows up.
 *
 * indices: [count].
 * out: [count, D] row-major; holds anything after an error.
 *
 * Errors: ARGUMENT, INDEX, UNSUPPORTED, DAMAGED (row_order, of a file opened without AMTL_VERIFY).
 */
AMTL_API amtl_status amtl_lookup(const amtl_layer* layer, const int64_t* indices, size_t count,
                                 float* out);
AMTL_API amtl_status amtl_lookup_i32(const amtl_layer* layer, const int32_t* indices, size_t count,
                                     float* out);

/*
 * Looks rows up and pools them: bag b is indices[offsets[b]] .. indices[offsets[b + 1] - 1]. Bags
 * of nothing, or of padding only, are zeros. Indices behind the last bag are not looked at.
 *
 * indices: [count].
 * offsets: [bags + 1], from 0 on, never decreasing, up to count at most.
 * weights: [count], what each row is multiplied by, with AMTL_SUM only; NULL for ones.
 * out: [bags, D] row-major; holds anything after an error.
 *
 * Errors: as amtl_lookup.
 */
AMTL_API amtl_status amtl_lookup_bags(const amtl_layer* layer, const int64_t* indices, size_t count,
                                      const int64_t* offsets, size_t bags, const float* weights,
                                      amtl_mode mode, float* out);
AMTL_API amtl_status amtl_lookup_bags_i32(const amtl_layer* layer, const int32_t* indices,
                                          size_t count, const int32_t* offsets, size_t bags,
                                          const float* weights, amtl_mode mode, float* out);

#ifdef __cplusplus
}
#endif

#endif
