// The mean over ranks of parts of gradients, bit for bit what src/optim/mean.rs computes on the CPU (docs/arithmetic.md):
// summed in fp32 ascending by rank, divided by the number of all ranks, rounded once.
//
// One launch takes the parts of a whole unit. Their elements are cut into tiles of blockDim.x * WIDTH, which blocks of the grid take in turn;
// any grid works, and the bits do not depend on it.

// The layout of `Part` in src/device/cuda/means.rs; addresses of elements of one type.
struct Part {
    u64 out;
    // This rank's own piece, or 0.
    u64 own;
    // Pieces of other ranks, ascending by rank, the first here and each `stride` bytes after the one before.
    u64 others;
    u64 stride;
    u64 n;
    // Tiles of this part and of all before it.
    u64 tiles;
    u32 count;
    // Of the other ranks' pieces, how many come before the own one.
    u32 before;
    // Whether all addresses are aligned to 16 bytes.
    u32 wide;
};

// As in src/device/cuda/means.rs: parts of one launch, as far as its arguments hold them.
static const int PARTS = 48;

struct Parts {
    Part part[PARTS];
    u32 count;
    float ranks;
};

struct F32 {
    typedef float Element;
    static __device__ __forceinline__ float value(float x) { return x; }
    static __device__ __forceinline__ float round(float x) { return canonical(x); }
};

struct Bf16 {
    typedef u16 Element;
    static __device__ __forceinline__ float value(u16 x) { return __uint_as_float((u32)x << 16); }
    static __device__ __forceinline__ u16 round(float x) { return f32_to_bf16(x); }
};

struct F16 {
    typedef u16 Element;
    static __device__ __forceinline__ float value(u16 x) { return f16_to_f32(x); }
    static __device__ __forceinline__ u16 round(float x) { return f32_to_f16(x); }
};

// The pieces of a part, ascending by rank.
static __device__ __forceinline__ u32 pieces(const Part& part) { return part.count + (part.own != 0); }

template <typename T>
static __device__ __forceinline__ const T* piece(const Part& part, u32 i) {
    if (part.own != 0) {
        if (i == part.before) return (const T*)part.own;
        if (i > part.before) i -= 1;
    }
    return (const T*)(part.others + i * part.stride);
}

template <typename T>
static __device__ __forceinline__ void mean_of_eight(const Part& part, u64 at, float ranks) {
    typedef typename T::Element Element;
    const u32 all = pieces(part);
    Wide<Element> x = load(piece<Element>(part, 0) + at);
    float sum[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; j++) sum[j] = T::value(x.x[j]);
    for (u32 i = 1; i < all; i++) {
        x = load(piece<Element>(part, i) + at);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sum[j] = __fadd_rn(sum[j], T::value(x.x[j]));
    }
#pragma unroll
    for (int j = 0; j < WIDTH; j++) x.x[j] = T::round(__fdiv_rn(sum[j], ranks));
    store((Element*)part.out + at, x);
}

template <typename T>
static __device__ __forceinline__ void mean_of_one(const Part& part, u64 at, float ranks) {
    typedef typename T::Element Element;
    const u32 all = pieces(part);
    float sum = T::value(piece<Element>(part, 0)[at]);
    for (u32 i = 1; i < all; i++) sum = __fadd_rn(sum, T::value(piece<Element>(part, i)[at]));
    ((Element*)part.out)[at] = T::round(__fdiv_rn(sum, ranks));
}

template <typename T>
static __device__ __forceinline__ void mean(const Parts& parts) {
    const u64 tile = (u64)blockDim.x * WIDTH;
    const u64 tiles = parts.part[parts.count - 1].tiles;
    u32 index = 0;
    u64 before = 0;
    for (u64 i = blockIdx.x; i < tiles; i += gridDim.x) {
        while (i >= parts.part[index].tiles) before = parts.part[index++].tiles;
        const Part& part = parts.part[index];
        const u64 begin = (i - before) * tile;
        const u64 end = part.n - begin < tile ? part.n : begin + tile;
        if (part.wide) {
            u64 at = begin + (u64)threadIdx.x * WIDTH;
            if (at + WIDTH <= end) {
                mean_of_eight<T>(part, at, parts.ranks);
            } else {
                for (; at < end; at++) mean_of_one<T>(part, at, parts.ranks);
            }
        } else {
            for (u64 at = begin + threadIdx.x; at < end; at += blockDim.x) mean_of_one<T>(part, at, parts.ranks);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) mean_f32(const Parts parts) { mean<F32>(parts); }

extern "C" __global__ void __launch_bounds__(256) mean_bf16(const Parts parts) { mean<Bf16>(parts); }

extern "C" __global__ void __launch_bounds__(256) mean_f16(const Parts parts) { mean<F16>(parts); }
