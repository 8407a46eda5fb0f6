//! One body of expectations, run over every device there is.
//!
//! Without a CUDA driver the CUDA half is absent; the test `cuda_is_tested_or_said_to_be_skipped` says so.
//! `FUNICULAR_REQUIRE_CUDA=1` makes that a failure. The binary runs on its own: it reads no files of the source tree.

mod bench;
#[cfg(feature = "cuda")]
mod cuda;
mod frames;
mod gates;
mod lanes;
mod lifetime;
mod marks;
mod means;
mod programs;
mod updates;

use std::{io::Write, sync::Arc};

use funicular::{
    device::{self, Device, DeviceChoice, DeviceKind},
    error::Code,
};

fn cuda_present() -> bool {
    #[cfg(feature = "cuda")]
    let present = device::cuda::count().expect("the driver starts") > 0;
    #[cfg(not(feature = "cuda"))]
    let present = false;
    present
}

/// Runs `body` on every device of this machine.
fn on_every_device(body: impl Fn(Arc<dyn Device>)) {
    body(device::open(DeviceChoice::Host).expect("the host device opens"));
    if cuda_present() {
        body(device::open(DeviceChoice::Cuda(0)).expect("the CUDA device opens"));
    }
}

#[test]
fn cuda_is_tested_or_said_to_be_skipped() {
    // Straight to the stream: what a macro prints is hidden when the test passes.
    let mut out = std::io::stderr();
    if cuda_present() {
        let device = device::open(DeviceChoice::Auto).expect("opens");
        assert_eq!(device.kind(), DeviceKind::Cuda(0), "Auto takes the GPU");
        #[cfg(feature = "cuda")]
        writeln!(out, "cuda: tested on {:?}", device::cuda::device_info(0).expect("described")).expect("written");
        return;
    }
    assert!(std::env::var_os("FUNICULAR_REQUIRE_CUDA").is_none(), "FUNICULAR_REQUIRE_CUDA is set and there is no GPU");
    assert_eq!(device::open(DeviceChoice::Auto).expect("opens").kind(), DeviceKind::Host);
    writeln!(out, "cuda: skipped, no driver").expect("written");
}

#[test]
fn a_missing_cuda_device_is_a_named_error() {
    let e = device::open(DeviceChoice::Cuda(1000)).err().expect("no such device");
    assert_eq!(e.code(), Code::NoCuda, "{e}");
}
