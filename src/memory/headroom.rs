//! Whether there is address space left for allocations that cannot report a refusal themselves.
#![expect(unsafe_code, reason = "maps memory and unmaps it at once")]

use crate::{
    error::{Code, Error, Result},
    quantities::ByteCount,
};

/// Looks whether the system would give so many bytes of address space now. The heap ends the process where it is refused memory,
/// and so does a thread without a stack: call this before either.
///
/// # Errors
/// `FN-E204` when it would not.
pub fn headroom(bytes: ByteCount, purpose: &str) -> Result<()> {
    let refused = |errno| {
        Error::new(Code::HostAlloc, format!("the system has no {bytes} of address space left for {purpose}."))
            .errno(errno)
            .action("Raise the limit on virtual memory (ulimit -v).")
    };
    let len = usize::try_from(bytes.0).map_err(|_| refused(libc::ENOMEM))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping without access; no existing memory is touched.
    let raw = unsafe { libc::mmap(std::ptr::null_mut(), len.max(1), libc::PROT_NONE, flags, -1, 0) };
    if raw == libc::MAP_FAILED {
        return Err(refused(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOMEM)));
    }
    // SAFETY: mapped just above, and not known to other code.
    unsafe { libc::munmap(raw, len.max(1)) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_is_is_a_named_error() {
        headroom(ByteCount(1 << 20), "a test").expect("so much is there");
        assert_eq!(headroom(ByteCount(1 << 60), "a test").expect_err("too much").code(), Code::HostAlloc);
    }
}
