// AdamW and the sum of squares on the GPU, bit for bit what src/optim computes on the CPU (docs/arithmetic.md).
//
// The arrays of a call are disjoint and aligned to their elements; where all are aligned to 16 bytes, elements move
// eight at a time. Any grid works; the bits do not depend on it.

// The layout of `Hyper` in src/optim/hyper.rs, where the fields are explained.
struct Hyper {
    float decay;
    float lerp_coeff;
    float beta2;
    float one_minus_beta2;
    float bias_correction2_sqrt;
    float step_size;
    float eps;
    float grad_factor;
    u32 lerp_from_grad;
    float clip;
};

// One element; returns the new weight.
static __device__ __forceinline__ float step_one(float w, float g, float& m, float& v, const Hyper& h) {
    g = __fmul_rn(g, h.grad_factor);
    w = __fmul_rn(w, h.decay);
    const float base = h.lerp_from_grad ? g : m;
    m = canonical(__fadd_rn(base, __fmul_rn(__fsub_rn(g, m), h.lerp_coeff)));
    v = canonical(__fadd_rn(__fmul_rn(v, h.beta2), __fmul_rn(__fmul_rn(g, h.one_minus_beta2), g)));
    const float denom = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), h.bias_correction2_sqrt), h.eps);
    return canonical(__fsub_rn(w, __fdiv_rn(__fmul_rn(m, h.step_size), denom)));
}

// How each type holds its weight. `master` is what the optimizer keeps beyond the parameter.
struct F32 {
    typedef float Param;
    typedef float Master;
    static const bool has_master = false;
    static __device__ __forceinline__ float value(float x) { return x; }
    static __device__ __forceinline__ float round(float x) { return x; }
    static __device__ __forceinline__ float weight(float param, float) { return param; }
    static __device__ __forceinline__ void store(float w, float& param, float&) { param = w; }
};

struct Bf16 {
    typedef u16 Param;
    typedef short Master;
    static const bool has_master = true;
    static __device__ __forceinline__ float value(u16 x) { return __uint_as_float((u32)x << 16); }
    static __device__ __forceinline__ u16 round(float x) { return f32_to_bf16(x); }
    static __device__ __forceinline__ float weight(u16 param, short low) {
        return __uint_as_float(((u32)param << 16) + (u32)(int)low);
    }
    static __device__ __forceinline__ short fresh(u16) { return 0; }
    static __device__ __forceinline__ void store(float w, u16& param, short& low) {
        const u32 bits = __float_as_uint(w);
        param = (u16)((bits + 0x8000u) >> 16);
        low = (short)(u16)bits;
    }
};

struct F16 {
    typedef u16 Param;
    typedef float Master;
    static const bool has_master = true;
    static __device__ __forceinline__ float value(u16 x) { return f16_to_f32(x); }
    static __device__ __forceinline__ u16 round(float x) { return f32_to_f16(x); }
    static __device__ __forceinline__ float weight(u16, float master) { return master; }
    static __device__ __forceinline__ float fresh(u16 param) { return f16_to_f32(param); }
    static __device__ __forceinline__ void store(float w, u16& param, float& master) {
        param = f32_to_f16(w);
        master = w;
    }
};

template <typename T, bool has_master>
struct Fresh {
    static __device__ __forceinline__ typename T::Master of(typename T::Param param) { return T::fresh(param); }
};
template <typename T>
struct Fresh<T, false> {
    static __device__ __forceinline__ typename T::Master of(typename T::Param) { return 0; }
};

template <typename T>
static __device__ __forceinline__ void step(typename T::Param& param, typename T::Param grad,
                                            typename T::Master& master, float& m, float& v, const Hyper& h,
                                            bool reset_master) {
    if (reset_master) master = Fresh<T, T::has_master>::of(param);
    float g = T::value(grad);
    if (h.clip != 1.0f) g = T::value(T::round(__fmul_rn(g, h.clip)));
    const float w = step_one(T::weight(param, master), g, m, v, h);
    T::store(w, param, master);
}

// Where the new values of a call go, each array the old one or disjoint from all; `second` takes the parameters too, or is null.
template <typename T>
struct Target {
    typename T::Param* param;
    typename T::Master* master;
    float* exp_avg;
    float* exp_avg_sq;
    typename T::Param* second;
};

template <typename T>
static __device__ __forceinline__ void adamw(const typename T::Param* param, const typename T::Param* grad,
                                             const typename T::Master* master, const float* exp_avg,
                                             const float* exp_avg_sq, const Target<T>& to, u64 n, const Hyper& h,
                                             u32 reset_master) {
    typedef typename T::Param Param;
    typedef typename T::Master Master;
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const u64 masters = T::has_master ? (u64)master | (u64)to.master : 0;
    const u64 addresses = (u64)param | (u64)grad | (u64)exp_avg | (u64)exp_avg_sq | (u64)to.param | (u64)to.exp_avg |
                          (u64)to.exp_avg_sq | (u64)to.second | masters;
    const u64 wide = addresses % 16 == 0 ? n / WIDTH : 0;
    for (u64 i = first; i < wide; i += stride) {
        const u64 at = i * WIDTH;
        Wide<Param> p = load(param + at);
        const Wide<Param> g = load(grad + at);
        Wide<Master> r = {};
        if (T::has_master) r = load(master + at);
        Wide<float> m = load(exp_avg + at), v = load(exp_avg_sq + at);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) step<T>(p.x[j], g.x[j], r.x[j], m.x[j], v.x[j], h, reset_master);
        store(to.param + at, p);
        if (to.second) store(to.second + at, p);
        if (T::has_master) store(to.master + at, r);
        store(to.exp_avg + at, m);
        store(to.exp_avg_sq + at, v);
    }
    for (u64 i = wide * WIDTH + first; i < n; i += stride) {
        Param p = param[i];
        Master r = T::has_master ? master[i] : Master(0);
        float m = exp_avg[i], v = exp_avg_sq[i];
        step<T>(p, grad[i], r, m, v, h, reset_master);
        to.param[i] = p;
        if (to.second) to.second[i] = p;
        if (T::has_master) to.master[i] = r;
        to.exp_avg[i] = m;
        to.exp_avg_sq[i] = v;
    }
}

extern "C" __global__ void __launch_bounds__(256)
    adamw_bf16(const u16* param, const u16* grad, const short* master, const float* exp_avg, const float* exp_avg_sq,
               Target<Bf16> to, u64 n, Hyper h, u32 reset_master) {
    adamw<Bf16>(param, grad, master, exp_avg, exp_avg_sq, to, n, h, reset_master);
}

extern "C" __global__ void __launch_bounds__(256)
    adamw_f16(const u16* param, const u16* grad, const float* master, const float* exp_avg, const float* exp_avg_sq,
              Target<F16> to, u64 n, Hyper h, u32 reset_master) {
    adamw<F16>(param, grad, master, exp_avg, exp_avg_sq, to, n, h, reset_master);
}

// The masters and `reset_master` are there for equal signatures and not used.
extern "C" __global__ void __launch_bounds__(256)
    adamw_f32(const float* param, const float* grad, const float* master, const float* exp_avg, const float* exp_avg_sq,
              Target<F32> to, u64 n, Hyper h, u32 reset_master) {
    adamw<F32>(param, grad, master, exp_avg, exp_avg_sq, to, n, h, reset_master);
}

// Sums of squares in the order of src/optim/norm.rs: a lane of a warp is a lane of a block.
static const u64 NORM_BLOCK = 8192;
static const u32 NORM_LANES = 32;

// Lane 0 gets the sum of all lanes, by halving.
static __device__ __forceinline__ double halve(double lane) {
#pragma unroll
    for (u32 width = NORM_LANES / 2; width > 0; width /= 2)
        lane = __dadd_rn(lane, __shfl_down_sync(0xffffffffu, lane, width));
    return lane;
}

template <typename T>
static __device__ __forceinline__ double add_square(double lane, typename T::Param x) {
    const double value = (double)T::value(x);
    return __dadd_rn(lane, __dmul_rn(value, value));
}

template <typename T>
static __device__ __forceinline__ void norm_partials(const typename T::Param* data, u64 n, double* partials) {
    const u32 lane_index = threadIdx.x % NORM_LANES;
    const u64 warp = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / NORM_LANES;
    const u64 warps = (u64)gridDim.x * blockDim.x / NORM_LANES;
    const u64 blocks = (n + NORM_BLOCK - 1) / NORM_BLOCK;
    for (u64 block = warp; block < blocks; block += warps) {
        const typename T::Param* at = data + block * NORM_BLOCK;
        const u64 count = n - block * NORM_BLOCK < NORM_BLOCK ? n - block * NORM_BLOCK : NORM_BLOCK;
        double lane = 0.0;
        if (count == NORM_BLOCK) {
#pragma unroll 16
            for (u32 i = 0; i < NORM_BLOCK / NORM_LANES; i++) lane = add_square<T>(lane, at[i * NORM_LANES + lane_index]);
        } else {
            for (u64 i = lane_index; i < count; i += NORM_LANES) lane = add_square<T>(lane, at[i]);
        }
        lane = halve(lane);
        if (lane_index == 0) partials[block] = lane;
    }
}

// First kernel: one partial sum per NORM_BLOCK elements. blockDim.x is a multiple of 32.
extern "C" __global__ void norm_partials_bf16(const u16* data, u64 n, double* partials) {
    norm_partials<Bf16>(data, n, partials);
}

extern "C" __global__ void norm_partials_f16(const u16* data, u64 n, double* partials) {
    norm_partials<F16>(data, n, partials);
}

extern "C" __global__ void norm_partials_f32(const float* data, u64 n, double* partials) {
    norm_partials<F32>(data, n, partials);
}

// Second kernel: one warp (grid 1, block 32) sums `count` partial sums to `out[0]`.
extern "C" __global__ void norm_sum(const double* partials, u64 count, double* out) {
    double lane = 0.0;
#pragma unroll 8
    for (u64 i = threadIdx.x; i < count; i += NORM_LANES) lane = __dadd_rn(lane, partials[i]);
    lane = halve(lane);
    if (threadIdx.x == 0) out[0] = lane;
}
