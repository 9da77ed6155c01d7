//! Lines of the kernel's trace.

/// An event: a line as `mirror-123     [001] .....    12.345678: hmm_gpu_evict: hmm_gpu0 offset=0x0 moved=1 needed=2 pages`.
#[derive(Clone, Debug, PartialEq)]
pub struct Event<'a> {
    pub comm: &'a str,
    pub pid: u32,
    /// Microseconds.
    pub time: f64,
    /// Without `hmm_gpu_`.
    pub name: &'a str,
    pub unit: u32,
    /// What follows the device.
    pub text: &'a str,
}

impl<'a> Event<'a> {
    /// `None` for what is none of the driver's.
    pub fn parse(line: &'a str) -> Option<Self> {
        // Who ran may be called anything: the processor's number in brackets comes last before the time.
        let (head, rest) = line.split_once(": hmm_gpu_")?;
        let (task, flags) = head.rsplit_once(" [")?;
        let (comm, pid) = task.trim().rsplit_once('-')?;
        let seconds: f64 = flags.rsplit(' ').next()?.parse().ok()?;
        let (name, rest) = rest.split_once(": ")?;
        let (device, text) = rest.split_once(' ')?;
        Some(Self {
            comm,
            pid: pid.parse().ok()?,
            time: seconds * 1e6,
            name,
            unit: device.strip_prefix("hmm_gpu")?.parse().ok()?,
            text: text.trim(),
        })
    }

    /// `name=number` in the text; the `nth` one of that name.
    pub fn number(&self, name: &str, nth: usize) -> Option<u64> {
        let mut values = self
            .text
            .split(' ')
            .filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        values.nth(nth)?.parse().ok()
    }
}

/// How many events a line says were lost: `CPU:1 [LOST 42 EVENTS]`.
pub fn lost(line: &str) -> u64 {
    let number = || {
        line.split_once("[LOST ")?
            .1
            .split_once(" EVENTS]")?
            .0
            .parse()
            .ok()
    };
    number().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let line = "       my-prog 2-123     [001] ...1.    12.345678: hmm_gpu_migrate: hmm_gpu3 request to device: addr=0x7f00 pages=16 moved=15 stuck=1 no_memory=0 setup=10 copy=20 pages=30 finalize=40 ns";
        let event = Event::parse(line).unwrap();
        assert_eq!(
            (event.comm, event.pid, event.name, event.unit),
            ("my-prog 2", 123, "migrate", 3)
        );
        assert!((event.time - 12_345_678.0).abs() < 0.5);
        assert!(event.text.starts_with("request to device: addr="));
        assert_eq!(
            (event.number("pages", 0), event.number("pages", 1)),
            (Some(16), Some(30))
        );
        assert_eq!(
            (
                event.number("moved", 0),
                event.number("move", 0),
                event.number("pages", 2)
            ),
            (Some(15), None, None)
        );
    }

    #[test]
    fn what_is_no_event_is_none() {
        for line in [
            "",
            "# tracer: nop",
            "CPU:1 [LOST 42 EVENTS]",
            " a-1 [000] ..... 1.0: sched_switch: x",
            ": hmm_gpu_",
            " [x: hmm_gpu_a: b c",
        ] {
            assert_eq!(Event::parse(line), None, "{line}");
        }
        assert_eq!(
            (
                lost("CPU:1 [LOST 42 EVENTS]"),
                lost("[LOST x EVENTS]"),
                lost("")
            ),
            (42, 0, 0)
        );
    }
}
