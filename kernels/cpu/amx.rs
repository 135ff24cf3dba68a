//! Tiles by AMX: Intel's matrix registers, for bf16.

use std::cell::Cell;
use std::sync::OnceLock;

use super::tiles::{Ahead, Avx512, DEPTH, Tile};

/// Tiles of two by two of AMX's registers, each of which has 16 rows and columns of sums.
///
/// A thread configures the sizes of its registers when it first adds, and [`Tiles::run`] takes them back. Nothing else that
/// uses AMX is called in between.
#[derive(Debug)]
pub struct Amx;

thread_local! {
    /// Rows that this thread's registers of rows and of sums have; none where they are not configured.
    static CONFIGURED: Cell<u8> = const { Cell::new(0) };
}

impl Amx {
    /// Rows of a register, at most, and words of each.
    const SIDE: usize = 16;
    /// Words after which sums are put down to ask for more of what is laid out next.
    const STEP: usize = 4 * Self::SIDE;

    /// Gives registers of rows and of sums so many rows, up to [`Self::SIDE`].
    ///
    /// # Safety
    /// The machine has AMX, and the process may use it.
    unsafe fn configure(rows: usize) {
        /// In the order of the instruction's operand.
        #[repr(C, align(64))]
        struct Registers {
            palette: u8,
            reserved: [u8; 15],
            /// Bytes of a row.
            widths: [[u16; 8]; 2],
            rows: [[u8; 8]; 2],
        }
        let rows = rows as u8;
        if CONFIGURED.replace(rows) == rows {
            return;
        }
        let (width, side) = (4 * Self::SIDE as u16, Self::SIDE as u8);
        let registers = Registers {
            palette: 1,
            reserved: [0; 15],
            widths: [[width; 8], [0; 8]],
            rows: [[rows, rows, rows, rows, rows, rows, side, side], [0; 8]],
        };
        // SAFETY: registers of sizes that all machines with AMX have; nothing is held in them.
        unsafe {
            std::arch::asm!(
                "ldtilecfg [{registers}]",
                registers = in(reg) &registers,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        }
    }

    /// Adds to the upper and the lower rows of `sums`, `stride` apart, the products of as many rows of `x` with a panel.
    /// Each are as many as were configured. A row that is in both is written twice, and the same.
    ///
    /// # Safety
    /// The registers are configured. There are as many rows of words and of sums, of which the latter have 32 columns, and
    /// `words` is how many the panel has and each row has at least: a multiple of [`Self::SIDE`] that is not zero.
    unsafe fn tile(
        x: [*const [f32; DEPTH]; 2],
        panel: *const [f32; 32],
        words: usize,
        sums: [*mut f32; 2],
        stride: usize,
    ) {
        // SAFETY: the caller answers for what is read and written. All sums are read before any are written.
        unsafe {
            std::arch::asm!(
                "tileloadd tmm0, [{upper_sums} + {stride}]",
                "tileloadd tmm1, [{upper_sums} + {stride} + 64]",
                "tileloadd tmm2, [{lower_sums} + {stride}]",
                "tileloadd tmm3, [{lower_sums} + {stride} + 64]",
                "2:",
                "tileloadd tmm6, [{panel} + {columns}]",
                "tileloadd tmm4, [{upper} + {depth}]",
                "tileloadd tmm7, [{panel} + {columns} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{lower} + {depth}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 64",
                "add {lower}, 64",
                "add {panel}, {block}",
                "sub {words}, {side}",
                "jnz 2b",
                "tilestored [{upper_sums} + {stride}], tmm0",
                "tilestored [{upper_sums} + {stride} + 64], tmm1",
                "tilestored [{lower_sums} + {stride}], tmm2",
                "tilestored [{lower_sums} + {stride} + 64], tmm3",
                upper = inout(reg) x[0] => _,
                lower = inout(reg) x[1] => _,
                depth = in(reg) size_of::<[f32; DEPTH]>(),
                panel = inout(reg) panel => _,
                columns = in(reg) size_of::<[f32; 32]>(),
                block = const Self::SIDE * size_of::<[f32; 32]>(),
                words = inout(reg) words => _,
                side = const Self::SIDE,
                upper_sums = in(reg) sums[0],
                lower_sums = in(reg) sums[1],
                stride = in(reg) stride * size_of::<f32>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Tile<32> for Amx {
    const PER_WORD: usize = 2;
    const WORDS: usize = Self::SIDE;
    const ROWS: usize = 2 * Self::SIDE;
    const LANES: usize = 16;

    unsafe fn add(
        x: &[[f32; DEPTH]],
        panel: &[[f32; 32]],
        sums: &mut [f32],
        stride: usize,
        next: Option<Ahead>,
    ) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

        let rows = x.len();
        assert!((1..=Self::ROWS).contains(&rows) && sums.len() >= (rows - 1) * stride + 32);
        assert!(panel.len() <= DEPTH && panel.len().is_multiple_of(Self::WORDS));
        // The lower rows are the last ones; some or all of them may be upper ones too.
        let height = rows.min(Self::SIDE);
        let lower = rows - height;
        // SAFETY: whoever chose the tile found its instructions on this machine.
        unsafe { Self::configure(height) };
        let step = if next.is_some() { Self::STEP } else { DEPTH };
        for (first, panel) in (0..).step_by(step).zip(panel.chunks(step)) {
            if let Some(next) = next {
                for line in 2 * first..2 * (first + panel.len()) {
                    // SAFETY: asking for what is not there does nothing.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(next.line(line)) };
                }
            }
            // SAFETY: there are `height` rows from both on, each with as many words as a panel may have, and sums for them.
            unsafe {
                let x = [0, lower].map(|row| x.as_ptr().add(row).cast::<f32>().add(first).cast());
                let sums = [0, lower].map(|row| sums.as_mut_ptr().add(row * stride));
                Self::tile(x, panel.as_ptr(), panel.len(), sums, stride);
            }
        }
    }

    unsafe fn turn(words: &[f32], stride: usize, panel: &mut [[f32; 32]], first: usize) {
        // SAFETY: machines with AMX have AVX-512.
        unsafe { Avx512::turn(words, stride, panel, first) };
    }
}

/// When it is dropped, the thread's registers of AMX have no sizes, and the operating system need not save them.
pub struct Released;

impl Drop for Released {
    fn drop(&mut self) {
        if CONFIGURED.take() != 0 {
            // SAFETY: the thread configured them, so there are such; nothing is held in them.
            unsafe {
                std::arch::asm!(
                    "tilerelease",
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, preserves_flags),
                );
            }
        }
    }
}

/// Whether this machine has AMX for bf16, and lets this process use it.
pub fn has_amx() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    /// Which registers the operating system saves.
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: the register that all machines with the instruction have.
        unsafe { _xgetbv(0) }
    }

    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        const SAVES: u32 = 1 << 27; // OSXSAVE
        const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
        const SIZES_AND_TILES: u64 = 1 << 17 | 1 << 18;
        __cpuid(0).eax >= 7
            && __cpuid_count(7, 0).edx & BF16_AND_TILES == BF16_AND_TILES
            && __cpuid(1).ecx & SAVES != 0
            // SAFETY: the operating system uses the instruction.
            && unsafe { saved() } & SIZES_AND_TILES == SIZES_AND_TILES
            && may_use_tiles()
    })
}

/// Asks Linux to let this process use tiles, which it must before it may.
#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let answer: isize;
    // SAFETY: a system call that neither reads nor writes memory of this process. It leaves two registers changed.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

/// Other systems have other ways to allow it, which nobody has tried here: there is no AMX.
#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}
