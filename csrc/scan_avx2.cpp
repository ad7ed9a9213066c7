#include "scan.h"
#include "simd_avx2.h"

Best scan_avx2(const RowView& row, int64_t begin, int64_t end, TileSum* sums) {
  return Scan<Avx2>::scan_row(row, begin, end, sums);
}
