//! Memory that tensors lie in.

/// Keeps memory that is freed for the tensors that come next, up to 256 MiB of it. Programs call it once, at their start.
///
/// The GNU C library gives large blocks back to the system as soon as they are freed, and asks for them again at the next
/// operation; the system then zeroes page after page as they are written, which takes a fifteenth of a sparse layer's time.
/// Blocks above 32 MiB are given back all the same. Returns whether the allocator was told; others are left as they are.
#[allow(clippy::needless_return)] // of the one system
pub fn keep_freed() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;

        unsafe extern "C" {
            /// Sets a parameter of the allocator; 1 if it could.
            safe fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        /// The least block that is mapped on its own; 32 MiB is the greatest that is allowed.
        const M_MMAP_THRESHOLD: c_int = -3;
        /// What is kept at the end of the heap.
        const M_TRIM_THRESHOLD: c_int = -1;
        return mallopt(M_MMAP_THRESHOLD, 32 << 20) == 1 && mallopt(M_TRIM_THRESHOLD, 256 << 20) == 1;
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    false
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_gnu_allocator_takes_both_bounds() {
        let is_gnu = cfg!(all(target_os = "linux", target_env = "gnu"));
        assert_eq!(super::keep_freed(), is_gnu);
    }
}
