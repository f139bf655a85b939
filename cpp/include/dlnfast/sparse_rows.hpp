// SPDX-License-Identifier: MIT
// Rows of a sparse matrix in chunks with about equally many entries, for parallel loops. The chunks depend on
// the entries alone, so that sums over chunks do not depend on the number of threads.
#pragma once

#include <algorithm>

#include "dlnfast/completion.hpp"

namespace dlnfast {

// Returns the first row of chunk c of n: the row of the entry at which the chunk begins.
template <class T>
Index chunk_begin(const SparseRows<T>& entries, Index c, Index n) {
  if (c == 0) return 0;
  if (c == n) return entries.rows;
  // Count one more entry per row, so that empty rows are distributed as well.
  const Index total = entries.size + entries.rows;
  const Index target = static_cast<Index>(static_cast<double>(total) * static_cast<double>(c) /
                                          static_cast<double>(n));
  Index low = 0, high = entries.rows;
  while (low < high) {
    const Index middle = (low + high) / 2;
    if (entries.start[middle] + middle < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
Index count_chunks(const SparseRows<T>& entries) {
  constexpr Index entries_per_chunk = 4096;
  return std::max<Index>(1, (entries.size + entries.rows) / entries_per_chunk);
}

}  // namespace dlnfast
