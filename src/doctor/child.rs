//! Child processes with a time limit.

use std::{
    io::Read,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Runs a command and gives what it wrote, if it ended well within `limit`; else why not. It is killed when time is up.
///
/// # Errors
/// Why there is no output.
pub fn output(command: &mut Command, limit: Duration) -> Result<String, String> {
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = spawned.map_err(|e| e.to_string())?;
    let pipe = child.stdout.take();
    // Read while waiting: a child that fills the pipe would never end.
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let begun = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if begun.elapsed() < limit => thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("no answer in {} s", limit.as_secs()));
            }
        }
    };
    let text = reader.join().map_err(|_| "its output could not be read".to_owned())?;
    if status.success() { Ok(text) } else { Err(format!("it ended with {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_heard_and_a_silent_one_is_killed() {
        let run = |script: &str, limit| output(Command::new("sh").args(["-c", script]), Duration::from_millis(limit));
        assert_eq!(run("echo hello", 60_000).as_deref(), Ok("hello\n"));
        assert_eq!(run("exec sleep 600", 50), Err("no answer in 0 s".to_owned()));
        assert!(run("exit 3", 60_000).is_err_and(|why| why.contains('3')));
        assert!(output(&mut Command::new("/no/such/program"), Duration::from_secs(1)).is_err());
        // More than a pipe holds.
        assert_eq!(run("head -c 300000 /dev/zero", 60_000).map(|text| text.len()), Ok(300_000));
    }
}
