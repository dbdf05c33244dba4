// Short float vectors by the compiler's own extension: one source for SSE, AVX2, AVX-512 and NEON.
#pragma once

namespace ctrlora::detail {

#define CTRLORA_INLINE inline __attribute__((always_inline))

template <int Lanes>
struct Vector {
  // NOLINTNEXTLINE(modernize-use-using): the attribute needs a typedef
  typedef float type __attribute__((vector_size(Lanes * sizeof(float))));
};

// In memory a vector is aligned and aliased like its floats, so that any address will do.
template <typename V>
CTRLORA_INLINE void load(V& vector, const float* from) {
  // NOLINTNEXTLINE(modernize-use-using): the attribute needs a typedef
  typedef float Loose __attribute__((vector_size(sizeof(V)), aligned(sizeof(float)), may_alias));
  vector = *reinterpret_cast<const Loose*>(from);
}

template <typename V>
CTRLORA_INLINE void store(float* to, const V& vector) {
  // NOLINTNEXTLINE(modernize-use-using): the attribute needs a typedef
  typedef float Loose __attribute__((vector_size(sizeof(V)), aligned(sizeof(float)), may_alias));
  *reinterpret_cast<Loose*>(to) = vector;
}

}  // namespace ctrlora::detail
