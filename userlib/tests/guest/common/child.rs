//! Forked processes that go step by step.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{catch_unwind, set_hook, AssertUnwindSafe};
use std::time::Duration;

use super::memory::{errno, last_errno};

const TOO_LONG: Duration = Duration::from_secs(60);

/// Says something, through no lock and past the harness of the tests: what a forked process hands to that, nobody sees.
pub fn say(text: &str) {
    let text = format!("{text}\n");
    // SAFETY: the text is that long.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

/// Either end of the line between a test and a child.
pub struct Link(UnixStream);

impl Link {
    /// Hands a number to the other side, and goes on.
    #[track_caller]
    pub fn send(&mut self, number: u64) {
        self.0.write_all(&number.to_ne_bytes()).unwrap();
    }

    /// Waits for a number of the other side.
    #[track_caller]
    pub fn receive(&mut self) -> u64 {
        let mut bytes = [0; 8];
        if let Err(error) = self.0.read_exact(&mut bytes) {
            panic!("the other process died, or took too long: {error}");
        }
        u64::from_ne_bytes(bytes)
    }

    /// Lets the other side go one step, and waits for it.
    #[track_caller]
    pub fn step(&mut self) -> u64 {
        self.send(0);
        self.receive()
    }
}

/// A forked process. Killed when dropped.
pub struct Child {
    pub pid: libc::pid_t,
    link: Link,
    ended: bool,
}

impl Child {
    /// Forks a process that does `work` and ends, well if `work` returns and badly if it panics.
    pub fn fork(work: impl FnOnce(&mut Link)) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let too_long = Some(super::patience(TOO_LONG));
        ours.set_read_timeout(too_long).unwrap();
        theirs.set_read_timeout(too_long).unwrap();
        // SAFETY: glibc keeps its allocator usable in the child, and the child uses no other lock that a thread may have held:
        // it prints through no lock (below), and ends without running anybody's cleanup.
        let pid = errno(unsafe { libc::fork() }).unwrap();
        if pid == 0 {
            drop(ours);
            let mut link = Link(theirs);
            set_hook(Box::new(|panic| {
                say(&format!(
                    "\nin the forked process {}: {panic}",
                    std::process::id()
                ));
            }));
            let status = match catch_unwind(AssertUnwindSafe(|| work(&mut link))) {
                Ok(()) => 0,
                Err(_) => 101,
            };
            // SAFETY: always fine to call.
            unsafe { libc::_exit(status) };
        }
        Self {
            pid,
            link: Link(ours),
            ended: false,
        }
    }

    /// Hands a number to the child, and goes on.
    #[track_caller]
    pub fn send(&mut self, number: u64) {
        self.link.send(number);
    }

    /// Waits for a number of the child.
    #[track_caller]
    pub fn receive(&mut self) -> u64 {
        self.link.receive()
    }

    /// Lets the child go one step, and waits for it.
    #[track_caller]
    pub fn step(&mut self) -> u64 {
        self.link.step()
    }

    /// Waits for the end of the child, which must be a good one.
    #[track_caller]
    pub fn finish(mut self) {
        let status = self.wait();
        assert!(
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
            "the forked process {} failed: status {status:#x}",
            self.pid
        );
    }

    /// Waits for the end of the child, which must be death by this signal.
    #[track_caller]
    pub fn finish_killed(mut self, signal: libc::c_int) {
        let status = self.wait();
        assert!(
            libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == signal,
            "status {status:#x}"
        );
    }

    /// `kill -9`, now.
    #[track_caller]
    pub fn kill(mut self) {
        self.signal(libc::SIGKILL);
        let status = self.wait();
        assert!(
            libc::WIFSIGNALED(status),
            "it ended by itself before it was killed: status {status:#x}"
        );
    }

    /// Sends the child a signal.
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: our child, which nobody has waited for.
        unsafe { libc::kill(self.pid, signal) };
    }

    /// Takes an open file from the child (`pidfd_getfd`), as if it had been passed.
    #[track_caller]
    pub fn take_file(&self, fd: u64) -> OwnedFd {
        // SAFETY: numbers only.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        assert_ne!(process, -1, "{}", last_errno());
        // SAFETY: just made, and nobody else's.
        let process = unsafe { OwnedFd::from_raw_fd(process as i32) };
        // SAFETY: numbers only.
        let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
        assert_ne!(taken, -1, "{}", last_errno());
        // SAFETY: as above.
        unsafe { OwnedFd::from_raw_fd(taken as i32) }
    }

    /// Asserts that it has not ended by itself.
    #[track_caller]
    pub fn still_runs(&mut self) {
        let mut status = 0;
        // SAFETY: our child; the status is ours.
        let ended = errno(unsafe { libc::waitpid(self.pid, &mut status, libc::WNOHANG) }).unwrap();
        self.ended = ended != 0;
        assert!(
            !self.ended,
            "the forked process {} has ended: status {status:#x}",
            self.pid
        );
    }

    fn wait(&mut self) -> libc::c_int {
        let mut status = 0;
        // SAFETY: our child; the status is ours.
        errno(unsafe { libc::waitpid(self.pid, &mut status, 0) }).unwrap();
        self.ended = true;
        status
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.ended {
            self.signal(libc::SIGKILL);
            self.wait();
        }
    }
}
