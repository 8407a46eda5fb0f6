//! How many checkpoints of a sequence are kept. A sequence: names in one directory that differ in their last number only.

use std::{
    ffi::OsString,
    io::{Error as OsError, ErrorKind},
    path::{Path, PathBuf},
};

use rustix::fs::RenameFlags;

use crate::checkpoint::{
    directory::private_path,
    folder::{Folder, Links, rename},
    leftovers::{Leftover, listed},
    manifest_file::manifest_of,
};

/// What a name is before and after its last number, and that number.
#[derive(Debug, PartialEq, Eq)]
struct Numbered<'a> {
    before: &'a str,
    number: u128,
    after: &'a str,
}

impl<'a> Numbered<'a> {
    fn of(name: &'a str) -> Option<Self> {
        let digit = |c: char| c.is_ascii_digit();
        let end = name.rfind(digit)? + 1;
        let start =
            name[..end].rfind(|c| !digit(c)).map_or(0, |at| at + name[at..].chars().next().map_or(1, char::len_utf8));
        let number = name[start..end].parse().unwrap_or(u128::MAX);
        Some(Self { before: &name[..start], number, after: &name[end..] })
    }
}

/// A checkpoint of the sequence. Ordered by step, then by the number in its name: clocks go back.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Member {
    step: u64,
    number: u128,
    path: PathBuf,
}

/// Removes checkpoints beside `target` so that `keep` of its sequence are left: itself, and those of the highest steps.
/// Each note is a full line.
pub(super) fn prune(target: &Path, keep: usize) -> Vec<String> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name().and_then(|n| n.to_str())) else {
        return Vec::new();
    };
    let Some(own) = Numbered::of(name) else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir(parent) else { return Vec::new() };
    let mut found: Vec<Member> = entries
        .flatten()
        .filter(|e| e.file_name() != name)
        .filter_map(|e| {
            let name = e.file_name();
            let other = Numbered::of(name.to_str()?)?;
            let same = (other.before, other.after) == (own.before, own.after);
            let folder = if same { Folder::open_itself(&e.path()).ok()? } else { return None };
            let step = manifest_of(&folder, Links::No).ok()?.step().unwrap_or(0);
            Some(Member { step, number: other.number, path: e.path() })
        })
        .collect();
    found.sort();
    found.reverse();
    let surplus = found.into_iter().skip(keep.max(1) - 1);
    surplus.filter_map(|member| remove(parent, &member.path, keep)).collect()
}

/// Takes a checkpoint out of its name first: one that is half removed must not look like one.
fn remove(parent: &Path, path: &Path, keep: usize) -> Option<String> {
    // Another process may have removed it, or be replacing it.
    let old = Leftover::checkpoint(Folder::open_itself(path).ok()?).ok()?;
    let away = private_path(parent);
    match rename(path, &away, RenameFlags::empty()) {
        Ok(()) if !old.folder().is_at(&away) => {
            let _ = rename(&away, path, RenameFlags::NOREPLACE);
            return None;
        }
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => return None,
        Err(e) => return Some(unremoved(path, &e)),
    }
    let old = old.moved(&away);
    let strangers = old.strangers();
    let refused = old.remove();
    Some(match refused {
        _ if !strangers.is_empty() => give_back(&away, path, &strangers),
        Some(note) => note,
        None => format!("FN-I402 removed {}: {keep} checkpoints are kept.", path.display()),
    })
}

/// What the user had put into the checkpoint goes back to where it was.
fn give_back(away: &Path, path: &Path, strangers: &[OsString]) -> String {
    match rename(away, path, RenameFlags::NOREPLACE) {
        Ok(()) => format!(
            "FN-W403 removed the checkpoint {}; {} stays there, no save wrote that.",
            path.display(),
            listed(strangers)
        ),
        Err(e) => unremoved(away, &e),
    }
}

fn unremoved(path: &Path, e: &OsError) -> String {
    format!("FN-W402 {} could not be removed: {e}.", path.display())
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::*;
    use crate::checkpoint::{
        directory::{Workspace, tests::names, write_file},
        manifest::{MANIFEST, Manifest},
    };

    fn save(dir: &Path, name: &str, step: u64) {
        let space = Workspace::create(&dir.join(name), true).expect("makes");
        let mut manifest = Manifest::new(RawValue::from_string(format!("{{\"step\":{step}}}")).expect("JSON"));
        // Saved in any order as far as clocks know.
        manifest.created = 1000 - step;
        write_file(space.path(), MANIFEST, &manifest.encode()).expect("writes");
        space.publish().expect("publishes");
    }

    #[test]
    fn the_last_number_counts() {
        let of = |name| Numbered::of(name).map(|n| (n.before.to_owned(), n.number, n.after.to_owned()));
        assert_eq!(of("step-30"), Some(("step-".into(), 30, String::new())));
        assert_eq!(of("lr0.1-é7.x"), Some(("lr0.1-é".into(), 7, ".x".into())));
        assert_eq!(of("12"), Some((String::new(), 12, String::new())));
        assert_eq!(of("best"), None);
    }

    #[test]
    fn keeps_the_highest_steps_of_one_sequence() {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, step) in
            [("step-1", 1), ("step-2", 2), ("best", 9), ("step-30", 30), ("lr2-step-1", 1), ("lr1-step-2", 2)]
        {
            save(dir.path(), name, step);
        }
        std::fs::create_dir(dir.path().join("step-4")).expect("makes");
        let notes = prune(&dir.path().join("step-30"), 2);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert_eq!(names(dir.path()), ["best", "lr1-step-2", "lr2-step-1", "step-2", "step-30", "step-4"]);
        assert!(prune(&dir.path().join("lr1-step-2"), 1).is_empty(), "another sweep's");
        assert!(prune(&dir.path().join("best"), 1).is_empty());
    }

    #[test]
    fn the_one_that_was_saved_is_kept_and_equal_steps_go_by_number() {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, step) in [("a-9", 0), ("a-10", 0), ("a-8", 0)] {
            save(dir.path(), name, step);
        }
        prune(&dir.path().join("a-8"), 2);
        assert_eq!(names(dir.path()), ["a-10", "a-8"]);
    }

    #[test]
    fn what_the_user_put_there_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        for step in 1..=2 {
            save(dir.path(), &format!("s{step}"), step);
        }
        std::fs::write(dir.path().join("s1/notes.txt"), "years").expect("writes");
        let notes = prune(&dir.path().join("s2"), 1);
        assert!(notes.len() == 1 && notes[0].contains("notes.txt"), "{notes:?}");
        assert_eq!(names(dir.path()), ["s1", "s2"]);
        assert_eq!(names(&dir.path().join("s1")), ["notes.txt"]);
    }
}
