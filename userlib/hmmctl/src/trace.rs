//! The driver's trace events, as text or for a viewer of traces.

mod chrome;
mod event;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cli::TraceArgs;
use crate::error::Error;
use crate::host::Host;

const TRACEFS: &str = "/sys/kernel/tracing";

/// How often the kernel's buffer is looked at.
const TICK: Duration = Duration::from_millis(50);

/// The verb `trace`.
pub fn run(host: &Host, args: TraceArgs, out: &mut dyn Write) -> Result<ExitCode, Error> {
    let mut buffer = Buffer::new(host)?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ] {
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let mut file;
    let out: &mut dyn Write = match &args.output {
        Some(path) => {
            file = File::create(path).map_err(Error::of(path.display().to_string()))?;
            &mut file
        }
        None => out,
    };
    let mut sink = Sink {
        out,
        chrome: args.chrome.then(chrome::Trace::default),
        lost: 0,
    };
    let code = match args.command.split_first() {
        Some((program, arguments)) => {
            let mut child = Command::new(program)
                .args(arguments)
                .spawn()
                .map_err(Error::of(program))?;
            // Ctrl-C reaches the command too, whose end is then waited for.
            let status = loop {
                if let Some(status) = child.try_wait()? {
                    break status;
                }
                sink.take(&buffer.read()?)?;
                std::thread::sleep(TICK);
            };
            ExitCode::from(
                status
                    .code()
                    .and_then(|code| u8::try_from(code).ok())
                    .unwrap_or(1),
            )
        }
        None => {
            let end = args.seconds.map(|seconds| Instant::now() + seconds);
            while !stop.load(Ordering::Relaxed) && end.is_none_or(|end| Instant::now() < end) {
                sink.take(&buffer.read()?)?;
                std::thread::sleep(TICK);
            }
            ExitCode::SUCCESS
        }
    };
    // What is in the buffer still, and then what was cut off at its end.
    loop {
        let text = buffer.read()?;
        if text.is_empty() {
            break;
        }
        sink.take(&text)?;
    }
    sink.finish()?;
    Ok(code)
}

/// Where events go.
struct Sink<'a> {
    out: &'a mut dyn Write,
    chrome: Option<chrome::Trace>,
    lost: u64,
}

impl Sink<'_> {
    /// Takes whole lines.
    fn take(&mut self, text: &str) -> Result<(), Error> {
        for line in text.lines() {
            self.lost += event::lost(line);
            match &mut self.chrome {
                Some(trace) => {
                    if let Some(event) = event::Event::parse(line) {
                        trace.add(&event);
                    }
                }
                None => writeln!(self.out, "{line}")?,
            }
        }
        Ok(self.out.flush()?)
    }

    fn finish(self) -> Result<(), Error> {
        if let Some(trace) = self.chrome {
            writeln!(self.out, "{}", trace.into_json())?;
        }
        if self.lost > 0 {
            eprintln!(
                "hmmctl: {} events were lost: there were more than the buffer holds",
                self.lost
            );
        }
        Ok(self.out.flush()?)
    }
}

/// A buffer of the kernel's, for these events only: who else traces is not disturbed. It ends with its drop.
struct Buffer {
    folder: PathBuf,
    pipe: Option<File>,
    /// The beginning of a line whose end has not come yet.
    rest: Vec<u8>,
}

impl Buffer {
    fn new(host: &Host) -> Result<Self, Error> {
        let events = format!("{TRACEFS}/events/hmm_gpu");
        if !host.has(TRACEFS) || !host.has(&format!("{TRACEFS}/instances")) {
            return Error::said(format!(
                "tracefs is not mounted, or this is not root: mount -t tracefs tracefs {TRACEFS}"
            ));
        }
        if !host.has(&events) {
            return Error::said(
                "there are no events of hmm_gpu: the module is not loaded (`modprobe hmm_gpu`)",
            );
        }
        let folder = host.path(&format!(
            "{TRACEFS}/instances/hmmctl-{}",
            std::process::id()
        ));
        let of = |error: io::Error| Error::of(folder.display().to_string())(error);
        fs::create_dir(&folder).map_err(of)?;
        let mut buffer = Self {
            folder: folder.clone(),
            pipe: None,
            rest: vec![],
        };
        const NONBLOCK: i32 = 0o4000;
        // Times that go on evenly, and are those of other tools.
        fs::write(folder.join("trace_clock"), "mono").map_err(of)?;
        let pipe = OpenOptions::new()
            .read(true)
            .custom_flags(NONBLOCK)
            .open(folder.join("trace_pipe"));
        buffer.pipe = Some(pipe.map_err(of)?);
        fs::write(folder.join("events/hmm_gpu/enable"), "1").map_err(of)?;
        Ok(buffer)
    }

    /// The whole lines that came since the last time.
    fn read(&mut self) -> Result<String, Error> {
        let mut piece = [0; 1 << 16];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut piece) {
                Ok(0) => break,
                Ok(bytes) => self.rest.extend_from_slice(&piece[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::of(self.folder.display().to_string())(error)),
            }
        }
        let end = self
            .rest
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        let lines: Vec<u8> = self.rest.drain(..end).collect();
        Ok(String::from_utf8_lossy(&lines).into_owned())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // An open file keeps it.
        self.pipe = None;
        let _ = fs::remove_dir(&self.folder);
    }
}
