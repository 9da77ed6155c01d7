//! A trace file of Chrome's, which Perfetto reads too: a row for each thread, below the device that it had work.

use std::collections::BTreeSet;

use serde_json::{json, Value};

use super::event::Event;

/// What is recorded so far.
#[derive(Default)]
pub struct Trace {
    events: Vec<Value>,
    devices: BTreeSet<u32>,
    threads: BTreeSet<(u32, u32, String)>,
}

impl Trace {
    /// Adds an event.
    pub fn add(&mut self, event: &Event) {
        self.devices.insert(event.unit);
        self.threads
            .insert((event.unit, event.pid, event.comm.to_owned()));
        match event.name {
            "migrate" => self.migration(event),
            name => self.events.push(json!({
                "ph": "i", "s": "t", "name": name, "ts": event.time, "pid": event.unit, "tid": event.pid,
                "args": { "text": event.text },
            })),
        }
    }

    /// A migration is told at its end, with the time of each phase: they are drawn inside it.
    fn migration(&mut self, event: &Event) {
        let cause = event
            .text
            .split_once(':')
            .map_or("migrate", |(cause, _)| cause);
        // The second `pages`: the first one counts pages.
        let phases = [("setup", 0), ("copy", 0), ("pages", 1), ("finalize", 0)]
            .map(|(name, nth)| (name, event.number(name, nth).unwrap_or(0) as f64 / 1e3));
        let whole: f64 = phases.iter().map(|(_, time)| time).sum();
        let mut at = event.time - whole;
        let moved = event.number("moved", 0);
        self.events.push(span(event, cause, at, whole, json!({
            "pages": event.number("pages", 0), "moved": moved, "stuck": event.number("stuck", 0), "text": event.text,
        })));
        for (name, time) in phases {
            self.events.push(span(event, name, at, time, json!({})));
            at += time;
        }
    }

    /// The file.
    pub fn into_json(mut self) -> Value {
        let meta = |pid: u32, tid: u32, what: &str, name: String| json!({ "ph": "M", "name": what, "pid": pid, "tid": tid, "args": { "name": name } });
        for unit in &self.devices {
            self.events
                .push(meta(*unit, 0, "process_name", format!("hmm_gpu{unit}")));
        }
        for (unit, pid, comm) in self.threads {
            self.events.push(meta(unit, pid, "thread_name", comm));
        }
        json!({ "displayTimeUnit": "ns", "traceEvents": self.events })
    }
}

/// Something that takes time, in microseconds.
fn span(event: &Event, name: &str, start: f64, time: f64, args: Value) -> Value {
    json!({
        "ph": "X", "name": name, "ts": start, "dur": time, "pid": event.unit, "tid": event.pid, "args": args,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: [&str; 3] = [
        " mirror-123 [001] .....    12.000100: hmm_gpu_migrate: hmm_gpu0 cpu fault: addr=0x7f00 pages=16 moved=15 stuck=1 no_memory=0 setup=10000 copy=20000 pages=30000 finalize=40000 ns",
        " mirror-123 [001] .....    12.000101: hmm_gpu_cpu_fault: hmm_gpu0 addr=0x7f00 order=0: retry",
        " kworker/1:2-9 [001] .....    12.000102: hmm_gpu_evict: hmm_gpu1 offset=0x0 moved=1 needed=2 pages",
    ];

    fn trace() -> Vec<Value> {
        let mut trace = Trace::default();
        for line in LINES {
            trace.add(&Event::parse(line).unwrap());
        }
        let file = trace.into_json();
        file["traceEvents"].as_array().unwrap().clone()
    }

    #[test]
    fn the_phases_of_a_migration_fill_it() {
        let events = trace();
        let spans: Vec<(&str, f64, f64)> = events
            .iter()
            .filter(|event| event["ph"] == "X")
            .map(|event| {
                (
                    event["name"].as_str().unwrap(),
                    event["ts"].as_f64().unwrap(),
                    event["dur"].as_f64().unwrap(),
                )
            })
            .collect();
        let (name, start, time) = spans[0];
        assert_eq!((name, time), ("cpu fault", 100.0));
        assert!((start - 12_000_000.0).abs() < 0.01, "{start}");
        assert_eq!(events[0]["args"]["moved"], 15);
        let mut at = start;
        for ((name, begin, time), expected) in spans[1..].iter().zip([
            ("setup", 10.0),
            ("copy", 20.0),
            ("pages", 30.0),
            ("finalize", 40.0),
        ]) {
            assert_eq!((*name, *time), expected);
            assert!((begin - at).abs() < 0.01);
            at += time;
        }
        assert!((at - (start + 100.0)).abs() < 0.01);
    }

    #[test]
    fn devices_and_threads_have_their_names() {
        let events = trace();
        let names: Vec<String> = events
            .iter()
            .filter(|event| event["ph"] == "M")
            .map(|event| {
                format!(
                    "{} {} {}",
                    event["pid"],
                    event["tid"],
                    event["args"]["name"].as_str().unwrap()
                )
            })
            .collect();
        assert_eq!(
            names,
            [
                "0 0 hmm_gpu0",
                "1 0 hmm_gpu1",
                "0 123 mirror",
                "1 9 kworker/1:2"
            ]
        );
        assert_eq!(events.iter().filter(|event| event["ph"] == "i").count(), 2);
    }
}
