#include "scan.h"
#include "simd_avx512.h"

Best scan_avx512(const RowView& row, int64_t begin, int64_t end, TileSum* sums) {
  return Scan<Avx512>::scan_row(row, begin, end, sums);
}
