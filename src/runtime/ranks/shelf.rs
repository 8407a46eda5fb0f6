//! The memory that ranks share: rank 0 makes it, the others adopt it when it fits what they have planned.

use std::{
    os::fd::RawFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use twox_hash::XxHash3_64;

use crate::{
    error::{Code, Error, Result},
    machine::began,
    memory::{HostRegion, SharedFile, SharedWords},
    model::Layout,
    policy::{Auto, DeviceChoice, Policy},
    quantities::{ByteCount, Tier, round_up},
    runtime::{
        paging::homes::Homes,
        ranks::{
            spec::RankSpec,
            together::{ALIKE, Ranks},
        },
        setup::config::Config,
    },
    schedule::{
        Placement,
        growth::Own,
        placement,
        ranks::{
            board::{self, Board, Words},
            posts::{Posts, State},
        },
    },
    store::Common,
};

/// What a board of this version begins with.
const MAGIC: u64 = u64::from_le_bytes(*b"funicul4");
/// Parts of the file begin at multiples of a huge page.
const ALIGN: u64 = 2 << 20;

/// The policy with what it left to the machine as numbers: what the other ranks plan with.
pub(crate) fn concrete(policy: &Policy, config: &Config) -> String {
    let mut concrete = policy.clone();
    concrete.budget.host = Auto::Set(config.budgets.host);
    if let Some(hbm) = config.budgets.hbm {
        concrete.budget.hbm = Auto::Set(hbm);
    }
    concrete.budget.threads = Auto::Set(config.threads);
    serde_json::to_string(&concrete).unwrap_or_default()
}

/// Refuses what several ranks cannot do yet.
pub(crate) fn check(layout: &Layout, plan: &Placement) -> Result<()> {
    let named = |which: fn(&placement::Homes) -> bool| {
        let mut homes = layout.units.iter().zip(&plan.homes);
        homes.find(|(_, home)| which(home)).map(|(unit, _)| &*unit.name)
    };
    let refused = |text: String, action: &str| Err(Error::new(Code::RanksUnsupported, text).action(action));
    let params = named(|home| home.params == Tier::Nvme);
    let grads = named(|home| home.grads == Tier::Nvme);
    for (what, key, unit) in [("parameters", "params", params), ("gradients", "gradients", grads)] {
        if let Some(unit) = unit {
            let text = format!("several ranks can have states on NVMe, and no {what} yet, as '{unit}' would.");
            let action =
                format!("Leave {key}.tier at \"auto\" or \"host\", and raise budget.host if that is too small.");
            return refused(text, &action);
        }
    }
    if let Some(unit) = named(|home| home.params == Tier::Hbm) {
        let text =
            format!("several ranks cannot keep units on the compute device yet, as optimizer.tier asks for '{unit}'.");
        return refused(text, "Leave optimizer.tier at \"auto\" or \"host\".");
    }
    Ok(())
}

/// Digests of what all ranks must have alike.
fn alike(layout: &Layout, plan: &Placement, policy: &str) -> Result<[u64; ALIKE.len()]> {
    let mut policy = Policy::from_json_str(policy, "policy")?;
    // Each rank has a device of its own.
    policy.device = DeviceChoice::Auto;
    let texts =
        [env!("CARGO_PKG_VERSION").to_owned(), format!("{layout:?}"), format!("{policy:?}"), format!("{plan:?}")];
    Ok(texts.map(|text| XxHash3_64::oneshot(text.as_bytes())))
}

/// Makes the memory, or adopts that of rank 0, and maps it; with so many words for what ranks have in common of files on NVMe, where so much was
/// free.
pub(crate) fn open(
    spec: RankSpec,
    layout: &Layout,
    plan: &Placement,
    policy: String,
    own: Option<Own>,
    (files, free): (usize, Option<ByteCount>),
) -> Result<(Homes, Ranks, Option<Common>)> {
    let board = Board::new(spec.size, layout.units.iter().map(|unit| unit.params.len()));
    let alike = alike(layout, plan, &policy)?;
    let words = round_up(board.words() as u64 * 8, ALIGN);
    let (mut made, files) = (None, files as u64 * 8);
    let homes = Homes::new(layout, plan, own, |sizes| {
        let mut at = words + round_up(files, ALIGN);
        let places = sizes.map(|bytes| {
            let place = (at, bytes);
            at += round_up(bytes, ALIGN);
            place
        });
        let file = match spec.file {
            None => lead(at, spec, alike, free)?,
            Some(number) => follow(number, at, spec, alike)?,
        };
        let map = |((at, bytes), purpose): ((u64, u64), &str)| match bytes {
            0 => HostRegion::new(ByteCount(0), purpose),
            _ => HostRegion::of_file(&file, at, ByteCount(bytes), purpose),
        };
        let [params, grads, states, spare] = places;
        let regions = [
            map((params, "parameters"))?,
            map((grads, "gradients"))?,
            map((states, "optimizer states"))?,
            map((spare, "spare copies"))?,
        ];
        made = Some(file);
        Ok(regions)
    })?;
    let Some(file) = made else { unreachable!("regions are made once") };
    let on_nvme = match files {
        0 => None,
        _ => Some(SharedWords::new(HostRegion::of_file(&file, words, ByteCount(files), "words of files")?)),
    };
    let words = SharedWords::new(HostRegion::of_file(&file, 0, ByteCount(words), "words of the ranks")?);
    let ranks = Ranks::new(spec, board, words, file, (policy, alike));
    let first = || u32::try_from(ranks.posts().process(0).0).unwrap_or(0);
    let common = on_nvme.map(|words| Common::new(words, (!spec.leads()).then(first)));
    ranks.posts().enter(std::process::id(), began(std::process::id()).unwrap_or(0));
    ranks.words.ring();
    Ok((homes, ranks, common))
}

/// What was free on NVMe when rank 0 planned, for another rank: the plan depends on it.
pub(crate) fn free_at_first(number: RawFd, size: usize) -> Result<Option<ByteCount>> {
    let file = SharedFile::adopt(number)?;
    if file.size() < Board::head(size) as u64 * 8 {
        return Ok(None); // refused later, by name
    }
    let free = Words::load(&head(&file, size)?, board::FREE);
    Ok(Some(ByteCount(free)).filter(|free| free.0 < UNKNOWN))
}

/// Where it is not known what is free.
const UNKNOWN: u64 = u64::MAX;

/// Makes the file, and writes the head of its board.
fn lead(len: u64, spec: RankSpec, alike: [u64; ALIKE.len()], free: Option<ByteCount>) -> Result<Arc<SharedFile>> {
    let file = SharedFile::create(len)?;
    let head = head(&file, spec.size)?;
    for (part, digest) in alike.into_iter().enumerate() {
        head.store(board::ALIKE + part, digest);
    }
    head.store(board::RANKS, spec.size as u64);
    head.store(board::IDENTITY, identity());
    head.store(board::FREE, free.map_or(UNKNOWN, |free| free.0));
    head.store(board::MAGIC, MAGIC);
    Ok(file)
}

/// A number that no other board of this host has now.
fn identity() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let process = std::process::id();
    let words = [u64::from(process), began(process).unwrap_or(0), COUNT.fetch_add(1, Ordering::Relaxed)];
    XxHash3_64::oneshot(format!("{words:?}").as_bytes())
}

/// Adopts the file, if rank 0 has planned the same.
fn follow(number: i32, len: u64, spec: RankSpec, alike: [u64; ALIKE.len()]) -> Result<Arc<SharedFile>> {
    let file = SharedFile::adopt(number)?;
    let strange = |what: &str| Error::argument(format!("file {number} is not what rank 0 shares: {what}."));
    if file.size() < Board::head(spec.size) as u64 * 8 {
        return Err(strange("it is too small"));
    }
    let head = head(&file, spec.size)?;
    let words = [board::MAGIC, board::RANKS].map(|at| Words::load(&head, at));
    if words != [MAGIC, spec.size as u64] {
        return Err(strange("it was made by another version, or for another number of ranks"));
    }
    let differs = (0..ALIKE.len()).find(|part| Words::load(&head, board::ALIKE + part) != alike[*part]);
    let differs = differs.or((file.size() != len).then_some(ALIKE.len() - 1));
    let Some(part) = differs else { return Ok(file) };
    let text = format!("rank {} has another {} than rank 0.", spec.rank, ALIKE[part]);
    let error =
        Error::new(Code::RanksUnlike, text).action("All ranks must offload the same model with the same policy.");
    // Rank 0 would wait for this one.
    let board = Board::new(spec.size, std::iter::empty());
    let posts = Posts { board: &board, words: &head, rank: spec.rank };
    posts.enter(std::process::id(), began(std::process::id()).unwrap_or(0));
    posts.say(&error.to_string());
    posts.set_state(State::Failed);
    head.ring();
    Err(error)
}

fn head(file: &SharedFile, ranks: usize) -> Result<SharedWords> {
    let bytes = ByteCount(Board::head(ranks) as u64 * 8);
    Ok(SharedWords::new(HostRegion::of_file(file, 0, bytes, "words of the ranks")?))
}
