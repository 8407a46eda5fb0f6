//! One error type: a stable code, what happened to which thing, and what to do next.

mod codes;

use std::{borrow::Cow, fmt};

pub use codes::{Code, Entry, Family, entries};

use crate::{quantities::ByteCount, text::printable_lines};

/// Result of everything that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. `Display` gives code, message and next action: one line, or more where a file is quoted. Names and values in it come from files and
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

    /// The operating system's error number behind it, if there is one.
    #[must_use]
    pub fn errno(mut self, errno: impl Into<Option<i32>>) -> Self {
        self.errno = errno.into();
        self
    }

    /// One more sentence on what happened.
    #[must_use]
    pub fn because(mut self, sentence: &str) -> Self {
        self.message = safe(format!("{} {}", self.message, printable_lines(sentence)));
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

/// Bytes of a message; a file's value that is quoted can have any length.
const LONGEST: usize = 16 << 10;

fn safe(text: String) -> String {
    let text = match printable_lines(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(escaped) => escaped,
    };
    if text.len() <= LONGEST {
        return text;
    }
    let (begin, end) = (text.floor_char_boundary(LONGEST / 2), text.ceil_char_boundary(text.len() - LONGEST / 2));
    format!("{} [{} bytes left out] {}", &text[..begin], end - begin, &text[end..])
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.code.as_str(), self.message)?;
        match &self.action {
            None => Ok(()),
            // A message that ends with the lines of a file that it quotes.
            Some(action) if self.message.contains('\n') => write!(f, "\n{action}"),
            Some(action) if self.message.ends_with(['.', '?', '!', ':']) => write!(f, " {action}"),
            Some(action) => write!(f, ". {action}"),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique() {
        let mut seen = std::collections::HashSet::new();
        for entry in entries() {
            assert!(seen.insert(entry.code), "{} twice", entry.code);
        }
    }

    #[test]
    fn no_message_reaches_a_terminal_as_a_command() {
        let e = Error::new(Code::PolicyKey, "key 'a\x1b[2J'\n    1 | a").because("b\x07").action("See \u{9b}c.");
        assert_eq!(e.to_string(), "FN-E502 key 'a\\u001b[2J'\n    1 | a b\\u0007\nSee \\u009bc.");
        assert_eq!(e.message(), "key 'a\\u001b[2J'\n    1 | a b\\u0007");
    }

    #[test]
    fn a_message_has_an_end() {
        let e = Error::new(Code::Corrupted, format!("begins {} ends.", "\u{e9}".repeat(100_000)));
        let (begin, end) = (e.message().get(..7), e.message().ends_with(" ends."));
        assert_eq!((begin, end), (Some("begins "), true));
        assert!(e.message().contains("bytes left out] "), "{e}");
        assert!(e.message().len() < LONGEST + 100, "{}", e.message().len());
    }

    #[test]
    fn shows_code_message_action() {
        let e = Error::new(Code::DiskFull, "/mnt/a: need 2 GiB, 1 GiB free.").action("Free some space.");
        assert_eq!(e.to_string(), "FN-E605 /mnt/a: need 2 GiB, 1 GiB free. Free some space.");
        let e = Error::new(Code::PolicyKey, "unknown key 'a'").action("Write b.");
        assert_eq!(e.to_string(), "FN-E502 unknown key 'a'. Write b.");
    }
}
