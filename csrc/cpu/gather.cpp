#include "gather.h"

#include <string.h>

#include <algorithm>
#include <atomic>

namespace vqfast {

namespace {

constexpr int64_t kCodesAhead = 16;  // codes lie anywhere; this many cover the way to memory

}  // namespace

bool gather(const View& codebook, int64_t bytes, const int64_t* indices, int64_t batches, int64_t per_batch, void* out,
            const Parallel& parallel) {
  const int64_t groups = codebook.size[1], codes = codebook.size[2], dim = codebook.size[3];
  const int64_t row = dim * bytes, ld = codebook.stride[2] * bytes, step = codebook.stride[3] * bytes;
  std::atomic<bool> valid{true};
  parallel(batches * groups * per_batch, 512, [&](int64_t begin, int64_t end) {
    bool all_valid = true;
    for (int64_t i = begin; i < end;) {  // a run of one batch and group at a time
      const int64_t run = i / per_batch, last = std::min(end, (run + 1) * per_batch);
      const char* base = static_cast<const char*>(codebook.data) + run % groups * codebook.stride[1] * bytes;
      for (; i < last; ++i) {
        const int64_t code = indices[i], later = i + kCodesAhead < last ? indices[i + kCodesAhead] : 0;
        if ((uint64_t)later < (uint64_t)codes) __builtin_prefetch(base + later * ld);
        char* to = static_cast<char*>(out) + i * row;
        if ((uint64_t)code >= (uint64_t)codes) {
          memset(to, 0, row);
          all_valid = all_valid && code == -1;
        } else if (step == bytes) {
          memcpy(to, base + code * ld, row);
        } else {
          for (int64_t d = 0; d < dim; ++d) memcpy(to + d * bytes, base + code * ld + d * step, bytes);
        }
      }
    }
    if (!all_valid) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load();
}

}  // namespace vqfast
