//! The scalars of one AdamW step.

/// Options of a parameter group, as the user gives them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of the first moment, in `[0, 1)`.
    pub beta1: f64,
    /// Decay rate of the second moment, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Ascend instead of descend.
    pub maximize: bool,
}

impl Default for AdamWOptions {
    /// torch's defaults.
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2, maximize: false }
    }
}

/// What the kernels take: each value computed in fp64 and rounded once to fp32. The layout is that of `Hyper` in
/// kernels/adamw.cu, passed by value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// `1 - lr * weight_decay`.
    pub decay: f32,
    /// `1 - beta1`, or `-beta1` where `lerp_from_grad`.
    pub lerp_coeff: f32,
    /// `beta2`.
    pub beta2: f32,
    /// `1 - beta2`.
    pub one_minus_beta2: f32,
    /// `sqrt(1 - beta2^step)`.
    pub bias_correction2_sqrt: f32,
    /// `lr / (1 - beta1^step)`.
    pub step_size: f32,
    /// `eps`.
    pub eps: f32,
    /// What the gradient is multiplied by: the scale, negative to maximize.
    pub grad_factor: f32,
    /// 1 where the first moment is interpolated from the gradient's end (`beta1 <= 0.5`), as `torch.lerp` does.
    pub lerp_from_grad: u32,
    /// What the gradient is multiplied by first, rounded to the gradient's type, as clipping it in place would; mostly 1.
    pub clip: f32,
}

impl Hyper {
    /// The scalars of step number `step`, which counts from 1. `grad_scale` multiplies the gradient (clipping times
    /// the inverse of a loss scale).
    pub fn new(options: &AdamWOptions, step: u64, grad_scale: f64) -> Self {
        debug_assert!(step >= 1, "steps count from 1");
        let AdamWOptions { lr, beta1, beta2, eps, weight_decay, maximize } = *options;
        // `powf`, not `powi`: the C library's `pow` is what Python's `**` calls.
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 steps")]
        let power = |beta: f64| beta.powf(step as f64);
        let from_grad = 1.0 - beta1 >= 0.5;
        #[expect(clippy::cast_possible_truncation, reason = "the one rounding to fp32")]
        let round = |x: f64| x as f32;
        Self {
            decay: round(1.0 - lr * weight_decay),
            lerp_coeff: round(if from_grad { -beta1 } else { 1.0 - beta1 }),
            beta2: round(beta2),
            one_minus_beta2: round(1.0 - beta2),
            bias_correction2_sqrt: round((1.0 - power(beta2)).sqrt()),
            step_size: round(lr / (1.0 - power(beta1))),
            eps: round(eps),
            grad_factor: round(if maximize { -grad_scale } else { grad_scale }),
            lerp_from_grad: u32::from(from_grad),
            clip: 1.0,
        }
    }
}
