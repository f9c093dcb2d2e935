#include "cuda/gather.cuh"

namespace vq {

namespace {

template <class Word>
void gather_words(const GatherProblem& p, cudaStream_t stream) {
  Codes c = p.codebook;
  const i64 per_word = i64(sizeof(Word)) / p.element_bytes, words = c.dim / per_word;
  c.stride_g /= per_word, c.stride_k /= per_word;  // the caller saw that they divide
  int lanes = 1;
  while (lanes < 32 && lanes < words) lanes *= 2;
  const i64 rows = p.indices.rows();
  const dim3 grid(unsigned(ceil_div(rows, kGatherThreads / lanes)), unsigned(p.indices.groups));
  launch(gather_kernel<Word>, grid, dim3(kGatherThreads), 0, stream, p, c, words, lanes);
}

bool fits(const GatherProblem& p, i64 bytes) {
  const Codes& c = p.codebook;
  const i64 per_word = bytes / p.element_bytes;
  const auto address = reinterpret_cast<uintptr_t>(c.data) | reinterpret_cast<uintptr_t>(p.out);
  return c.stride_d == 1 && c.dim % per_word == 0 && c.stride_g % per_word == 0 && c.stride_k % per_word == 0 && address % uintptr_t(bytes) == 0;
}

}  // namespace

void gather(const GatherProblem& p, cudaStream_t stream) {
  if (p.indices.rows() == 0 || p.indices.groups == 0) return;
  if (fits(p, 16)) {
    gather_words<Word16>(p, stream);
  } else if (p.element_bytes == 2) {
    gather_words<uint16_t>(p, stream);
  } else if (p.element_bytes == 4) {
    gather_words<u32>(p, stream);
  } else {
    gather_words<u64>(p, stream);
  }
}

}  // namespace vq
