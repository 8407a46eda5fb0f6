//! Values of options, as the user spells them.

use std::{ffi::OsString, time::Duration};

use clap::Args;

use crate::{
    device::DeviceChoice,
    io::EngineChoice,
    policy::{cli::Overlay, parse_size},
    quantities::ByteCount,
};

#[derive(Args, Clone)]
pub(super) struct Sets {
    /// Set a key over the file and the environment; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) sets: Vec<String>,
}

impl From<Sets> for Overlay {
    fn from(sets: Sets) -> Self {
        let text = |s: OsString| s.to_string_lossy().into_owned();
        Self { env: std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect(), sets: sets.sets }
    }
}

pub(super) fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let number = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    number.filter(|time| !time.is_zero()).ok_or_else(|| "a number of seconds above 0, such as 7".to_owned())
}

pub(super) fn device(text: &str) -> std::result::Result<DeviceChoice, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceChoice::Auto),
        None if text == "host" => Ok(DeviceChoice::Host),
        None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
        Some(("cuda", ordinal)) => {
            ordinal.parse().map(DeviceChoice::Cuda).map_err(|_| "cuda:N with a number N".to_owned())
        }
        _ => Err("one of auto, host, cuda, cuda:N".to_owned()),
    }
}

pub(super) fn engine(text: &str) -> std::result::Result<EngineChoice, String> {
    match text {
        "auto" => Ok(EngineChoice::Auto),
        "io_uring" => Ok(EngineChoice::IoUring),
        "threads" => Ok(EngineChoice::Threads),
        _ => Err("one of auto, io_uring, threads".to_owned()),
    }
}

pub(super) fn size(text: &str) -> std::result::Result<ByteCount, String> {
    parse_size(text).map_err(|e| e.to_string())
}
