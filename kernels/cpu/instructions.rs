use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::amx::has_amx;

/// Which instructions the bodies for the CPU use.
///
/// The widest that this machine has, found at run time; the environment variable `VOLARY_CPU` (`plain`, `avx2` or
/// `avx512`) asks for others. Burn's own operations and matrix products choose for themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instructions {
    /// Those of the compiler's choice: SSE2 on x86-64, NEON on 64-bit ARM.
    Plain,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL besides.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A function that is compiled for each of the [`Instructions`].
pub trait Body {
    /// What it returns.
    type Output;

    /// Must be `#[inline(always)]`, as all that it calls: only then is it compiled for the instructions.
    ///
    /// - `FMA`: whether `a * b + c` is one instruction.
    fn run<const FMA: bool>(self) -> Self::Output;
}

impl Instructions {
    /// Those in use: what `VOLARY_CPU` asks for, and the widest where it asks for nothing that this machine has, which the
    /// command line refuses.
    pub fn in_use() -> Self {
        static IN_USE: OnceLock<Instructions> = OnceLock::new();
        *IN_USE.get_or_init(|| Self::wanted().unwrap_or_else(|_| Self::widest()))
    }

    /// Those that `VOLARY_CPU` asks for; the widest where it is not set.
    ///
    /// # Errors
    /// If this machine does not have them, or nobody knows them.
    pub fn wanted() -> Result<Self, String> {
        let Some(wanted) = std::env::var_os("VOLARY_CPU") else { return Ok(Self::widest()) };
        let wanted = wanted.to_string_lossy();
        let all = Self::all();
        all.iter().find(|known| known.name() == wanted).copied().ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|known| known.name()).collect();
            format!("VOLARY_CPU is `{wanted}`; this machine has {}", names.join(", "))
        })
    }

    /// Those that run here, the widest last.
    pub fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Self::Plain];
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! has {
                ($($feature:tt),*) => { $(is_x86_feature_detected!($feature))&&* };
            }
            if has!("avx2", "fma", "f16c") {
                all.push(Self::Avx2);
                if has!("avx512f", "avx512bw", "avx512dq", "avx512vl") {
                    all.push(Self::Avx512);
                }
            }
        }
        all
    }

    /// As `VOLARY_CPU` calls them.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
        }
    }

    /// What bodies use besides, where this machine has it: `avx512bf16` (pairs of bf16), `amx` (tiles of bf16) and
    /// `avx512vnni` (whole numbers).
    pub fn besides(self) -> Vec<&'static str> {
        #[cfg(target_arch = "x86_64")]
        let all = [
            ("avx512bf16", self.has_pairs()),
            ("amx", self == Self::Avx512 && has_amx()),
            ("avx512vnni", self.has_vnni()),
        ];
        #[cfg(not(target_arch = "x86_64"))]
        let all: [(&str, bool); 0] = [];
        all.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect()
    }

    /// Whether pairs of bf16 are multiplied and summed up by one of them.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_pairs(self) -> bool {
        self == Self::Avx512 && is_x86_feature_detected!("avx512bf16")
    }

    /// Whether pairs of whole numbers are multiplied and summed up by one of them.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_vnni(self) -> bool {
        self == Self::Avx512 && is_x86_feature_detected!("avx512vnni")
    }

    fn widest() -> Self {
        *Self::all().last().unwrap_or(&Self::Plain)
    }

    /// Runs a body with these instructions.
    #[inline]
    pub(crate) fn run<B: Body>(self, body: B) -> B::Output {
        match self {
            Self::Plain => body.run::<{ cfg!(target_arch = "aarch64") }>(),
            // SAFETY: `all` found the instructions on this machine.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { with_avx2(body) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { with_avx512(body) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2<B: Body>(body: B) -> B::Output {
    body.run::<true>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn with_avx512<B: Body>(body: B) -> B::Output {
    body.run::<true>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_come_last() {
        let all = Instructions::all();
        assert_eq!(all[0], Instructions::Plain);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(all.contains(&Instructions::Avx512), all.len() == 3);
        assert_eq!(Instructions::widest(), all[all.len() - 1]);
        assert!(all.contains(&Instructions::in_use()));
    }

    #[test]
    fn only_the_widest_have_something_besides() {
        for instructions in Instructions::all() {
            let besides = instructions.besides();
            #[cfg(target_arch = "x86_64")]
            if instructions == Instructions::Avx512 {
                assert_eq!(besides.contains(&"avx512vnni"), is_x86_feature_detected!("avx512vnni"));
                continue;
            }
            assert_eq!(besides, [""; 0], "{instructions:?}");
        }
    }
}
