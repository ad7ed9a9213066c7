#include "scan.h"
#include "simd_portable.h"

Best scan_portable(const RowView& row, int64_t begin, int64_t end, TileSum* sums) {
  return Scan<Portable>::scan_row(row, begin, end, sums);
}
