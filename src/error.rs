//! One error type: a stable code, what happened to which thing, and what to do next.

use std::{borrow::Cow, fmt};

use crate::{text::printable_lines, units::ByteCount};

/// Result of everything that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Family of an error: decides the Python exception class it becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// A mistake in arguments or policy: `ValueError`.
    Usage,
    /// A budget that does not hold what is asked: `MemoryError`.
    Budget,
    /// Disk and file trouble: `OSError`.
    Storage,
    /// Device trouble or a broken invariant: `RuntimeError`.
    Runtime,
}

macro_rules! codes {
    ($($name:ident = $text:literal, $family:ident, $doc:literal;)*) => {
        /// Stable error codes. docs/errors.md lists them; a test keeps both in step.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $(#[doc = $doc] $name,)* }
        impl Code {
            /// All codes, in order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// `FN-E201` and the like.
            pub const fn as_str(self) -> &'static str { match self { $(Self::$name => $text,)* } }
            /// One line of explanation.
            pub const fn summary(self) -> &'static str { match self { $(Self::$name => $doc,)* } }
            /// Its family.
            pub const fn family(self) -> Family { match self { $(Self::$name => Family::$family,)* } }
        }
    };
}

codes! {
    NoCuda = "FN-E001", Runtime, "no CUDA driver, or no device of that number";
    Cuda = "FN-E002", Runtime, "a CUDA call failed";
    NoCompiler = "FN-E003", Runtime, "CUDA's run-time compiler is missing or refuses a kernel";
    Stale = "FN-E101", Runtime, "bytes of another generation than expected: a bug of funicular";
    Stuck = "FN-E102", Runtime, "nothing moved for too long; the message says what was waited for";
    Forked = "FN-E103", Runtime, "used in a forked child; the runtime belongs to its parent";
    Closed = "FN-E104", Runtime, "used after it was closed, or after an earlier failure";
    Panicked = "FN-E105", Runtime, "a worker thread panicked: a bug of funicular";
    Interrupted = "FN-E106", Runtime, "a wait was interrupted by a signal, or a signal handler asked for what it must not";
    NoThread = "FN-E107", Runtime, "the system refused a thread";
    Argument = "FN-E108", Usage, "a number or name given to the core is out of range";
    Wrapped = "FN-E110", Usage, "the model is offloaded already";
    MetaWeights = "FN-E111", Usage, "a parameter on the meta device has no weights to load";
    UnsupportedParam = "FN-E112", Usage, "a parameter's type or layout cannot be paged";
    AliasedParam = "FN-E113", Usage, "parameters share storage in a way that cannot be paged";
    NotOffloaded = "FN-E114", Usage, "the model is not offloaded";
    Moved = "FN-E115", Usage, "an offloaded parameter cannot change device, type, shape or memory";
    SparseGrad = "FN-E116", Usage, "sparse gradients are not supported";
    OptimizerOption = "FN-E117", Usage, "an optimizer option is not supported";
    LostEdit = "FN-E118", Usage, "a weight was edited where the edit cannot count";
    GradInUse = "FN-E119", Runtime, "something looks at an old gradient in a way that cannot be followed";
    BlockCut = "FN-E120", Usage, "what a block takes or gives cannot be cut along the batch";
    BlockEffect = "FN-E121", Usage, "a block in micro-batches does more than compute its outputs";
    BlockTwice = "FN-E122", Usage, "a block in micro-batches cannot be differentiated twice";
    Scripted = "FN-E123", Usage, "a TorchScript module cannot be paged";
    Captured = "FN-E126", Usage, "an offloaded model cannot be traced or exported";
    FullGraph = "FN-E127", Usage, "a function compiled with `fullgraph=True` was given an offloaded parameter or its gradient";
    OptimizerState = "FN-E130", Usage, "a state of the optimizer cannot be used by a step";
    OptimizerParam = "FN-E131", Usage, "an optimizer holds parameters without memory";
    HbmBudget = "FN-E201", Budget, "the compute tier's budget is too small";
    HostBudget = "FN-E202", Budget, "the host budget is too small";
    NvmeBudget = "FN-E203", Budget, "the NVMe budget is too small";
    HostAlloc = "FN-E204", Budget, "the system refused memory";
    ReadBudget = "FN-E205", Budget, "reading parameters or optimizer states outside of a step needs more host memory than is allowed";
    IoFailed = "FN-E301", Storage, "a read or write failed";
    Corrupted = "FN-E302", Storage, "bytes read are not the bytes written";
    CheckpointSpace = "FN-E401", Storage, "not enough free space for a checkpoint";
    CheckpointExists = "FN-E402", Usage, "a checkpoint would replace what is there";
    CheckpointWrite = "FN-E403", Storage, "a checkpoint cannot be written there";
    CheckpointMissing = "FN-E404", Usage, "there is no checkpoint at that path";
    CheckpointVersion = "FN-E405", Usage, "a checkpoint of another version of the format";
    CheckpointDamaged = "FN-E406", Storage, "a checkpoint is not what was written";
    CheckpointMismatch = "FN-E407", Usage, "a checkpoint of another model or optimizer";
    CheckpointValue = "FN-E408", Usage, "something cannot be part of a checkpoint";
    CheckpointMemory = "FN-E409", Budget, "saving or loading needs more host memory than is left of the budget";
    CheckpointPartial = "FN-E410", Runtime, "a load failed halfway, and the model holds parts of two states";
    CheckpointChanged = "FN-E411", Runtime, "something was changed while it was being saved";
    CheckpointCancelled = "FN-E412", Runtime, "a save was given up";
    PolicySyntax = "FN-E501", Usage, "the policy file cannot be parsed";
    PolicyKey = "FN-E502", Usage, "unknown key in the policy";
    PolicyValue = "FN-E503", Usage, "a value in the policy is not of the right kind";
    PolicyFile = "FN-E504", Usage, "the policy file cannot be read";
    ImportFormat = "FN-E507", Usage, "a configuration of another system in a format that is not known";
    EngineUnavailable = "FN-E601", Storage, "the requested I/O engine does not work here";
    NoDirectIo = "FN-E602", Storage, "direct I/O was required and does not work here";
    NotADisk = "FN-E603", Usage, "an NVMe path is in memory, not on a disk";
    PathUnusable = "FN-E604", Usage, "an NVMe path is missing or cannot be written";
    DiskFull = "FN-E605", Storage, "not enough free space on an NVMe path";
    OutputFile = "FN-E606", Storage, "a file to be written exists and is not ours, or cannot be written";
}

/// What went wrong. `Display` gives one line: code, message, next action. Names and values in it come from files and
/// arguments: control characters are escaped here, once for all messages.
#[derive(Clone, Debug)]
pub struct Error {
    code: Code,
    message: String,
    action: Option<Box<str>>,
    errno: Option<i32>,
    /// 0: not known. Errors stay small: they travel beside what they return.
    needs: u64,
}

impl Error {
    /// An error with its code and what happened, naming the thing.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: safe(message.into()), action: None, errno: None, needs: 0 }
    }

    /// What the user can do about it; a full sentence.
    #[must_use]
    pub fn action(mut self, action: impl Into<String>) -> Self {
        self.action = Some(safe(action.into()).into_boxed_str());
        self
    }

    /// The operating system's error number behind it.
    #[must_use]
    pub fn errno(mut self, errno: i32) -> Self {
        self.errno = Some(errno);
        self
    }

    /// One more sentence on what happened.
    #[must_use]
    pub fn because(mut self, sentence: &str) -> Self {
        self.message = format!("{} {}", self.message, printable_lines(sentence));
        self
    }

    /// A number or name of the caller that is out of range.
    pub fn argument(message: impl Into<String>) -> Self {
        Self::new(Code::Argument, message)
    }

    /// The least size of the budget that would do, where one was too small.
    #[must_use]
    pub fn needing(mut self, needs: ByteCount) -> Self {
        self.needs = needs.0;
        self
    }

    /// The least size of the budget that would do, if that is known.
    pub fn needs(&self) -> Option<ByteCount> {
        (self.needs > 0).then_some(ByteCount(self.needs))
    }

    /// What happened, without code and next action.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What the user can do about it.
    pub fn next_action(&self) -> Option<&str> {
        self.action.as_deref()
    }

    /// True if it says the same: an error that is reported again.
    pub fn same(&self, other: &Self) -> bool {
        self.code == other.code && self.message == other.message
    }

    /// Its code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The operating system's error number, if there was one.
    pub fn os_error(&self) -> Option<i32> {
        self.errno
    }
}

fn safe(text: String) -> String {
    match printable_lines(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(escaped) => escaped,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.code.as_str(), self.message)?;
        if let Some(action) = &self.action {
            write!(f, " {action}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique() {
        let mut seen = std::collections::HashSet::new();
        for code in Code::ALL {
            assert!(seen.insert(code.as_str()), "{} twice", code.as_str());
        }
    }

    #[test]
    fn no_message_reaches_a_terminal_as_a_command() {
        let e = Error::new(Code::PolicyKey, "key 'a\x1b[2J'\n    1 | a").because("b\x07").action("See \u{9b}c.");
        assert_eq!(e.to_string(), "FN-E502 key 'a\\u001b[2J'\n    1 | a b\\u0007 See \\u009bc.");
        assert_eq!(e.message(), "key 'a\\u001b[2J'\n    1 | a b\\u0007");
    }

    #[test]
    fn shows_code_message_action() {
        let e = Error::new(Code::DiskFull, "/mnt/a: need 2 GiB, 1 GiB free.").action("Free some space.");
        assert_eq!(e.to_string(), "FN-E605 /mnt/a: need 2 GiB, 1 GiB free. Free some space.");
    }
}
