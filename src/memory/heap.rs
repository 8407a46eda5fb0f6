//! The C library's heap.
#![expect(unsafe_code, reason = "calls the C library")]

/// Gives free memory of the heap back to the system: what was freed in pieces below the library's threshold stays with the
/// process otherwise, however much it is.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a size to keep and touches only memory that the library itself holds free.
    unsafe {
        libc::malloc_trim(0);
    }
}
