//! When torch's allocator finds no memory, it has everything given back that can be, and tries once more: runtimes are asked here.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::{
    device::DeviceKind,
    runtime::{growth::record::Why, shared::Shared},
};

/// The runtimes whose states may be in memory of a GPU, with its number.
static LIVING: Mutex<Vec<(u32, Weak<Shared>)>> = Mutex::new(Vec::new());

/// Has a runtime asked from now on, until it ends.
pub(crate) fn enlist(shared: &Arc<Shared>) {
    let DeviceKind::Cuda(number) = shared.device.kind() else { return };
    let mut living = LIVING.lock();
    living.retain(|(_, one)| one.strong_count() > 0);
    living.push((number, Arc::downgrade(shared)));
}

/// Moves everything down that is up on a GPU. What goes wrong is the failure of that runtime.
pub fn give_all(number: u32) {
    let here = |(n, one): &(u32, Weak<Shared>)| if *n == number { one.upgrade() } else { None };
    let living: Vec<Arc<Shared>> = LIVING.lock().iter().filter_map(here).collect();
    for shared in living {
        if let Err(error) = shared.all_down(Why::Asked) {
            shared.fail(error);
        }
    }
}
