//! Dispatches.

use std::sync::PoisonError;
use std::time::Instant;

use bytemuck::{Pod, Zeroable};

use super::{Added, Placed, Twins};
use crate::range::PAGE_BYTES;
use crate::svm::context::{Translated, Work, FAULTS};
use crate::svm::kernel::Grid;
use crate::svm::replay::{replay, Batch, Groups, Left, Machine, Outcome};
use crate::svm::{reason, Args, DispatchStats, Kernel, Miss, Strategy, SvmContext, SvmError};
use crate::sys::vulkan::{Push, Vendor};
use crate::{Access, DeviceFault, Errno, Error};

/// `SvmControl` of `hmm_svm.glsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct Control {
    root: u64,
    base: u64,
    missed: u64,
    saved: u64,
    list: u64,
    outcome: u64,
    nowhere: u64,
    levels: u32,
    capacity: u32,
    groups_x: u32,
    groups_y: u32,
    filter: u64,
    twins: u64,
    twin_ranges: u32,
    unused: u32,
}

/// The head of `SvmOutcome`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct Head {
    faults: u32,
    missed: u32,
    advanced: u32,
    misuse: u32,
}

/// `SvmFault`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct Fault {
    addr: u64,
    wants: u32,
    unused: u32,
}

const WRITE: u32 = 1;
const SYSTEM: u32 = 2;

/// What a shader did wrong, by the bits of `SVM_MISUSE_*`.
const MISUSE: [&str; 5] = [
    "changed memory before `svm_commit`",
    "changed memory outside of the span that it translated",
    "changed memory in a span that it translated for reading (`svm_read`)",
    "translated an address after `svm_commit` that was not there",
    "translated more than 4096 bytes at once",
];

impl SvmContext {
    /// Runs a kernel, and waits until it is done. Groups are a number, or three for three dimensions; [`Kernel::groups`] counts them.
    ///
    /// Errors: those of [`SvmError`](crate::SvmError), and of the driver. After an error, what the kernel was to write may have been
    /// written in part, by invocations that had finished.
    ///
    /// # Safety
    ///
    /// As for a function in another language. The kernel does with the memory that it is led to what its source says: that must be
    /// memory which this program may read, or change, in this way now, of the types that the kernel takes it for, and which nothing
    /// else changes without synchronization. The shader must be valid SPIR-V.
    pub unsafe fn dispatch(
        &self,
        kernel: &Kernel,
        args: Args<'_>,
        groups: impl Into<Grid>,
    ) -> Result<DispatchStats, Error> {
        let grid = groups.into();
        kernel.belongs_to(self)?;
        let groups = kernel.check(grid)?;
        let mut stats = DispatchStats::new(self.strategy());
        stats.groups = u64::from(groups);
        if groups == 0 {
            return Ok(stats);
        }
        let mut guard = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let work = &mut *guard;
        let begin = Instant::now();
        let placed = if self.strategy().needs_names() {
            let mapped = self.mapped_ranges();
            Some(Placed::new(
                &self.gpu,
                self.strategy(),
                &args.reaches,
                &mapped,
            )?)
        } else {
            None
        };
        work.make_room(&self.gpu, kernel, groups, args.packed.len())?;
        work.args.put(0, &args.packed);
        stats.bytes_in = placed.as_ref().map_or(0, |placed| placed.bytes_in);
        stats.prepare = begin.elapsed();

        let mut running = Running {
            context: self,
            kernel,
            work,
            placed: placed.as_ref(),
            twins: None,
            grid,
            times: Times::default(),
        };
        let limit = self.gpu.facts.max_groups;
        let report = |stats: &DispatchStats| self.report(stats);
        let result = replay(
            &mut running,
            groups,
            kernel.group(),
            limit,
            &mut stats,
            report,
        );
        let times = running.times;
        stats.pages_by_copy = running.twins.as_ref().map_or(0, |twins| twins.all());
        stats.run = times.run;
        stats.service = times.service;
        if let Some(Translated { backend, .. }) = &mut work.translated {
            backend.done();
        }
        if let Err(error) = result {
            // Who missed something has to be forgotten.
            work.missed_is_zero = false;
            tracing::debug!(kernel = kernel.name(), %error, %stats, "a dispatch failed");
            return Err(error);
        }
        let begin = Instant::now();
        if let Some(placed) = placed {
            stats.bytes_out = placed.finish(&self.gpu)?;
        }
        stats.finish = begin.elapsed();
        tracing::debug!(kernel = kernel.name(), %stats, "dispatched");
        self.count(&stats);
        Ok(stats)
    }

    /// Has a kernel compiled by the device's driver, which otherwise does that when it first runs: nothing of it runs.
    pub(crate) fn warm(&self, kernel: &Kernel) -> Result<(), Error> {
        let mut guard = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let push = idle(&mut guard);
        // SAFETY: without lanes, every invocation ends at `svm_begin`, which has read `control` and the beginning of `list` only.
        unsafe { kernel.pipeline.run(push, 1) }
    }
}

/// What a shader is told that is to do nothing.
fn idle(work: &mut Work) -> Push {
    let control = Control {
        list: work.list.addr(),
        nowhere: work.nowhere.addr(),
        groups_x: 1,
        groups_y: 1,
        ..Default::default()
    };
    work.control.put(0, &[control]);
    Push {
        control: work.control.addr(),
        args: work.args.addr(),
        ..Default::default()
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Times {
    run: std::time::Duration,
    service: std::time::Duration,
}

/// A dispatch under way.
struct Running<'a> {
    context: &'a SvmContext,
    kernel: &'a Kernel,
    work: &'a mut Work,
    placed: Option<&'a Placed>,
    /// Pages that do not stay in VRAM.
    twins: Option<Twins>,
    grid: Grid,
    times: Times,
}

impl Running<'_> {
    fn control(&mut self) -> Result<Control, Error> {
        let work = &mut *self.work;
        let mut control = Control {
            missed: work.missed.addr(),
            saved: work.saved.as_ref().map_or(0, |saved| saved.addr()),
            list: work.list.addr(),
            outcome: work.outcome.addr(),
            nowhere: work.nowhere.addr(),
            filter: work.filter.addr(),
            capacity: FAULTS,
            groups_x: self.grid.x(),
            groups_y: self.grid.y(),
            ..Default::default()
        };
        if let Some(placed) = self.placed {
            (control.root, control.levels) = (placed.table.addr(), placed.ranges);
        }
        if let Some(Translated { memory, backend }) = &mut work.translated {
            let table = backend.table()?;
            control.base = memory.addr().wrapping_sub(backend.memory().offset);
            control.root = control.base.wrapping_add(table.offset);
            control.levels = table.levels;
        }
        if let Some(twins) = &self.twins {
            (control.twins, control.twin_ranges) = (twins.list(), twins.ranges());
        }
        Ok(control)
    }

    fn submit(&mut self, batch: &Batch<'_>) -> Result<(), Error> {
        let control = self.control()?;
        let work = &mut *self.work;
        work.control.put(0, &[control]);
        work.outcome.put(0, &[Head::default()]);
        if work.translated.is_some() {
            work.filter.bytes_mut().fill(0);
        }
        let (first, replay, count) = match batch.groups {
            Groups::Fresh(first, count) => (first, 0, count),
            Groups::Again(list) => {
                work.list.put(0, list);
                (0, 1, u32::try_from(list.len()).unwrap_or(0))
            }
        };
        let push = Push {
            control: work.control.addr(),
            args: work.args.addr(),
            first,
            replay,
            lane: batch.lanes.0,
            lanes: batch.lanes.1,
            loud: u32::from(batch.loud),
            zero: 0,
        };
        // SAFETY: what the kernel does to memory is the promise of the caller of `dispatch`; what it is given lives as long as it runs.
        unsafe { self.kernel.pipeline.run(push, count) }
    }

    fn outcome(&self) -> Result<Outcome, Error> {
        let bytes = self.work.outcome.bytes();
        let (head, faults) = bytes.split_at(size_of::<Head>());
        let head: Head = bytemuck::pod_read_unaligned(head);
        if head.misuse != 0 {
            let what = MISUSE
                .iter()
                .enumerate()
                .filter(|(bit, _)| head.misuse & (1 << bit) != 0);
            return Err(SvmError::Misuse {
                kernel: self.kernel.name().to_owned(),
                what: what
                    .map(|(_, what)| *what)
                    .collect::<Vec<_>>()
                    .join(", and "),
            }
            .into());
        }
        let misses = faults
            .chunks_exact(size_of::<Fault>())
            .take(head.faults.min(FAULTS) as usize)
            .map(|fault| {
                let fault: Fault = bytemuck::pod_read_unaligned(fault);
                Miss {
                    addr: usize::try_from(fault.addr).unwrap_or(usize::MAX),
                    write: fault.wants & WRITE != 0,
                    system: fault.wants & SYSTEM != 0,
                }
            })
            .collect();
        Ok(Outcome {
            missed: head.missed != 0,
            advanced: head.advanced != 0,
            misses,
            reported: u64::from(head.faults),
        })
    }
}

impl Running<'_> {
    /// Has a driver that works in threads of this process touch all that it touches for a submission, before such a touch is waited for: what
    /// of it is in VRAM comes home now, and is missed.
    fn rehearse(&mut self) -> Result<(), Error> {
        if self.work.translated.is_none() || self.context.gpu.facts.vendor != Vendor::Lavapipe {
            return Ok(());
        }
        let push = idle(self.work);
        // SAFETY: as in `warm`.
        unsafe { self.kernel.pipeline.run(push, 1) }
    }

    /// Brings in what was missed, or has it be used by copies, where it is private and does not come however often it is asked for.
    fn bring(&mut self, mut misses: Vec<Miss>) -> Result<u64, Error> {
        while !misses.is_empty() {
            let answer = self.ask_for(&misses);
            let Err(Error::Svm(SvmError::NotInVram { addr, .. })) = answer else {
                return answer;
            };
            let is_it = |miss: &Miss| miss.addr / PAGE_BYTES == addr / PAGE_BYTES;
            let Some(at) = misses.iter().position(is_it) else {
                return answer;
            };
            // Without room it is missed again, as it is when it had to go for others.
            if matches!(self.copy(addr)?, None | Some(Added::Before)) {
                return answer;
            }
            // Those before it have been asked for.
            let mut number = 0;
            misses.retain(|miss| {
                number += 1;
                !is_it(miss) && (number > at || !miss.system)
            });
        }
        Ok(0)
    }

    fn ask_for(&mut self, misses: &[Miss]) -> Result<u64, Error> {
        let Some(first) = misses.first() else {
            return Ok(0);
        };
        let name = self.kernel.name();
        match (self.context.strategy(), &mut self.work.translated) {
            (Strategy::Translated, Some(Translated { backend, .. })) => backend
                .service(misses)
                .map_err(|error| reason::explain(error, name)),
            (Strategy::Native | Strategy::Translated, _) => Err(Error::Fault {
                fault: DeviceFault {
                    addr: first.addr,
                    access: if first.write {
                        Access::Write
                    } else {
                        Access::Read
                    },
                },
                errno: Errno::FAULT,
            }),
            (strategy, _) => Err(SvmError::OutOfReach {
                kernel: name.to_owned(),
                addr: first.addr,
                strategy,
            }
            .into()),
        }
    }

    /// Has the page of an address be used by a copy, if that is such a page.
    fn copy(&mut self, addr: usize) -> Result<Option<Added>, Error> {
        if self.work.translated.is_none() || !reason::is_private(addr) {
            return Ok(None);
        }
        let twins = match &mut self.twins {
            Some(twins) => twins,
            none => none.insert(Twins::new(&self.context.gpu)?),
        };
        let added = twins.add(addr);
        let kernel = self.kernel.name();
        tracing::debug!(kernel, addr, ?added, "a page does not stay in VRAM");
        Ok(Some(added))
    }
}

impl Machine for Running<'_> {
    fn run(&mut self, batch: Batch<'_>) -> Result<Outcome, Error> {
        let begin = Instant::now();
        self.rehearse()?;
        // Before: pages of an execution are waited for until it ends.
        if let Some(twins) = &mut self.twins {
            twins.read()?;
        }
        if let Some(Translated { backend, .. }) = &mut self.work.translated {
            backend.begin()?;
        }
        let submitted = self.submit(&batch);
        if let Some(Translated { backend, .. }) = &mut self.work.translated {
            let held = backend.end();
            submitted?;
            if !held? {
                return Err(SvmError::Lost {
                    kernel: self.kernel.name().to_owned(),
                    deadline_ms: self.context.deadline_ms,
                }
                .into());
            }
        } else {
            submitted?;
        }
        if let Some(twins) = &self.twins {
            twins.write_back()?;
        }
        self.times.run += begin.elapsed();
        self.outcome()
    }

    fn left(&mut self, group: u32) -> Left {
        let lanes = self.kernel.group();
        let (first, bytes) = (group as usize * lanes as usize * 4, lanes as usize * 4);
        let of = self
            .work
            .missed
            .bytes()
            .get(first..first + bytes)
            .unwrap_or(&[]);
        let (mut count, mut lane) = (0, 0);
        for (at, state) in (0..).zip(of.chunks_exact(4)) {
            if state != [0; 4] {
                lane = if count == 0 { at } else { lane };
                count += 1;
            }
        }
        Left { group, count, lane }
    }

    fn service(&mut self, misses: &[Miss]) -> Result<u64, Error> {
        let begin = Instant::now();
        let moved = self.bring(misses.to_vec());
        self.times.service += begin.elapsed();
        moved
    }

    fn use_a_copy(&mut self, addr: usize) -> Result<bool, Error> {
        Ok(self.copy(addr)? == Some(Added::Now))
    }

    fn copied(&self) -> usize {
        self.twins.as_ref().map_or(0, Twins::pages)
    }

    fn room(&self) -> usize {
        let backend = self
            .work
            .translated
            .as_ref()
            .map(|translated| &translated.backend);
        backend.map_or(1, |backend| backend.room())
    }

    fn stuck(&self, addr: usize) -> Error {
        SvmError::Stuck {
            kernel: self.kernel.name().to_owned(),
            addr,
            pages: self.room(),
        }
        .into()
    }
}
