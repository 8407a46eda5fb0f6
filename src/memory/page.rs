//! The size of a page.
#![expect(unsafe_code, reason = "calls the C library")]

use std::sync::OnceLock;

/// Bytes of a page of memory, as the system says: 4096 on x86-64, up to 65,536 elsewhere.
pub fn page_size() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(|| {
        // SAFETY: takes a number and returns one.
        usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) })
            .ok()
            .filter(|size| size.is_power_of_two())
            .unwrap_or(4096)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_a_power_of_two_that_holds_a_block_of_a_disk() {
        assert!(page_size().is_power_of_two() && page_size() >= 4096);
    }
}
