//! Whether this machine can run a policy: what it names is looked for by doing it, as a run would.

use super::facts::cuda_count;
use crate::{
    error::{Code, Error},
    io::{DirectIo, EngineChoice, EngineOptions, open_engine, probe_directory},
    machine::HostLimits,
    policy::{DeviceChoice, Direct, Engine, Policy, cli::Obstacles},
};

/// What keeps this machine from running the policy.
pub fn obstacles(policy: &Policy) -> Obstacles {
    let mut found = Obstacles::default();
    device(policy, &mut found);
    match HostLimits::read() {
        Ok(limits) => {
            let asked = policy.budget.host.given();
            found.certain.extend(asked.and_then(|budget| limits.admit_budget(budget).err()));
        }
        Err(e) => found.unknown.push(e),
    }
    let direct = match policy.nvme.direct {
        Direct::Auto => DirectIo::Preferred,
        Direct::Required => DirectIo::Required,
        Direct::Off => DirectIo::Off,
    };
    found.certain.extend(policy.nvme.paths.iter().filter_map(|path| probe_directory(path, direct).err()));
    if policy.nvme.engine == Engine::IoUring && !policy.nvme.paths.is_empty() {
        let options = EngineOptions { choice: EngineChoice::IoUring, queue_depth: 4, ..EngineOptions::default() };
        found.certain.extend(open_engine(&options, Vec::new(), &[], drop).err());
    }
    found
}

/// A GPU that is named must be there; one that is not is looked for by the run.
fn device(policy: &Policy, found: &mut Obstacles) {
    let DeviceChoice::Cuda(number) = policy.device else { return };
    let number = number.unwrap_or(0);
    match cuda_count() {
        Err(e) => found.unknown.push(e),
        Ok(count) if number < count => {}
        Ok(count) => {
            let has = match count {
                0 => "this machine has no CUDA driver, or no GPU".to_owned(),
                1 => "this machine has one GPU, cuda:0".to_owned(),
                n => format!("this machine has {n} GPUs, up to cuda:{}", n - 1),
            };
            let named = if number == 0 { "cuda".to_owned() } else { format!("cuda:{number}") };
            let error = Error::new(Code::NoCuda, format!("device = \"{named}\", but {has}."));
            found.certain.push(error.action("Set device = \"auto\" or \"host\", or see funicular doctor."));
        }
    }
}
