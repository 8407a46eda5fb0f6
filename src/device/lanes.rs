//! Lanes: updates of host memory that run on the device. A lane is a stream of its own and staging memory on the device; what
//! is launched on it copies a span up, updates it there, and copies the results to their place.
//!
//! A few lanes used in turn keep both directions of the link busy: while one copies down, the next one copies up.

use std::time::Duration;

use crate::{
    dtype::{DType, StateKind},
    error::{Code, Error, Result},
    optim::{Hyper, Portion, Span, Target, unsupported},
    quantities::round_up,
};

/// Arrays start so in the staging memory: whole vectors of any kernel, whole cache lines.
const ALIGN: u64 = 256;

/// A fixed number of lanes of one device.
///
/// L1: launches on one lane run in order. L2: the bits are those of [`crate::optim::adamw`]. L3: a launch allocates nothing.
/// L4: dropping the lanes waits for what runs on them.
pub trait Lanes: Send + Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// Enqueues the update of a span on a lane; the gradient is only read.
    ///
    /// # Errors
    /// `FN-E112` for a type that is not trainable, with nothing enqueued; a failure of the device. After a failure too the lane may
    /// be busy with a part of the launch.
    ///
    /// # Safety
    /// The arrays of the span and of the target lie where [`Launch`] says, are valid and aligned as for
    /// [`crate::optim::adamw`], [`crate::optim::adamw_into_with`] and [`crate::optim::adamw_portion_with`], and stay free of conflicting access until the lane is
    /// done.
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    unsafe fn launch(&self, lane: usize, work: &Launch<'_>) -> Result<()>;

    /// Enqueues a copy on a lane: behind what was launched there, and behind nothing else. It may be made before this returns.
    ///
    /// # Errors
    /// A failure of the device.
    ///
    /// # Safety
    /// Both ranges are valid, in registered host memory or in memory of the device, and stay free of conflicting access until the lane is done.
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    unsafe fn copy(&self, lane: usize, dst: u64, src: u64, len: usize) -> Result<()>;

    /// Blocks the calling thread until everything launched on a lane has ended, or the time is over; true if it has ended.
    ///
    /// # Errors
    /// A failure of the device.
    fn block(&self, lane: usize, timeout: Duration) -> Result<bool>;
}

/// What a lane is to do.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The elements, in registered host memory but for what `above` says.
    pub span: &'a Span,
    /// Where what the portion stores goes: registered host memory, [`Target::in_place`] too, but for what `above` says. A second place lies in
    /// the device's memory.
    pub target: &'a Target,
    /// What is stored.
    pub portion: Portion,
    /// The numbers of the update.
    pub hyper: &'a Hyper,
    /// Whether masters and moments, old and new, lie in the device's memory; the old parameters do too, where the target has a second place for
    /// the new ones, unless masters are reset.
    pub above: bool,
}

/// One copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: usize,
}

/// A launch in terms of copies and of one update in staging memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Staged {
    /// The arrays that the portion reads, to staging memory; of the others no bytes. There the whole update is made: what it makes of
    /// bytes that were not copied is not copied back.
    pub(super) up: [Copy; 5],
    /// The span there, or in other memory of the device.
    pub(super) span: Span,
    /// Where its new values go: the same arrays, or others of the device.
    pub(super) to: Target,
    /// What the portion stores, to its target; parameters to a second place too, if it has one.
    pub(super) down: [Copy; 5],
}

// SAFETY: only addresses and numbers; the caller of `launch` vouched for the bytes, on any thread.
#[expect(unsafe_code, reason = "carries addresses to the thread or stream of a lane")]
unsafe impl Send for Staged {}

impl Staged {
    /// Lays a launch out in `room` bytes of staging memory at `base`.
    pub(super) fn new(work: &Launch<'_>, base: u64, room: u64) -> Result<Self> {
        let span = work.span;
        if matches!(span.dtype, DType::Opaque { .. }) {
            return Err(unsupported(span.dtype));
        }
        let mut end = base;
        let place = |kind: StateKind, src: u64| {
            let len = span.len * kind.element_size(span.dtype);
            let dst = end;
            end += round_up(len as u64, ALIGN);
            Copy { dst, src, len: if work.portion.reads(kind) { len } else { 0 } }
        };
        let staged = if work.above && work.portion == Portion::Whole {
            Self::beside_states(work, place)
        } else {
            Self::all(work, place)
        };
        if end - base > room {
            let message = format!("{} elements do not fit the {room} bytes of a lane.", span.len);
            return Err(Error::new(Code::Stale, message).action("This is a bug of funicular; please report it."));
        }
        Ok(staged)
    }

    /// All arrays pass through staging memory.
    fn all(work: &Launch<'_>, mut place: impl FnMut(StateKind, u64) -> Copy) -> Self {
        let Launch { span, target, portion, .. } = *work;
        let up = [
            place(StateKind::Param, span.param as u64),
            place(StateKind::Grad, span.grad as u64),
            place(StateKind::Master, span.master as u64),
            place(StateKind::ExpAvg, span.exp_avg as u64),
            place(StateKind::ExpAvgSq, span.exp_avg_sq as u64),
        ];
        let [param, grad, master, exp_avg, exp_avg_sq] = up;
        let back = |from: Copy, kind: StateKind, to: u64| {
            let len = if portion.stores(kind) { from.len } else { 0 };
            Copy { dst: to, src: from.dst, len }
        };
        let second = back(param, StateKind::Param, target.second as u64);
        let down = [
            back(param, StateKind::Param, target.param as u64),
            back(master, StateKind::Master, target.master as u64),
            back(exp_avg, StateKind::ExpAvg, target.exp_avg as u64),
            back(exp_avg_sq, StateKind::ExpAvgSq, target.exp_avg_sq as u64),
            Copy { len: if target.second.is_null() { 0 } else { second.len }, ..second },
        ];
        let staged = Span {
            param: param.dst as *mut u8,
            grad: grad.dst as *const u8,
            master: master.dst as *mut u8,
            exp_avg: exp_avg.dst as *mut f32,
            exp_avg_sq: exp_avg_sq.dst as *mut f32,
            ..*span
        };
        Self { up, span: staged, to: Target::in_place(&staged), down }
    }

    /// States stay where they are: only gradients and parameters pass through staging memory, so that many more elements fit.
    fn beside_states(work: &Launch<'_>, mut place: impl FnMut(StateKind, u64) -> Copy) -> Self {
        let Launch { span, target, .. } = *work;
        let none = Copy { dst: 0, src: 0, len: 0 };
        let (param, grad) = (place(StateKind::Param, span.param as u64), place(StateKind::Grad, span.grad as u64));
        let near = !target.second.is_null() && !span.reset_master;
        let from = if near { span.param } else { param.dst as *mut u8 };
        Self {
            up: [if near { none } else { param }, grad, none, none, none],
            span: Span { param: from, grad: grad.dst as *const u8, ..*span },
            to: Target { param: param.dst as *mut u8, ..*target },
            down: [Copy { dst: target.param as u64, src: param.dst, len: param.len }, none, none, none, none],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::staging_bytes, optim::AdamWOptions};

    fn span(dtype: DType, len: usize) -> Span {
        let at = |n: usize| (0x10_0000 * n) as *mut u8;
        Span {
            param: at(1),
            grad: at(2),
            master: at(3),
            exp_avg: at(4).cast(),
            exp_avg_sq: at(5).cast(),
            len,
            dtype,
            reset_master: false,
        }
    }

    /// A launch of all that an update makes, for numbers that are not looked at.
    fn staged(span: &Span, to: &Target, above: bool, base: u64, room: u64) -> Result<Staged> {
        let hyper = Hyper::new(&AdamWOptions::default(), 1, 1.0);
        Staged::new(&Launch { span, target: to, portion: Portion::Whole, hyper: &hyper, above }, base, room)
    }

    #[test]
    fn arrays_are_disjoint_aligned_and_inside() {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            for len in [1, 127, 128, 4001, 4096] {
                let span = span(dtype, len);
                let to = Target::in_place(&span);
                let staged = staged(&span, &to, false, 4096, staging_bytes(4096)).expect("fits");
                let mut end = 4096;
                for copy in staged.up {
                    assert!(copy.dst >= end && copy.dst.is_multiple_of(ALIGN));
                    end = copy.dst + copy.len as u64;
                }
                assert!(end <= 4096 + staging_bytes(4096), "{dtype:?} of {len}");
            }
            let span = span(dtype, 4096 * 8 + 1);
            let to = Target::in_place(&span);
            let refused = staged(&span, &to, false, 0, staging_bytes(4096 * 7)).expect_err("too long");
            assert_eq!(refused.code(), Code::Stale);
        }
    }

    #[test]
    fn states_of_the_device_stay_there() {
        let span = span(DType::Bf16, 4 * 4096);
        let kept = Target { second: 0x90_0000 as *mut u8, ..Target::in_place(&span) };
        let fits = staged(&span, &kept, true, 4096, staging_bytes(4096)).expect("four times as many fit");
        let bytes = span.len * 2;
        assert_eq!(
            (fits.up.map(|copy| copy.len), fits.down.map(|copy| copy.len)),
            ([0, bytes, 0, 0, 0], [bytes, 0, 0, 0, 0])
        );
        assert_eq!((fits.span.param, fits.span.exp_avg, fits.to.second), (span.param, span.exp_avg, kept.second));
        assert!(fits.to.param != span.param && fits.to.exp_avg == span.exp_avg && fits.to.master == span.master);
        let reset = Span { reset_master: true, ..span };
        let fits = staged(&reset, &kept, true, 4096, staging_bytes(4096)).expect("fits");
        assert_eq!(
            (fits.up[0].len, fits.span.param),
            (bytes, fits.to.param),
            "parameters that were edited come from home"
        );
    }
}
