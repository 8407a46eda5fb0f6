//! A CUDA device through the driver's own interface, in the primary context that torch uses too.
//!
//! Owns the registered regions. Taken down in the order copies, registrations, streams, context; frames hold what they
//! need themselves. No call of the data path allocates, frees, or waits for the device.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

mod driver;
mod frames;
mod kernels;
mod lanes;
mod marks;
mod means;
mod nvrtc;
mod streams;

use std::{
    ffi::{CStr, c_char, c_int},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use cudarc::driver::sys::{CU_MEMHOSTREGISTER_DEVICEMAP, CU_MEMHOSTREGISTER_PORTABLE, CUdevice_attribute};
use parking_lot::Mutex;

use self::{
    driver::{Context, Driver},
    frames::CudaFrames,
    kernels::Kernels,
    lanes::CudaLanes,
    marks::Marks,
    means::Means,
    streams::Streams,
};
use crate::{
    device::{Device, DeviceKind, Elapsed, FrameSpan, Frames, Gate, Lanes, Mark, StreamRef, check_ring},
    error::{Code, Error, Result},
    memory::HostRegion,
    optim::{Hyper, MeanPart, Span, Target},
    quantities::{ByteCount, round_up},
};

pub use nvrtc::search as search_compiler;

/// How many devices there are; 0 without a driver.
///
/// # Errors
/// `FN-E002` when there is a driver and it does not start.
pub fn count() -> Result<u32> {
    match Driver::get() {
        Ok(driver) => driver.count(),
        Err(e) if e.code() == Code::NoCuda => Ok(0),
        Err(e) => Err(e),
    }
}

/// The device's link to the host, as the system describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcieLink {
    /// The fastest rate of a lane, such as `32.0 GT/s PCIe`.
    pub speed: String,
    /// The most lanes.
    pub width: u32,
    /// The rate negotiated now; an idle device may have slowed its link down.
    pub current_speed: String,
    /// The lanes negotiated.
    pub current_width: u32,
    /// The memory node it is attached to, if the system has several.
    pub numa_node: Option<u32>,
    /// Its place on the bus, such as `0000:65:00.0`.
    pub bus: String,
}

/// What a device is.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its name, such as `NVIDIA H200`.
    pub name: String,
    /// All its memory.
    pub total: ByteCount,
    /// Memory that no process has taken yet.
    pub free: ByteCount,
    /// Its link, if the system tells.
    pub pcie: Option<PcieLink>,
    /// The newest CUDA the driver supports: major and minor version.
    pub driver: (u32, u32),
}

/// Describes a device. Makes its primary context for the duration of the call if this process has none.
///
/// # Errors
/// `FN-E001` without a driver or a device of that number, `FN-E002` when the driver fails.
pub fn device_info(ordinal: u32) -> Result<DeviceInfo> {
    let context = Context::retain(ordinal)?;
    let (driver, device) = (context.driver, context.device);
    let mut text: [c_char; 256] = [0; 256];
    let len = text.len() as c_int;
    // SAFETY: writes at most `len` bytes, a terminator included.
    context.check(unsafe { driver.cuDeviceGetName(text.as_mut_ptr(), len, device) })?;
    let name = to_string(&text);
    // SAFETY: as above.
    let bus = unsafe { driver.cuDeviceGetPCIBusId(text.as_mut_ptr(), len, device) }.ok().map(|()| to_string(&text));
    let mut total = 0;
    // SAFETY: writes one integer.
    context.check(unsafe { driver.cuDeviceTotalMem_v2(&raw mut total, device) })?;
    let mut version = 0;
    // SAFETY: writes one integer.
    context.check(unsafe { driver.cuDriverGetVersion(&raw mut version) })?;
    let version = version.unsigned_abs();
    Ok(DeviceInfo {
        name,
        total: ByteCount(total as u64),
        free: ByteCount(context.memory()?.0),
        pcie: bus.and_then(|bus| pcie_link(&bus)),
        driver: (version / 1000, version % 1000 / 10),
    })
}

fn to_string(text: &[c_char; 256]) -> String {
    let bytes = text.map(c_char::cast_unsigned);
    CStr::from_bytes_until_nul(&bytes).map_or_else(|_| String::new(), |text| text.to_string_lossy().into_owned())
}

fn pcie_link(bus: &str) -> Option<PcieLink> {
    let folder = std::path::Path::new("/sys/bus/pci/devices").join(bus.to_lowercase());
    let read = |file| std::fs::read_to_string(folder.join(file)).ok();
    Some(PcieLink {
        speed: read("max_link_speed")?.trim().to_owned(),
        width: read("max_link_width")?.trim().parse().ok()?,
        current_speed: read("current_link_speed")?.trim().to_owned(),
        current_width: read("current_link_width")?.trim().parse().ok()?,
        numa_node: read("numa_node").and_then(|text| text.trim().parse().ok()),
        bus: bus.to_lowercase(),
    })
}

/// One GPU.
pub struct CudaDevice {
    streams: Arc<Streams>,
    marks: Marks,
    granularity: u64,
    kernels: OnceLock<Result<Arc<Kernels>>>,
    means: OnceLock<Result<Means>>,
    regions: Mutex<Vec<Arc<HostRegion>>>,
}

impl CudaDevice {
    /// Opens the device of this ordinal.
    ///
    /// # Errors
    /// `FN-E001` without a driver or a device of that number, `FN-E002` when the driver fails.
    pub fn new(ordinal: u32) -> Result<Self> {
        let context = Context::retain(ordinal)?;
        let mapping = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED;
        if context.attribute(mapping)? == 0 {
            let message = format!("CUDA device {ordinal} cannot map memory at addresses of the program's choice.");
            return Err(Error::new(Code::Cuda, message).action(
                "Use a GPU of the Volta generation or later on bare \
                metal, or a virtual GPU with unified memory enabled.",
            ));
        }
        let granularity = frames::granularity(&context)?;
        let marks = Marks::new(Arc::clone(&context))?;
        Ok(Self {
            streams: Streams::new(context)?,
            marks,
            granularity,
            kernels: OnceLock::new(),
            means: OnceLock::new(),
            regions: Mutex::default(),
        })
    }

    fn context(&self) -> &Context {
        &self.streams.context
    }

    fn kernels(&self) -> Result<&Arc<Kernels>> {
        let load = || Kernels::load(&self.streams.context).map(Arc::new);
        self.kernels.get_or_init(load).as_ref().map_err(Error::clone)
    }

    fn means(&self) -> Result<&Means> {
        self.means.get_or_init(|| Means::load(&self.streams.context)).as_ref().map_err(Error::clone)
    }
}

impl Device for CudaDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Cuda(self.context().ordinal)
    }

    fn free_memory(&self) -> Result<Option<ByteCount>> {
        Ok(Some(ByteCount(self.context().memory()?.0)))
    }

    fn granularity(&self) -> u64 {
        self.granularity
    }

    fn create_frames(&self, ring_chunks: u32, chunk_bytes: u64, spans: &[FrameSpan]) -> Result<Arc<dyn Frames>> {
        check_ring(self.granularity, ring_chunks, chunk_bytes, spans)?;
        Ok(Arc::new(CudaFrames::create(Arc::clone(&self.streams), ring_chunks, chunk_bytes, spans)?))
    }

    fn register(&self, region: &Arc<HostRegion>) -> Result<()> {
        let mut regions = self.regions.lock();
        if regions.iter().any(|known| Arc::ptr_eq(known, region)) {
            return Ok(());
        }
        // The driver would take the pages on one processor.
        region.touch_all();
        let context = self.context();
        let _entered = context.enter()?;
        let (address, flags) = (region.as_ptr().cast(), CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
        // One registration: a copy across the border of two would be refused.
        // SAFETY: the region is mapped whole and is kept alive below until it is unregistered.
        unsafe { context.driver.cuMemHostRegister_v2(address, region.len(), flags) }.map_err(|failure| {
            let bytes = ByteCount(region.len() as u64);
            let cause = context.check(Err(failure)).map_or_else(|e| e.to_string(), |()| String::new());
            Error::new(Code::Cuda, format!("could not page-lock {bytes} of host memory: {cause}"))
                .action("Lower budget.host, or raise the container's memory limit and `ulimit -l`.")
        })?;
        regions.push(Arc::clone(region));
        let mut seen = 0;
        // SAFETY: writes one address.
        context.check(unsafe { context.driver.cuMemHostGetDevicePointer_v2(&raw mut seen, address, 0) })?;
        if seen != region.as_ptr() as u64 {
            let message = format!("the device sees host memory of {:p} at {seen:#x}.", region.as_ptr());
            return Err(Error::new(Code::Cuda, message).action(
                "Homes need one address on both sides; use a 64-bit Linux \
                system with unified addressing.",
            ));
        }
        Ok(())
    }

    unsafe fn expose(&self, address: u64, len: usize) -> Result<()> {
        let context = self.context();
        let _entered = context.enter()?;
        let flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the caller keeps the range mapped until `hide`.
        context.check(unsafe { context.driver.cuMemHostRegister_v2(address as *mut _, len, flags) })
    }

    fn hide(&self, address: u64) -> Result<()> {
        let context = self.context();
        let _entered = context.enter()?;
        // SAFETY: registered by `expose`.
        context.check(unsafe { context.driver.cuMemHostUnregister(address as *mut _) })
    }

    unsafe fn copy(&self, stream: StreamRef, dst: u64, src: u64, len: usize) -> Result<()> {
        let context = self.context();
        let _entered = context.enter()?;
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the caller vouches for both ranges; the stream is alive.
        context.check(unsafe { context.driver.cuMemcpyAsync(dst, src, len, self.streams.handle(stream)) })
    }

    unsafe fn fill(&self, stream: StreamRef, dst: u64, byte: u8, len: usize) -> Result<()> {
        let context = self.context();
        let _entered = context.enter()?;
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the caller vouches for the range; the stream is alive.
        context.check(unsafe { context.driver.cuMemsetD8Async(dst, byte, len, self.streams.handle(stream)) })
    }

    fn prepare_updates(&self) -> Result<()> {
        self.kernels().map(|_| ())
    }

    unsafe fn adamw(&self, stream: StreamRef, span: &Span, hyper: &Hyper) -> Result<()> {
        // SAFETY: passed on to the caller; the stream is alive.
        unsafe { self.kernels()?.adamw(self.streams.handle(stream), span, &Target::in_place(span), hyper) }
    }

    fn prepare_means(&self) -> Result<()> {
        self.means().map(|_| ())
    }

    unsafe fn mean(&self, stream: u64, parts: &[MeanPart], ranks: usize) -> Result<()> {
        // SAFETY: passed on to the caller; the stream is alive.
        unsafe { self.means()?.enqueue(self.streams.handle(StreamRef::Compute(stream)), parts, ranks) }
    }

    fn create_lanes(&self, count: usize, bytes_each: u64) -> Result<Arc<dyn Lanes>> {
        let kernels = Arc::clone(self.kernels()?);
        let bytes_each = round_up(bytes_each.max(1), self.granularity);
        Ok(Arc::new(CudaLanes::create(Arc::clone(&self.streams), kernels, count, bytes_each)?))
    }

    fn record(&self, stream: StreamRef) -> Result<Gate> {
        self.streams.record(stream)
    }

    fn wait(&self, stream: StreamRef, gate: Gate) -> Result<()> {
        self.streams.wait(stream, gate)
    }

    fn passed(&self, gate: Gate) -> Result<bool> {
        self.streams.passed(gate)
    }

    fn block(&self, gate: Gate, timeout: Duration) -> Result<bool> {
        // A time beyond the clock's range is no limit.
        self.streams.block(gate, Instant::now().checked_add(timeout))
    }

    fn mark(&self, stream: StreamRef) -> Result<Mark> {
        self.marks.make(self.streams.handle(stream))
    }

    fn elapsed(&self, from: Mark, to: Mark) -> Result<Elapsed> {
        self.marks.elapsed(from, to)
    }

    unsafe fn meet(&self, stream: StreamRef, value: u64, mine: u64, others: &[u64]) -> Result<bool> {
        // SAFETY: passed on to the caller.
        unsafe { self.streams.meet(stream, value, mine, others) }
    }

    fn drain(&self) {
        self.streams.drain();
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        self.streams.drain();
        let context = self.context();
        // A lost context has lost its registrations too.
        let Ok(_entered) = context.enter() else { return };
        for region in self.regions.lock().iter() {
            // SAFETY: registered once in `register`; the copies are done. `drop` cannot return a failure.
            let _ = context.check(unsafe { context.driver.cuMemHostUnregister(region.as_ptr().cast()) });
        }
    }
}
