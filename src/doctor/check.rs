//! One thing that `funicular doctor` looks at, and what it found.

use std::{ffi::OsString, path::PathBuf};

use serde::Serialize;

use crate::{device::DeviceChoice, error::Error};

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// As it should be.
    Okay,
    /// It works, less well than it could.
    Warn,
    /// It does not work.
    Fail,
}

impl Status {
    pub(super) const fn tag(self) -> &'static str {
        match self {
            Self::Okay => "[OKAY]",
            Self::Warn => "[WARN]",
            Self::Fail => "[FAIL]",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it; always there for WARN and FAIL.
    pub action: Option<String>,
}

impl Check {
    pub(super) fn okay(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), status: Status::Okay, found: found.into(), action: None }
    }

    pub(super) fn warn(name: impl Into<String>, found: impl Into<String>, action: impl Into<String>) -> Self {
        let (name, found, action) = (name.into(), found.into(), Some(action.into()));
        Self { name, status: Status::Warn, found, action }
    }

    pub(super) fn failed(name: impl Into<String>, error: &Error) -> Self {
        let action = error.next_action().unwrap_or("See docs/errors.md for this code.").to_owned();
        let found = format!("{} {}", error.code().as_str(), error.message());
        Self { name: name.into(), status: Status::Fail, found, action: Some(action) }
    }
}

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directories that are to be paged to.
    pub paths: Vec<PathBuf>,
    /// The device that is to be used.
    pub device: DeviceChoice,
    /// The command that starts this program again.
    pub relaunch: Vec<OsString>,
}
