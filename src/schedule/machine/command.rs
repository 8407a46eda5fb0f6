//! What the machine asks of its owner, and answers.

use crate::quantities::UnitId;

/// Something to be done, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read all parameters of the unit from NVMe into a page slot; answer with [`super::Machine::params_read`].
    ReadParams(UnitId),
    /// The page slot holds bytes that are no longer wanted: give it back.
    DropSlot(UnitId),
    /// Make the up stream wait until the unit's last window is over on the compute stream.
    WaitReleased(UnitId),
    /// Enqueue the copy into the unit's frames, from its page slot if its parameters live on NVMe, else from its home, or while
    /// [`super::Machine::in_spare`] from its spare copy.
    /// With a slot: answer with [`super::Machine::copied`] once the copy is over and the slot given back.
    CopyUp(UnitId),
    /// Read the states of one chunk into an update slot; answer with [`super::Machine::chunk_read`].
    ReadChunk(UnitId, u32),
    /// Update one chunk; answer with [`super::Machine::chunk_ran`], with [`super::Machine::swapped`], or with
    /// [`super::Machine::weights_ran`].
    RunChunk(UnitId, u32),
    /// Update the states of a unit whose weights are updated; answer with [`super::Machine::states_ran`].
    RunStates(UnitId),
    /// Copy the parameters from the spare copy to their home; answer with [`super::Machine::homed`].
    CopyHome(UnitId),
    /// Write one chunk's states back, then give the slot back; answer with [`super::Machine::chunk_written`].
    WriteChunk(UnitId, u32),
    /// Find out whether the step asks for what the unit's update ahead was begun from; answer with [`super::Machine::decided`].
    Decide(UnitId),
    /// Update one chunk into the unit's other places; answer with [`super::Machine::ran_ahead`].
    RunAhead(UnitId, u32),
    /// Write one chunk's states to the unit's other places, then give the slot back; answer with [`super::Machine::chunk_written`].
    WriteAhead(UnitId, u32),
    /// The slot holds a chunk that is no longer wanted: give it back.
    DropChunk(UnitId, u32),
    /// All of this rank's part of an update ahead is made, and its step taken by this rank: once all have taken it, bring this rank's parameters
    /// home; answer with [`super::Machine::brought`].
    BringOwn(UnitId),
    /// What the unit's other places hold is current from now on.
    SwapPlaces(UnitId),
    /// Read the unit's gradients into a gradient slot; answer with [`super::Machine::grads_read`].
    ReadGrads(UnitId),
    /// Wait for the end of the copies into the unit's gradient slot; answer with [`super::Machine::grads_landed`].
    SealGrads(UnitId),
    /// Write the unit's gradient slot to NVMe, then give it back; answer with [`super::Machine::grads_written`].
    WriteGrads(UnitId),
}

/// Answer to [`super::Machine::open`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The bytes are in the frames, or their copy is enqueued. The unit is held now.
    Ready,
    /// On its way; ask again after the next event.
    Pending(Wait),
    /// A held unit owns one of the frames: use the home.
    Conflict,
}

/// What a pending opening waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The unit's update.
    Update,
    /// Bytes from NVMe.
    NvmeRead,
    /// Bytes on their way to NVMe, which must be there before they are read.
    NvmeWrite,
}

/// What a caller wants of a unit's update: see [`super::Machine::promote`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// That its frames can be filled.
    Weights,
    /// That it is made as a whole.
    States,
    /// The parameters at home.
    Home,
}
