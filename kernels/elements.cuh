// What the kernels have in common: 16-bit types by bits, and elements that move eight at a time. It is put before each of the other files.
//
// Compiled by NVRTC without headers: --fmad=false, and never --use_fast_math or --ftz=true. Every operation is an
// intrinsic that rounds once to nearest; NaNs are stored canonical, because the processors disagree on their payload.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

static __device__ __forceinline__ float canonical(float x) { return x != x ? __uint_as_float(0x7fc00000u) : x; }

static __device__ __forceinline__ float f16_to_f32(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// Ties to even; a NaN becomes 0x7e00.
static __device__ __forceinline__ u16 f32_to_f16(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return x != x ? (u16)0x7e00 : y;
}

// Ties to even, as torch rounds; NaNs canonical.
static __device__ __forceinline__ u16 f32_to_bf16(float x) {
    const u32 bits = __float_as_uint(canonical(x));
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static const int WIDTH = 8;

template <typename T>
struct alignas(16) Wide {
    T x[WIDTH];
};

template <typename T>
static __device__ __forceinline__ Wide<T> load(const T* from) {
    Wide<T> to;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(Wide<T>) / 16); i++)
        reinterpret_cast<uint4*>(&to)[i] = reinterpret_cast<const uint4*>(from)[i];
    return to;
}

template <typename T>
static __device__ __forceinline__ void store(T* to, const Wide<T>& from) {
#pragma unroll
    for (int i = 0; i < (int)(sizeof(Wide<T>) / 16); i++)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&from)[i];
}
