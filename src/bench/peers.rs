//! The processes of one host that measure at once: how rank 0 and the others meet, and what they tell each other.
//!
//! Each of the others has a socket to rank 0. R1: every wait ends: with what was waited for, with the end of the other process, with an
//! interruption, or after [`PATIENCE`]. R2: a process that fails says why before it ends. R3: only processes of the same user are listened to.

use std::{
    cell::RefCell,
    io::{BufRead, BufReader, ErrorKind, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    bench::{Interrupt, stats::Round},
    device::{DeviceChoice, DeviceKind},
    doctor::facts,
    error::{Code, Error, Result},
};

/// How long a rank waits for another one that says nothing.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a wait looks for an interruption.
const LOOK: Duration = Duration::from_millis(20);

/// Which of the processes this is, as `torchrun` says it in the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    rank: usize,
    size: u32,
    local: u32,
    /// The name under which rank 0 is found.
    name: String,
}

impl Place {
    /// That of this process; none for one that is alone.
    ///
    /// # Errors
    /// `FN-E704` for ranks of several hosts, and for numbers that are none.
    pub fn here() -> Result<Option<Self>> {
        Self::of(|name| std::env::var(name).ok())
    }

    fn of(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<u32>> {
            let Some(text) = get(name) else { return Ok(None) };
            text.parse().map(Some).map_err(|_| refused(format!("the variable {name} is '{text}', which is no number.")))
        };
        if get("RANK").is_none() || get("WORLD_SIZE").is_none() {
            return Ok(None);
        }
        let (rank, size) = (number("RANK")?.unwrap_or(0), number("WORLD_SIZE")?.unwrap_or(1));
        if size < 2 {
            return Ok(None);
        }
        let here = number("LOCAL_WORLD_SIZE")?.unwrap_or(size);
        if here != size {
            return Err(refused(format!(
                "ranks of several hosts: of {size} (WORLD_SIZE) only {here} (LOCAL_WORLD_SIZE) are on this one."
            )));
        }
        if rank >= size {
            return Err(refused(format!("RANK is {rank}, and WORLD_SIZE {size}.")));
        }
        let part = |name: &str| -> String {
            let text = get(name).unwrap_or_default();
            text.chars().filter(char::is_ascii_alphanumeric).take(32).collect()
        };
        let parts = ["MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"].map(part).join("-");
        let name = format!("funicular-bench-{}-{parts}", rustix::process::getuid().as_raw());
        Ok(Some(Self { rank: rank as usize, size, local: number("LOCAL_RANK")?.unwrap_or(rank), name }))
    }

    /// How many there are.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Whether this is rank 0, which prints and saves.
    pub fn leads(&self) -> bool {
        self.rank == 0
    }

    /// The device of this rank.
    ///
    /// # Errors
    /// `FN-E704` for one GPU that all would share.
    pub fn device(&self, choice: DeviceChoice) -> Result<DeviceChoice> {
        match (choice, facts::chosen(choice)?) {
            (DeviceChoice::Cuda(n), _) => Err(refused(format!("--device cuda:{n} for all of {} ranks.", self.size))),
            (_, DeviceKind::Cuda(_)) => Ok(DeviceChoice::Cuda(self.local)),
            (_, DeviceKind::Host) => Ok(DeviceChoice::Host),
        }
    }
}

fn refused(text: String) -> Error {
    Error::new(Code::RanksUnsupported, text).action(
        "Start it on one host: torchrun --nproc-per-node N -m funicular bench. Each rank takes the GPU of LOCAL_RANK, or all --device host. For \
         one process unset RANK.",
    )
}

/// What goes over a socket, a line each.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// The first of each of the others.
    Hello { rank: usize, size: u32, version: String },
    /// Everything is set up; these hops can be measured.
    Ready(Vec<String>),
    /// Rank 0 is at something else that takes its time.
    Busy(String),
    /// Measure the hop of this number, for so long, now.
    Measure(usize, Duration),
    /// What it gave.
    Measured(Round),
    /// Nothing else will be measured.
    End,
    /// Ticks of the processor that a rank used.
    Used(u64),
    /// The sender ends, and why.
    Failed(String),
}

/// Another rank.
struct Peer {
    rank: usize,
    pid: i32,
    stream: RefCell<BufReader<UnixStream>>,
}

impl Peer {
    fn new(rank: usize, stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let other = rustix::net::sockopt::socket_peercred(&stream)?;
        if other.uid != rustix::process::getuid() {
            return Err(std::io::Error::new(ErrorKind::PermissionDenied, "a process of another user"));
        }
        Ok(Self { rank, pid: other.pid.as_raw_pid(), stream: RefCell::new(BufReader::new(stream)) })
    }

    fn name(&self) -> String {
        format!("rank {} (process {})", self.rank, self.pid)
    }

    fn send(&self, message: &Message) -> Result<()> {
        let line = serde_json::to_string(message).map_err(|e| self.lost(&format!("cannot be told anything: {e}")))?;
        let sent = self.stream.borrow_mut().get_mut().write_all(format!("{line}\n").as_bytes());
        // Why it ended says what it sent last.
        sent.or_else(|_| self.receive(&Interrupt::default(), "the last that it said").map(drop))
    }

    fn receive(&self, interrupt: &Interrupt, what: &str) -> Result<Message> {
        let (mut line, mut since, mut busy) = (Vec::new(), Instant::now(), String::new());
        loop {
            interrupt.check()?;
            match self.stream.borrow_mut().read_until(b'\n', &mut line) {
                Ok(_) if line.last() == Some(&b'\n') => {}
                Ok(_) => return Err(self.lost(&format!("ended while this rank waited for it: {what}"))),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                    if since.elapsed() < PATIENCE {
                        continue;
                    }
                    let name = self.name();
                    let last = if busy.is_empty() { String::new() } else { format!(" It was last at: {busy}.") };
                    let text = format!("{name} has said nothing for {} s: {what}.{last}", PATIENCE.as_secs());
                    return Err(Error::new(Code::Stuck, text)
                        .action("Look at that process: it was stopped, or its device hangs."));
                }
                Err(e) => return Err(self.lost(&format!("is gone while this rank waited for it ({e}): {what}"))),
            }
            match serde_json::from_slice(&line) {
                Ok(Message::Busy(with)) => (busy, since) = (with, Instant::now()),
                Ok(Message::Failed(why)) => return Err(self.lost(&format!("failed: {why}"))),
                Ok(message) => return Ok(message),
                Err(e) => return Err(self.unlike(&format!("says what this version does not know ({e})"))),
            }
            line.clear();
        }
    }

    fn lost(&self, what: &str) -> Error {
        let text = format!("{} {}.", self.name(), what.trim_end_matches('.'));
        Error::new(Code::PeerLost, text).action("Look at that rank's own output first. Then start all ranks again.")
    }

    fn unlike(&self, what: &str) -> Error {
        Error::new(Code::RanksUnlike, format!("{} {what}.", self.name()))
            .action("Start all ranks with the same arguments, on the same version of funicular.")
    }
}

/// The other ranks as one of them sees them: rank 0 all others, the others rank 0.
pub struct Crew(Vec<Peer>);

impl Crew {
    /// Meets the other ranks.
    ///
    /// # Errors
    /// `FN-E102` naming those that do not come, `FN-E106` when interrupted, `FN-E703` for other versions.
    pub fn meet(place: &Place, interrupt: &Interrupt) -> Result<Self> {
        let address = SocketAddr::from_abstract_name(&place.name).map_err(|e| unmet(place, &e.to_string()))?;
        let until = Instant::now() + PATIENCE;
        if place.leads() {
            Self::lead(place, &address, until, interrupt)
        } else {
            Self::join(place, &address, until, interrupt)
        }
    }

    fn lead(place: &Place, address: &SocketAddr, until: Instant, interrupt: &Interrupt) -> Result<Self> {
        let bound = UnixListener::bind_addr(address).and_then(|bound| bound.set_nonblocking(true).map(|()| bound));
        let listener = bound.map_err(|e| unmet(place, &e.to_string()))?;
        let mut crew = Self(Vec::new());
        while crew.0.len() + 1 < place.size as usize {
            let missing = (1..place.size as usize).filter(|&rank| crew.0.iter().all(|peer| peer.rank != rank));
            let Ok((stream, _)) = listener.accept() else {
                let names: Vec<String> = missing.map(|rank| rank.to_string()).collect();
                wait(until, interrupt, place, &format!("rank {} has not come", names.join(", ")))?;
                continue;
            };
            let Ok(mut peer) = Peer::new(0, stream) else { continue };
            match peer.receive(interrupt, "its number")? {
                Message::Hello { rank, size, version }
                    if (size, version.as_str()) == (place.size, env!("CARGO_PKG_VERSION"))
                        && missing.clone().any(|n| n == rank) =>
                {
                    peer.rank = rank;
                    crew.0.push(peer);
                }
                other => return Err(peer.unlike(&format!("is none of this run: {other:?}"))),
            }
        }
        crew.0.sort_by_key(|peer| peer.rank);
        Ok(crew)
    }

    fn join(place: &Place, address: &SocketAddr, until: Instant, interrupt: &Interrupt) -> Result<Self> {
        let peer = loop {
            match UnixStream::connect_addr(address).and_then(|stream| Peer::new(0, stream)) {
                Ok(peer) => break peer,
                Err(e) => wait(until, interrupt, place, &format!("rank 0 has not come ({e})"))?,
            }
        };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        peer.send(&Message::Hello { rank: place.rank, size: place.size, version })?;
        Ok(Self(vec![peer]))
    }

    /// Tells the others why this one ends.
    pub fn fail(&self, why: &Error) {
        self.0.iter().for_each(|peer| drop(peer.send(&Message::Failed(why.to_string()))));
    }

    /// Tells all others.
    pub(super) fn tell(&self, message: &Message) -> Result<()> {
        self.0.iter().try_for_each(|peer| peer.send(message))
    }

    /// What each of the others says next, in order of ranks; `pick` takes what is expected.
    pub(super) fn hear<T>(
        &self,
        interrupt: &Interrupt,
        what: &str,
        pick: impl Fn(Message) -> std::result::Result<T, Message>,
    ) -> Result<Vec<T>> {
        let one = |peer: &Peer| {
            pick(peer.receive(interrupt, what)?)
                .map_err(|other| peer.unlike(&format!("answers with {other:?}: {what}")))
        };
        self.0.iter().map(one).collect()
    }

    /// Compares what each of the others can measure with what rank 0 can.
    pub(super) fn compare(&self, own: &[String], theirs: &[Vec<String>]) -> Result<()> {
        let other = self.0.iter().zip(theirs).find(|(_, theirs)| *theirs != own);
        other.map_or(Ok(()), |(peer, theirs)| {
            Err(peer.unlike(&format!("can measure {}, and rank 0 {}", theirs.join(", "), own.join(", "))))
        })
    }

    /// Ends the measuring of the others; gives the ticks that they used.
    pub(super) fn end(&self, interrupt: &Interrupt) -> Result<u64> {
        self.tell(&Message::End)?;
        let used = self.hear(interrupt, "its end", |message| match message {
            Message::Used(ticks) => Ok(ticks),
            other => Err(other),
        });
        used.map(|used| used.iter().sum())
    }
}

/// Waits a moment for another rank, unless it is too late.
fn wait(until: Instant, interrupt: &Interrupt, place: &Place, what: &str) -> Result<()> {
    interrupt.check()?;
    if Instant::now() > until {
        return Err(unmet(place, &format!("{what} after {} s", PATIENCE.as_secs())));
    }
    std::thread::sleep(LOOK);
    Ok(())
}

fn unmet(place: &Place, why: &str) -> Error {
    let text = format!("rank {} of {} cannot meet the others at '{}': {why}.", place.rank, place.size, place.name);
    Error::new(Code::Stuck, text).action(
        "Start all ranks on one host and in one container, once: torchrun --nproc-per-node N -m funicular bench.",
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Rank 0 of two, and the other one.
    pub(in crate::bench) fn two() -> [Crew; 2] {
        let (one, other) = UnixStream::pair().expect("sockets");
        [(1, one), (0, other)].map(|(rank, stream)| Crew(vec![Peer::new(rank, stream).expect("a peer")]))
    }

    fn place(variables: &[(&str, &str)]) -> Result<Option<Place>> {
        Place::of(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_environment_says_who_is_there() {
        assert_eq!(place(&[("WORLD_SIZE", "4")]).expect("alone"), None);
        assert_eq!(place(&[("RANK", "0"), ("WORLD_SIZE", "1")]).expect("alone"), None);
        let of = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "29500"), ("TORCHELASTIC_RUN_ID", "a/../b")];
        let second = place(&of).expect("valid").expect("of two");
        assert_eq!((second.rank, second.size, second.local, second.leads()), (1, 2, 1, false));
        assert!(second.name.ends_with("-29500--ab"), "{}", second.name);
        for wrong in [
            [("RANK", "2"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")],
            [("RANK", "x"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")],
            [("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")],
        ] {
            assert_eq!(place(&wrong).expect_err("refused").code(), Code::RanksUnsupported);
        }
        let shared = second.device(DeviceChoice::Cuda(0)).expect_err("one GPU for two");
        assert_eq!(shared.code(), Code::RanksUnsupported);
    }

    #[test]
    fn ranks_that_do_not_come_are_named() {
        for (rank, missing) in [("0", "rank 1, 2 has not come"), ("1", "rank 0 has not come")] {
            let id = format!("{}{rank}", std::process::id());
            let of = [("RANK", rank), ("WORLD_SIZE", "3"), ("TORCHELASTIC_RUN_ID", id.as_str())];
            let place = place(&of).expect("valid").expect("of three");
            let address = SocketAddr::from_abstract_name(&place.name).expect("a name");
            let meet = if place.leads() { Crew::lead } else { Crew::join };
            let Err(error) = meet(&place, &address, Instant::now(), &Interrupt::default()) else { panic!("alone") };
            assert!(error.code() == Code::Stuck && error.message().contains(missing), "{error}");
        }
    }

    #[test]
    fn ranks_that_can_measure_other_hops_are_unlike() {
        let [crew, _other] = two();
        let hops = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        crew.compare(&hops(&["a"]), &[hops(&["a"])]).expect("alike");
        let error = crew.compare(&hops(&["a", "b"]), &[hops(&["a"])]).expect_err("unlike");
        assert!(error.code() == Code::RanksUnlike && error.message().contains("rank 1"), "{error}");
    }

    #[test]
    fn a_rank_that_fails_or_ends_is_named_with_what_was_waited_for() {
        let [crew, there] = two();
        let hear =
            || crew.hear(&Interrupt::default(), "its round of adamw_cpu", Err::<(), _>).expect_err("nothing good");
        there.tell(&Message::Busy("writing".to_owned())).expect("sends");
        there.tell(&Message::End).expect("sends");
        assert_eq!(hear().code(), Code::RanksUnlike);
        there.fail(&Error::new(Code::HostAlloc, "no memory"));
        let error = hear();
        assert!(error.code() == Code::PeerLost && error.message().contains("no memory"), "{error}");
        drop(there);
        let error = hear();
        assert!(error.code() == Code::PeerLost && error.message().contains("its round of adamw_cpu"), "{error}");
        let stopped = Interrupt::default();
        stopped.0.store(true, std::sync::atomic::Ordering::Relaxed);
        let error = crew.hear(&stopped, "its end", Err::<(), _>).expect_err("interrupted");
        assert_eq!(error.code(), Code::Interrupted);
    }
}
