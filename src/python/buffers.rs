//! Capsules over the memory of a unit, or over a part of it: that of one parameter.

use std::sync::Arc;

use pyo3::prelude::*;

use super::{arguments::known, dlpack, engine::Engine};
use funicular::{device::DeviceKind, error::Error};

impl Engine {
    /// A capsule over `part` (offset, length; `None`: all) of one of a unit's buffers.
    pub(super) fn buffer(
        &self,
        py: Python<'_>,
        unit: u32,
        which: &str,
        on_device: bool,
        part: Option<(u64, u64)>,
    ) -> PyResult<Py<PyAny>> {
        let (address, len, kind, owner) = self.call(py, |rt, _| {
            let id = known(rt, unit)?;
            let kind = rt.device()?.kind();
            let packed = rt.layout()?.unit(id);
            let home = rt.homes()?.unit(id);
            let device = Arc::clone(rt.device()?);
            let (address, len, owner): (u64, u64, Box<dyn std::any::Any + Send + Sync>) = match which {
                "frame" => {
                    let frames = Arc::clone(rt.frames()?);
                    (frames.address(id.index()), packed.param_bytes(), Box::new((frames, device)))
                }
                "home" => match &home.shadow {
                    Some(shadow) => (home.params, packed.param_bytes(), Box::new((Arc::clone(shadow), device))),
                    None => (home.params, packed.param_bytes(), Box::new((Arc::clone(&rt.homes()?.params), device))),
                },
                _ if home.grad_shadow.is_some() => {
                    let shadow = home.grad_shadow.as_ref().map(|of_grads| Arc::clone(&of_grads.shadow));
                    (home.grads, packed.grad_bytes(), Box::new((shadow, device)))
                }
                _ => (home.grads, packed.grad_bytes(), Box::new((Arc::clone(&rt.homes()?.grads), device))),
            };
            let (offset, wanted) = part.unwrap_or((0, len));
            if offset.checked_add(wanted).is_none_or(|end| end > len) {
                let text =
                    format!("{wanted} bytes at {offset} are not in the {len} bytes of the {which} of unit {unit}.");
                return Err(Error::argument(text));
            }
            Ok((address + offset, wanted, if on_device { kind } else { DeviceKind::Host }, owner))
        })?;
        dlpack::capsule(py, address, len, kind, owner)
    }
}
