//! What is known, and what happened since the last look.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hmm_gpu::{Counters, Device};

use crate::error::Error;
use crate::host::Host;
use crate::pagemap::{ranges, scan, Range, Spot};

/// How much of the past is drawn.
pub const PAST: usize = 60;

/// What a device is, as far as it is shown.
pub struct Facts {
    pub unit: u32,
    pub pci: Option<String>,
    pub vram: u64,
    pub free: u64,
}

/// A device.
pub struct Gpu {
    pub facts: Facts,
    pub counters: Counters,
    /// What happened between the last two looks.
    pub work: Counters,
    pub seconds: f64,
    /// Pages that moved, in each of the last looks.
    pub past: VecDeque<u64>,
}

impl Gpu {
    /// So many a second.
    pub fn rate(&self, count: u64) -> f64 {
        if self.seconds > 0.0 {
            count as f64 / self.seconds
        } else {
            0.0
        }
    }
}

/// A process that has pages in VRAM or a node open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub comm: String,
    /// Bytes in VRAM, by unit; `None` if it cannot be seen.
    pub vram: Option<BTreeMap<u32, u64>>,
    /// Whether it has a node open: pages stay in VRAM also of those that have not.
    pub is_client: bool,
}

/// Everything.
pub struct State {
    pub gpus: Vec<Gpu>,
    pub processes: Vec<Process>,
    devices: Vec<Device>,
    ranges: Vec<Range>,
    at: Instant,
    /// Looking through page tables is work: not more often than it pays.
    next_scan: Instant,
}

impl State {
    pub fn new(host: &Host) -> Result<Self, Error> {
        // The error of the first one, if none can be opened.
        drop(Device::open_first()?);
        let now = Instant::now();
        let mut state = Self {
            gpus: vec![],
            processes: vec![],
            devices: vec![],
            ranges: vec![],
            at: now,
            next_scan: now,
        };
        state.look(host);
        Ok(state)
    }

    /// Looks again.
    pub fn look(&mut self, host: &Host) {
        let seconds = self.at.elapsed().as_secs_f64();
        self.at = Instant::now();
        // A device may have gone and another come with its number.
        let gone = self.devices.iter().any(|device| device.describe().is_err());
        if gone || self.devices.len() != Device::list().len() {
            self.devices = Device::list()
                .into_iter()
                .filter_map(|unit| Device::open(unit).ok())
                .collect();
            self.ranges = ranges(host);
            self.gpus.clear();
        }
        for device in &self.devices {
            let (Ok(it), Ok(counters)) = (device.describe(), device.counters()) else {
                continue;
            };
            let facts = Facts {
                unit: it.unit,
                pci: it.pci.map(|pci| pci.to_string()),
                vram: it.vram_bytes,
                free: it.vram_free_bytes,
            };
            match self
                .gpus
                .iter_mut()
                .find(|gpu| gpu.facts.unit == facts.unit)
            {
                Some(gpu) => {
                    gpu.work = counters - gpu.counters;
                    gpu.counters = counters;
                    gpu.facts = facts;
                    gpu.seconds = seconds;
                    gpu.past.push_back(moved(&gpu.work));
                    if gpu.past.len() > PAST {
                        gpu.past.pop_front();
                    }
                }
                None => self.gpus.push(Gpu {
                    facts,
                    counters,
                    work: Counters::default(),
                    seconds: 0.0,
                    past: VecDeque::new(),
                }),
            }
        }
        if self.at >= self.next_scan {
            let begin = Instant::now();
            self.processes = processes(host, &self.ranges);
            // At most a tenth of the time.
            self.next_scan = Instant::now() + (begin.elapsed() * 9).max(Duration::from_millis(100));
        }
    }

    /// Pages in VRAM that were seen in no process: of processes that were not looked at, or that are being moved.
    pub fn unseen(&self, gpu: &Gpu) -> u64 {
        let seen = |process: &Process| process.vram.as_ref()?.get(&gpu.facts.unit).copied();
        let seen: u64 = self.processes.iter().filter_map(seen).sum();
        let pages = gpu
            .counters
            .live_pages
            .saturating_sub(gpu.counters.table_pages);
        (pages * 4096).saturating_sub(seen)
    }

    #[cfg(test)]
    pub fn of(gpus: Vec<Gpu>, processes: Vec<Process>) -> Self {
        let now = Instant::now();
        Self {
            gpus,
            processes,
            devices: vec![],
            ranges: vec![],
            at: now,
            next_scan: now,
        }
    }
}

/// Pages that moved, whichever way.
fn moved(work: &Counters) -> u64 {
    work.to_device_pages + work.to_system_pages + work.fault_back_pages + work.pressure_pages
}

/// The processes that have a node open, and their descendants, which may have inherited pages.
fn processes(host: &Host, ranges: &[Range]) -> Vec<Process> {
    let nodes: Vec<PathBuf> = Device::list()
        .iter()
        .map(|unit| format!("/dev/hmm_gpu{unit}").into())
        .collect();
    let own = std::process::id();
    let pids: Vec<u32> = host
        .processes()
        .into_iter()
        .filter(|pid| *pid != own)
        .collect();
    let clients: Vec<u32> = pids
        .iter()
        .copied()
        .filter(|pid| host.holds(*pid, &nodes))
        .collect();
    let parents: BTreeMap<u32, u32> = pids
        .iter()
        .filter_map(|pid| Some((*pid, parent(host, *pid)?)))
        .collect();
    let descends = |mut pid: u32| {
        // A tree has no circles, but processes come and go while it is read.
        for _ in 0..64 {
            match parents.get(&pid) {
                Some(parent) if clients.contains(parent) => return true,
                Some(parent) => pid = *parent,
                None => return false,
            }
        }
        false
    };
    let mut processes: Vec<Process> = pids
        .iter()
        .filter(|pid| clients.contains(pid) || descends(**pid))
        .map(|pid| Process {
            pid: *pid,
            comm: host.comm(*pid),
            vram: vram(host, *pid, ranges),
            is_client: clients.contains(pid),
        })
        .filter(|it| it.is_client || it.vram.as_ref().is_some_and(|vram| !vram.is_empty()))
        .collect();
    let all = |it: &Process| {
        it.vram
            .as_ref()
            .map_or(0, |vram| vram.values().sum::<u64>())
    };
    processes.sort_by_key(|it| (std::cmp::Reverse(all(it)), it.pid));
    processes
}

fn parent(host: &Host, pid: u32) -> Option<u32> {
    let stat = host.text(&format!("/proc/{pid}/stat"))?;
    // Its name, in parentheses, may hold anything.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

fn vram(host: &Host, pid: u32, ranges: &[Range]) -> Option<BTreeMap<u32, u64>> {
    if ranges.is_empty() {
        return None;
    }
    let mut units = BTreeMap::new();
    for mapping in scan(host, pid, ranges).ok()? {
        for (spot, pages) in mapping.runs {
            if let Spot::Vram(unit) = spot {
                *units.entry(unit).or_insert(0) += pages * 4096;
            }
        }
    }
    Some(units)
}
