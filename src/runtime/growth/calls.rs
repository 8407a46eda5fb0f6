//! What the wrapper asks of a runtime about states in free memory of the device.

use crate::{
    error::{Error, Result},
    runtime::{
        growth::{
            record::{Record, Why},
            state::MadeUp,
        },
        handle::Runtime,
    },
};

impl Runtime {
    /// Whether states may move up at all: `budget.hbm` is auto, some live on the host, and the device can update them.
    ///
    /// # Errors
    /// When closed.
    pub fn may_grow(&self) -> Result<bool> {
        Ok(self.shared()?.growing.possible())
    }

    /// Has states move up from now on, or moves all of them down.
    ///
    /// # Errors
    /// A failure of the device, or when closed.
    pub fn let_grow(&self, on: bool) -> Result<()> {
        let shared = self.shared()?;
        if !on {
            shared.all_down(Why::Off)?;
        }
        shared.growing.turn(on);
        Ok(())
    }

    /// Has the device's memory be `capacity` bytes, of which the program and others have so many: for tests on the host device.
    ///
    /// # Errors
    /// `FN-E101` on a device that has memory of its own, or when closed.
    pub fn make_memory_up(&self, capacity: u64, others: u64) -> Result<()> {
        let shared = self.shared()?;
        if shared.device.free_memory()?.is_some() {
            return Err(Error::argument("a device with memory of its own tells how much is free."));
        }
        shared.growing.make_up(MadeUp { capacity, others });
        Ok(())
    }

    /// Moves everything down, as torch's allocator asks for when it finds no memory.
    ///
    /// # Errors
    /// A failure of the device, or when closed.
    pub fn give_memory_back(&self) -> Result<()> {
        self.shared()?.all_down(Why::Asked)
    }

    /// What moved so far.
    ///
    /// # Errors
    /// When closed.
    pub fn grown(&self) -> Result<Record> {
        Ok(self.shared()?.growing.state.lock().record.clone())
    }

    /// Bytes of the device that stay free, as far as what moves here has a say.
    ///
    /// # Errors
    /// When closed.
    pub fn growth_margin(&self) -> Result<u64> {
        Ok(self.shared()?.growing.state.lock().decide.margin())
    }
}
