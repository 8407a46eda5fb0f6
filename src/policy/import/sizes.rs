//! DeepSpeed's sizes: they count elements, not bytes.

use super::{
    deepspeed::{Import, remark},
    report::Found,
    scalar::{self, Read, bytes},
};
use crate::policy::{Auto, format_size, source::Value};

impl Import<'_> {
    pub(super) fn max_in_cpu(&mut self, found: Found<'_>) {
        match scalar::count(found.node) {
            Err(fault) => self.undecided(found, fault),
            Ok(_) if self.nvme_params(found) == Some(false) => {
                self.ignored(found, "read only when the device beside it is nvme")
            }
            Ok(Read { value: 0, .. }) => self.ignored(found, "0: nothing stayed in host memory"),
            Ok(Read { value, .. }) => {
                let size = bytes(value, self.element).map_or_else(|| "no limit".to_owned(), |b| b.to_string());
                let note = format!(
                    "{value} elements ({size}) of parameters stayed in host memory before NVMe was used; params.tier = \"auto\" does that within budget.host, which covers gradients and states too"
                );
                self.undecided(found, note);
            }
        }
    }

    /// Whether the device beside a key of `offload_param` is nvme, if it is said.
    fn nvme_params(&self, found: Found<'_>) -> Option<bool> {
        let (section, _) = found.key.rsplit_once('.')?;
        let device = section.split('.').try_fold(self.root, |node, key| node.get(key))?.get("device")?;
        Some(matches!(&device.value, Value::Text(t) if t.trim().eq_ignore_ascii_case("nvme")))
    }

    pub(super) fn sub_group(&mut self, found: Found<'_>) {
        let note = match scalar::count(found.node).ok().and_then(|n| Some((n.value, bytes(n.value, 16)?))) {
            Some((n, size)) => {
                format!("{n} elements, {size} of states at a time; the update here goes by segments of its own size")
            }
            None => "the update here goes by segments of its own size".to_owned(),
        };
        self.ignored(found, note);
    }

    /// DeepSpeed's bound on what is gathered at a time. It is no budget: its default would leave most of a GPU unused.
    pub(super) fn max_live(&mut self, found: Found<'_>) {
        const DEFAULT: u64 = 1_000_000_000;
        match scalar::count(found.node) {
            Err(_) if scalar::is_auto(found.node) => self.ignored(found, "budget.hbm stays \"auto\""),
            Err(fault) => self.undecided(found, fault),
            Ok(Read { value: 0, .. }) => {
                self.ignored(found, "0: no more than is computed with; budget.hbm stays \"auto\"")
            }
            Ok(Read { value: DEFAULT, .. }) => {
                self.ignored(found, "DeepSpeed's default; budget.hbm stays \"auto\", the share of the GPU that is free")
            }
            Ok(read) => match bytes(read.value, self.element).filter(|_| read.value < DEFAULT) {
                None => self.ignored(found, "no limit below DeepSpeed's default; budget.hbm stays \"auto\""),
                Some(size) => {
                    let note = format!(
                        "less than DeepSpeed's default: budget.hbm = \"{}\" would hold parameters within as much ({} elements of {} bytes{}), and must hold the two largest units; \"auto\" uses more of the GPU",
                        format_size(size),
                        read.value,
                        self.element,
                        remark(&read)
                    );
                    self.undecided(found, note);
                }
            },
        }
    }

    pub(super) fn prefetch(&mut self, found: Found<'_>) {
        if scalar::is_auto(found.node) {
            return match self.hints.hidden_size.and_then(|h| h.checked_mul(h)).map(|hh| hh / 10 * 9 + hh % 10 * 9 / 10) {
                None => self.mapped(
                    found,
                    "prefetch.window = \"auto\" (the Hugging Face Trainer computes 0.9 * hidden_size^2 elements; give the hidden size for that number)",
                ),
                Some(elements) => self.window(found, elements, "0.9 * hidden_size^2 = "),
            };
        }
        match scalar::count(found.node) {
            Err(fault) => self.undecided(found, fault),
            Ok(Read { value: 0, .. }) => self.undecided(
                found,
                "0 turns prefetch off, often as a way around an invalidated trace; here a wrong guess is no error: leave prefetch.window at \"auto\"",
            ),
            Ok(Read { value: 50_000_000, .. }) => {
                self.ignored(found, "DeepSpeed's default; prefetch.window stays \"auto\": as far as budget.hbm has room")
            }
            Ok(read) => self.window(found, read.value, ""),
        }
    }

    fn window(&mut self, found: Found<'_>, elements: u64, formula: &str) {
        match bytes(elements, self.element) {
            None => self.mapped(found, "prefetch.window = \"auto\" (so many that it means no limit)"),
            Some(size) => {
                self.out.policy.prefetch.window = Auto::Set(size);
                let each = self.element;
                self.mapped(
                    found,
                    format!(
                        "prefetch.window = \"{}\" ({formula}{elements} elements of {each} bytes)",
                        format_size(size)
                    ),
                );
            }
        }
    }
}
