//! What contradicts itself: refused, so that no key does nothing.

use super::{
    MicroBatch, Policy,
    words::{ActivationsTier, GradientsTier, OptimizerTier, ParamsTier},
};
use crate::error::{Code, Error, Result};

impl Policy {
    /// Refuses settings that contradict each other.
    ///
    /// # Errors
    /// `FN-E503` naming both keys.
    pub fn check_consistent(&self) -> Result<()> {
        if self.nvme.paths.is_empty()
            && let Some(key) = self.wants_nvme()
        {
            return Err(Error::new(Code::PolicyValue, format!("{key} is nvme, but nvme.paths is empty."))
                .action("Set nvme.paths to a directory on a local disk, such as [\"/mnt/nvme0/funicular\"]."));
        }
        if self.activations.tier == ActivationsTier::Host && self.activations.micro_batch == MicroBatch::Off {
            return Err(Error::new(
                Code::PolicyValue,
                "activations.tier is host, but activations.micro_batch is off: only the inputs of blocks that run in \
                 micro-batches are kept there.",
            )
            .action("Set activations.micro_batch to the rows of the batch that a block takes at a time."));
        }
        if !self.log.trace_steps.is_empty() && self.log.trace.is_empty() {
            return Err(Error::new(Code::PolicyValue, "log.trace_steps is set, but log.trace names no file.")
                .action("Set log.trace, such as \"trace.json\"."));
        }
        Ok(())
    }

    /// The first key that asks for NVMe by name.
    fn wants_nvme(&self) -> Option<String> {
        if self.params.tier == ParamsTier::Nvme {
            return Some("params.tier".to_owned());
        }
        if self.optimizer.tier == OptimizerTier::Nvme {
            return Some("optimizer.tier".to_owned());
        }
        if self.gradients.tier == GradientsTier::Nvme {
            return Some("gradients.tier".to_owned());
        }
        self.overrides.iter().enumerate().find_map(|(at, o)| {
            let params = o.params == Some(ParamsTier::Nvme);
            let key = if params { "params" } else { "optimizer" };
            (params || o.optimizer == Some(OptimizerTier::Nvme)).then(|| format!("override[{at}].{key}"))
        })
    }
}
