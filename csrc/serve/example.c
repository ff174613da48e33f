/* Opens a packed file and prints what is in it, or the rows asked for:
 *
 *   amtl_serve_example FILE              layers: name, rows, width, bits
 *   amtl_serve_example FILE LAYER ROW... a line of numbers for each row
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "serve/amtl_serve.h"

static int fail(void) {
  fprintf(stderr, "%s\n", amtl_error());
  return 1;
}

static int print_row(const amtl_layer* layer, int64_t row) {
  const int64_t dim = amtl_dim(layer);
  float* values = malloc((size_t)dim * sizeof(float));
  if (values == NULL) return 1;
  const amtl_status status = amtl_lookup(layer, &row, 1, values);
  for (int64_t c = 0; status == AMTL_OK && c < dim; ++c) {
    printf("%.9g%c", values[c], c + 1 < dim ? ' ' : '\n');
  }
  free(values);
  return status == AMTL_OK ? 0 : fail();
}

int main(int argc, char** argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: %s FILE [LAYER ROW...]\n", argv[0]);
    return 2;
  }
  amtl_file* file;
  if (amtl_open(argv[1], AMTL_VERIFY, &file) != AMTL_OK) return fail();
  int failed = 0;
  if (argc == 2) {
    for (size_t i = 0; i < amtl_layer_count(file); ++i) {
      const amtl_layer* layer = amtl_layer_at(file, i);
      printf("\"%s\" %" PRId64 " x %" PRId64 ", %d bits\n", amtl_name(layer), amtl_rows(layer),
             amtl_dim(layer), amtl_bits(layer));
    }
  } else {
    const amtl_layer* layer = amtl_find(file, argv[2]);
    if (layer == NULL) {
      fprintf(stderr, "no layer \"%s\"\n", argv[2]);
      failed = 1;
    }
    for (int i = 3; i < argc && !failed; ++i) failed = print_row(layer, strtoll(argv[i], NULL, 10));
  }
  amtl_close(file);
  return failed;
}
