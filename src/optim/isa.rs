//! Instruction sets chosen at run time, and the floating-point mode the kernels need.
#![expect(unsafe_code, reason = "calls functions compiled for instruction sets found at run time; sets the FP mode")]

/// An instruction set that this machine has: values come from [`Isa::available`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(pub(crate) Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// What the crate was compiled for: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The fastest one.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
            {
                return Self(Level::Avx512);
            }
            if is_x86_feature_detected!("avx2") {
                return Self(Level::Avx2);
            }
        }
        Self(Level::Baseline)
    }

    /// All that this machine has, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        let best = Self::best();
        [
            Level::Baseline,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512,
        ]
        .into_iter()
        .map(Self)
        .filter(move |isa| isa.0 as u8 <= best.0 as u8)
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }
}

/// Defines `fn name(isa, args..)`, which runs `body(args..)` compiled for `isa`. The compiler never fuses a
/// multiplication with an addition on its own, so all clones give the same bits.
macro_rules! per_isa {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path;) => {
        $(#[$meta])*
        fn $name(isa: $crate::optim::Isa, $($arg: $ty),*) $(-> $ret)? {
            use $crate::optim::Level;
            #[inline(never)]
            fn baseline($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
            match isa.0 {
                Level::Baseline => baseline($($arg),*),
                // SAFETY: an `Isa` of this level exists only where the processor has it.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}
pub(crate) use per_isa;

/// Prefetches the cache line at `at`. A hint: it faults at no address.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    // SAFETY: the instruction is part of every x86-64 and has no effect but on the cache.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// While it lives, this thread rounds to nearest and keeps subnormals. Both modes are inherited by new threads, and
/// libraries set them (`torch.set_flush_denormal`, `-ffast-math` start-up code).
pub(super) struct FloatMode {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    saved: ModeWord,
}

#[cfg(target_arch = "x86_64")]
type ModeWord = u32;
#[cfg(target_arch = "aarch64")]
type ModeWord = u64;

/// All exceptions masked, round to nearest, no flush to zero.
#[cfg(target_arch = "x86_64")]
const IEEE: ModeWord = 0x1f80;
#[cfg(target_arch = "aarch64")]
const IEEE: ModeWord = 0;

impl FloatMode {
    /// Switches this thread to the default mode.
    pub(super) fn ieee() -> Self {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        {
            let saved = read_mode();
            write_mode(IEEE);
            Self { saved }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        Self {}
    }

    /// Keeps the default mode for the rest of the thread's life.
    pub(super) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for FloatMode {
    fn drop(&mut self) {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        write_mode(self.saved);
    }
}

#[cfg(target_arch = "x86_64")]
fn read_mode() -> ModeWord {
    let mut word: ModeWord = 0;
    // SAFETY: stores the 32-bit control register to a local.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut word, options(nostack)) };
    word
}

/// Memory is a clobber of the asm: loads and stores, and so the arithmetic between them, stay on their side of it.
#[cfg(target_arch = "x86_64")]
fn write_mode(word: ModeWord) {
    // SAFETY: loads the control register with a value read from it or with the default.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const word, options(nostack)) };
}

#[cfg(target_arch = "aarch64")]
fn read_mode() -> ModeWord {
    let word: ModeWord;
    // SAFETY: reads the floating-point control register.
    unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) word, options(nostack)) };
    word
}

#[cfg(target_arch = "aarch64")]
fn write_mode(word: ModeWord) {
    // SAFETY: writes a value read from the register, or the default.
    unsafe { std::arch::asm!("msr fpcr, {}", in(reg) word, options(nostack)) };
}

#[cfg(all(test, target_arch = "x86_64"))]
pub(super) mod tests {
    use super::*;

    /// Runs `work` with flush-to-zero, denormals-are-zero and rounding towards zero set.
    pub(in crate::optim) fn in_a_hostile_mode<T>(work: impl FnOnce() -> T) -> T {
        let saved = read_mode();
        write_mode(saved | 0x8040 | 0x6000);
        let result = work();
        write_mode(saved);
        result
    }

    #[test]
    fn the_mode_is_set_and_restored() {
        let before = read_mode();
        let inside = in_a_hostile_mode(|| {
            let hostile = read_mode();
            let guard = FloatMode::ieee();
            let inside = read_mode();
            drop(guard);
            assert_eq!(read_mode() & 0xffc0, hostile & 0xffc0);
            inside
        });
        assert_eq!(inside, IEEE);
        assert_eq!(read_mode() & 0xffc0, before & 0xffc0);
    }

    #[test]
    fn the_baseline_is_always_there() {
        let all: Vec<_> = Isa::available().collect();
        assert_eq!(all[0].name(), "baseline");
        assert_eq!(*all.last().expect("one at least"), Isa::best());
    }
}
