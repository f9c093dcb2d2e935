#include "gather.h"

#include <string.h>

#include <atomic>

namespace vqfast {

bool gather(const View& codebook, int64_t bytes, const int64_t* indices, int64_t batches, int64_t per_batch, void* out,
            const Parallel& parallel) {
  const int64_t groups = codebook.size[1], codes = codebook.size[2], dim = codebook.size[3];
  std::atomic<bool> valid{true};
  parallel(batches * groups * per_batch, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* to = static_cast<char*>(out) + i * dim * bytes;
      const int64_t code = indices[i];
      if (code < 0 || code >= codes) {
        memset(to, 0, dim * bytes);
        if (code != -1) valid.store(false, std::memory_order_relaxed);
        continue;
      }
      const int64_t group = i / per_batch % groups;
      const char* from =
          static_cast<const char*>(codebook.data) + (group * codebook.stride[1] + code * codebook.stride[2]) * bytes;
      if (codebook.stride[3] == 1) {
        memcpy(to, from, dim * bytes);
      } else {
        for (int64_t d = 0; d < dim; ++d) memcpy(to + d * bytes, from + d * codebook.stride[3] * bytes, bytes);
      }
    }
  });
  return valid.load();
}

}  // namespace vqfast
