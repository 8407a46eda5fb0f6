//! The words that a policy may use, one enum for each key that takes words.

use serde::{Deserialize, Serialize};

/// An enum whose variants are words of the policy file.
macro_rules! words {
    ($($(#[$meta:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $text:literal,)* })*) => { $(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$of])* #[serde(rename = $text)] $variant,)* }
        impl $name {
            /// Its words, in the order of the variants.
            pub const WORDS: &'static [&'static str] = &[$($text),*];
            /// The word of the policy file.
            pub const fn word(self) -> &'static str { match self { $(Self::$variant => $text,)* } }
        }
    )* };
}

words! {
    /// Which I/O engine moves bytes between files and memory.
    Engine {
        /// io_uring if it works here, else threads.
        #[default] Auto = "auto",
        /// io_uring, or an error.
        IoUring = "io_uring",
        /// A pool of threads with positional reads and writes.
        Threads = "threads",
    }
    /// Whether files are opened for direct I/O.
    Direct {
        /// Where the file system takes it.
        #[default] Auto = "auto",
        /// Always; an error where it does not work.
        Required = "required",
        /// Never: through the page cache.
        Off = "off",
    }
    /// Home of the parameters.
    ParamsTier {
        /// What fits, host first.
        #[default] Auto = "auto",
        /// Page-locked host memory.
        Host = "host",
        /// Files on NVMe drives.
        Nvme = "nvme",
    }
    /// Number format of floating-point parameters.
    ParamsDtype {
        /// The model's own.
        #[default] Keep = "keep",
        /// 32 bits.
        Float32 = "float32",
        /// The upper 16 bits of those.
        Bfloat16 = "bfloat16",
        /// IEEE 754's 16 bits.
        Float16 = "float16",
    }
    /// Home of the optimizer's states.
    OptimizerTier {
        /// What fits, fastest first.
        #[default] Auto = "auto",
        /// Memory of the compute device.
        Hbm = "hbm",
        /// Page-locked host memory.
        Host = "host",
        /// Files on NVMe drives.
        Nvme = "nvme",
    }
    /// Home of the gradients of what is paged.
    GradientsTier {
        /// Host memory, and NVMe only where nothing else makes the model fit.
        #[default] Auto = "auto",
        /// Page-locked host memory.
        Host = "host",
        /// Files on NVMe drives.
        Nvme = "nvme",
    }
    /// Which processor updates parameters whose home is the host or NVMe.
    UpdateOn {
        /// Both, as fast as each is.
        #[default] Auto = "auto",
        /// The processor.
        Cpu = "cpu",
        /// The GPU, through which the states pass.
        Gpu = "gpu",
    }
    /// Where activations wait for their backward.
    ActivationsTier {
        /// Memory of the compute device.
        #[default] Hbm = "hbm",
        /// Page-locked host memory.
        Host = "host",
    }
    /// How much is logged.
    Level {
        /// Everything.
        Debug = "debug",
        /// Facts worth a line.
        #[default] Info = "info",
        /// What costs speed or may go wrong.
        Warning = "warning",
        /// What did go wrong.
        Error = "error",
    }
    /// What to do when a budget does not hold what the tiers ask for.
    Pressure {
        /// Place what does not fit one tier lower, and go on.
        Demote = "demote",
        /// Stop with an error that names the budget.
        #[default] Refuse = "refuse",
    }
}
