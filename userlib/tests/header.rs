//! `hmm_gpu.h` and `driver/uapi.rs` say the same: every structure, field, size, offset, constant and call number.
//!
//! Three lists must agree: the names in the text of `uapi.rs`; what the C compiler makes of these names in the header; and
//! what the Rust compiler makes of those below. So a name that is missing in any of them fails.
//!
//! Needs `cc`, and either `HMM_GPU_HEADER` (the path of a header that was made before) or `cbindgen` (or the path of one in
//! `CBINDGEN`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

use hmm_gpu::uapi;

const UAPI: &str = include_str!("../../driver/uapi.rs");

/// A name (`offsetof hmm_gpu_query.unit`, `HMM_GPU_VERSION`, ...) and its value.
type Facts = BTreeMap<String, u64>;

/// `facts.add_structs()` and `facts.add_constants()` for what is listed.
macro_rules! rust_facts {
    (structs { $($name:ident { $($field:ident),* $(,)? })* } constants { $($constant:ident)* }) => {
        fn rust_facts() -> Facts {
            let mut facts = Facts::new();
            $(
                let name = stringify!($name);
                facts.insert(format!("sizeof {name}"), size_of::<uapi::$name>() as u64);
                facts.insert(format!("alignof {name}"), align_of::<uapi::$name>() as u64);
                $(
                    let field = concat!(stringify!($name), ".", stringify!($field));
                    let offset = offset_of!(uapi::$name, $field);
                    facts.insert(format!("offsetof {field}"), offset as u64);
                    let size = field_bytes(|it: &uapi::$name| &it.$field);
                    facts.insert(format!("sizeof {field}"), size as u64);
                )*
            )*
            $(facts.insert(stringify!($constant).to_owned(), uapi::$constant.into());)*
            facts
        }
    };
}

rust_facts! {
    structs {
        hmm_gpu_query {
            flags, version, capabilities, unit, source, form, pci_domain, pci_bdf, block_bytes, vram_bytes,
            vram_free_bytes, reserved,
        }
        hmm_gpu_migrate {
            addr, len, target, flags, done_bytes, moved_bytes, already_bytes, skipped_bytes, unmapped_bytes, reserved,
        }
        hmm_gpu_residency { addr, len, bytes_ptr, flags, reserved }
        hmm_gpu_counters {
            flags, live_pages, allocated_pages, freed_pages, to_device_pages, populated_pages, to_system_pages,
            fault_back_pages, evicted_pages, cpu_faults, cpu_fault_retries, skipped_pages, vram_failures,
            system_failures, device_faults, mapped_pages, invalidations, table_pages, device_read_bytes,
            device_written_bytes, from_other_pages, to_other_pages, large_to_device, large_to_system, large_failures,
            pressure_pages, evictions, bounces, kept_pages, around_pages,
            device_fault_pages, setup_ns, copy_ns, pages_ns, finalize_ns, copy_failures, insertion_failures,
            unused_pages, table_pages_taken, faults_in_device, faults_in_system, fault_failures, cpu_fault_failures,
            private_pages, quarantined_pages, executions, executions_lost,
        }
        hmm_gpu_mirror { flags, levels, root_offset, nodes, entries, invalidations, reserved }
        hmm_gpu_access {
            op, policy, addr, len, buffer_ptr, to_addr, flags, done_bytes, faults, fault_addr, entry, reserved,
        }
        hmm_gpu_device_fault { addr, access, status }
        hmm_gpu_fault { faults_ptr, count, policy, flags, mapped_pages, device_pages, failed_pages, reserved }
        hmm_gpu_snapshot { addr, len, entries_ptr, flags, reserved }
        hmm_gpu_advise { addr, len, advice, flags, value, reserved }
        hmm_gpu_pool { flags, bytes, offset, reserved }
        hmm_gpu_import { flags, dma_buf, bytes, fd, unit, reserved }
        hmm_gpu_execute { op, flags, deadline_ms, state, id, reserved }
        hmm_gpu_prefetch { addr, len, cookie, target, flags, reserved }
        hmm_gpu_completion {
            cookie, addr, len, target, error, done_bytes, moved_bytes, already_bytes, skipped_bytes, unmapped_bytes, reserved,
        }
        hmm_gpu_atomic { addr, operand, compare, old, op, bytes, policy, flags, faults, reserved }
    }
    constants {
        HMM_GPU_VERSION HMM_GPU_PAGE_BYTES HMM_GPU_MAX_DEVICES HMM_GPU_MAX_FAULTS HMM_GPU_MAX_PREFETCHES
        HMM_GPU_QUERY HMM_GPU_MIGRATE HMM_GPU_RESIDENCY HMM_GPU_COUNTERS
        HMM_GPU_MIRROR HMM_GPU_ACCESS HMM_GPU_FAULT HMM_GPU_SNAPSHOT HMM_GPU_ATOMIC HMM_GPU_ADVISE HMM_GPU_POOL HMM_GPU_EXECUTE
        HMM_GPU_PREFETCH HMM_GPU_IMPORT HMM_GPU_COUNTERS_CLIENT
        HMM_GPU_CAP_MIGRATE HMM_GPU_CAP_RESIDENCY HMM_GPU_CAP_COUNTERS HMM_GPU_CAP_FAULT_BACK HMM_GPU_CAP_MIRROR
        HMM_GPU_CAP_ATOMIC HMM_GPU_CAP_ADVICE HMM_GPU_CAP_PREFETCH HMM_GPU_CAP_COHERENT HMM_GPU_CAP_POOL HMM_GPU_CAP_IMPORT HMM_GPU_MAX_IMPORTS
        HMM_GPU_EXECUTE_BEGIN HMM_GPU_EXECUTE_END HMM_GPU_EXECUTE_QUERY HMM_GPU_MAX_DEADLINE_MS
        HMM_GPU_EXECUTION_ENDED HMM_GPU_EXECUTION_RUNNING HMM_GPU_EXECUTION_LOST
        HMM_GPU_ADVICE_RESET HMM_GPU_ADVICE_LOCATION HMM_GPU_ADVICE_READ_MOSTLY HMM_GPU_ADVICE_NO_MIGRATE
        HMM_GPU_ADVICE_GRANULARITY HMM_GPU_LOCATION_NONE HMM_GPU_LOCATION_SYSTEM HMM_GPU_LOCATION_DEVICE
        HMM_GPU_SOURCE_SOFT HMM_GPU_SOURCE_PCI HMM_GPU_SOURCE_DMA_BUF
        HMM_GPU_FORM_ADD HMM_GPU_FORM_ADD_RESOURCE
        HMM_GPU_TARGET_SYSTEM HMM_GPU_TARGET_DEVICE
        HMM_GPU_RESIDENT_NONE HMM_GPU_RESIDENT_SYSTEM HMM_GPU_RESIDENT_DEVICE HMM_GPU_RESIDENT_OTHER_DEVICE
        HMM_GPU_RESIDENT_MASK HMM_GPU_RESIDENT_WRITABLE
        HMM_GPU_PTE_VALID HMM_GPU_PTE_WRITABLE HMM_GPU_PTE_SYSTEM HMM_GPU_PTE_REQUESTED HMM_GPU_PTE_EXCLUSIVE
        HMM_GPU_PTE_OFFSET_MASK HMM_GPU_PTE_LEVEL_BITS
        HMM_GPU_OP_READ HMM_GPU_OP_WRITE HMM_GPU_OP_COPY
        HMM_GPU_POLICY_MAP HMM_GPU_POLICY_MIGRATE HMM_GPU_POLICY_NONE
        HMM_GPU_ACCESS_READ HMM_GPU_ACCESS_WRITE
        HMM_GPU_ATOMIC_ADD HMM_GPU_ATOMIC_AND HMM_GPU_ATOMIC_OR HMM_GPU_ATOMIC_XCHG HMM_GPU_ATOMIC_CMPXCHG
        HMM_GPU_SNAPSHOT_VALID HMM_GPU_SNAPSHOT_WRITABLE HMM_GPU_SNAPSHOT_DEVICE HMM_GPU_SNAPSHOT_OTHER_DEVICE
        HMM_GPU_SNAPSHOT_ZERO HMM_GPU_SNAPSHOT_MIRRORED HMM_GPU_SNAPSHOT_MIRROR_WRITABLE HMM_GPU_SNAPSHOT_MIRROR_CURRENT
        HMM_GPU_SNAPSHOT_MIRROR_EXCLUSIVE
        HMM_GPU_SNAPSHOT_ORDER_SHIFT HMM_GPU_SNAPSHOT_ORDER_MASK HMM_GPU_SNAPSHOT_PAGE_SHIFT
    }
}

fn field_bytes<S, F>(_: impl Fn(&S) -> &F) -> usize {
    size_of::<F>()
}

/// The names in the text of `uapi.rs`.
struct Names<'a> {
    /// Structures and their fields.
    structs: Vec<(&'a str, Vec<&'a str>)>,
    constants: Vec<&'a str>,
}

impl<'a> Names<'a> {
    fn parse(text: &'a str) -> Self {
        let mut names = Names {
            structs: vec![],
            constants: vec![],
        };
        let mut inside = false;
        for line in text.lines().map(str::trim) {
            if let Some(rest) = line.strip_prefix("pub struct ") {
                names
                    .structs
                    .push((rest.split_whitespace().next().unwrap(), vec![]));
                inside = true;
            } else if let Some(rest) = line
                .strip_prefix("pub const ")
                .filter(|rest| !rest.starts_with("fn "))
            {
                names.constants.push(rest.split(':').next().unwrap());
            } else if let Some(rest) = line.strip_prefix("pub ").filter(|_| inside) {
                names
                    .structs
                    .last_mut()
                    .unwrap()
                    .1
                    .push(rest.split(':').next().unwrap());
            } else if line == "}" {
                inside = false;
            }
        }
        names
    }

    /// The structures that are a call's, with the constant of the call: it has the same name.
    fn calls(&self) -> impl Iterator<Item = (&'a str, String)> + '_ {
        let calls = self
            .structs
            .iter()
            .map(|&(name, _)| (name, name.to_uppercase()));
        calls.filter(|(_, call)| self.constants.contains(&call.as_str()))
    }

    /// A C program that prints all facts.
    fn c_program(&self) -> String {
        let mut lines = String::new();
        let mut fact = |name: &str, value: &str| {
            writeln!(
                lines,
                "    printf(\"%s=%llu\\n\", \"{name}\", (unsigned long long)({value}));"
            )
            .unwrap();
        };
        for (name, fields) in &self.structs {
            fact(&format!("sizeof {name}"), &format!("sizeof(struct {name})"));
            fact(
                &format!("alignof {name}"),
                &format!("_Alignof(struct {name})"),
            );
            for field in fields {
                fact(
                    &format!("offsetof {name}.{field}"),
                    &format!("offsetof(struct {name}, {field})"),
                );
                fact(
                    &format!("sizeof {name}.{field}"),
                    &format!("sizeof(((struct {name} *)0)->{field})"),
                );
            }
        }
        for (name, call) in self.calls() {
            fact(
                &format!("ioctl {call}"),
                &format!("_IOWR(0xE8, {call} & 0xff, struct {name})"),
            );
        }
        for constant in &self.constants {
            fact(constant, constant);
        }
        // Twice, for its guard.
        format!(
            "#include \"hmm_gpu.h\"\n#include \"hmm_gpu.h\"\n#include <stddef.h>\n#include <stdio.h>\n\
             #include <sys/ioctl.h>\n\nint main(void)\n{{\n{lines}    return 0;\n}}\n"
        )
    }
}

/// A folder that goes when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hmm-gpu-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a command that must succeed, and hands back what it printed.
fn run(command: &mut Command, todo: &str) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; {todo}"));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{told}",
        output.status
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Puts the header into `folder`: the one in `HMM_GPU_HEADER`, or a new one.
fn header(folder: &Path) -> PathBuf {
    let header = folder.join("hmm_gpu.h");
    if let Some(made) = std::env::var_os("HMM_GPU_HEADER") {
        std::fs::copy(&made, &header)
            .unwrap_or_else(|error| panic!("HMM_GPU_HEADER {made:?}: {error}"));
        return header;
    }
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    run(
        Command::new(std::env::var_os("CBINDGEN").unwrap_or_else(|| "cbindgen".into()))
            .args(["--quiet", "--config"])
            .arg(crate_folder.join("cbindgen.toml"))
            .arg("--output")
            .arg(&header)
            .arg(crate_folder.join("../driver/uapi.rs")),
        "install cbindgen, or set CBINDGEN to its path or HMM_GPU_HEADER to a header",
    );
    header
}

fn c_facts(names: &Names, folder: &Path) -> Facts {
    let (source, program) = (folder.join("facts.c"), folder.join("facts"));
    std::fs::write(&source, names.c_program()).unwrap();
    run(
        Command::new("cc")
            .args([
                "-std=gnu11",
                "-Wall",
                "-Wextra",
                "-Wpedantic",
                "-Werror",
                "-o",
            ])
            .args([&program, &source]),
        "install a C compiler",
    );
    let fact = |line: &str| {
        let (name, value) = line.split_once('=').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    run(&mut Command::new(&program), "")
        .lines()
        .map(fact)
        .collect()
}

#[test]
fn the_header_says_what_the_rust_definition_says() {
    let names = Names::parse(UAPI);
    assert!(
        names.structs.len() >= 10 && names.constants.len() >= 64,
        "uapi.rs is not parsed"
    );
    assert!(names.calls().count() >= 9, "uapi.rs is not parsed");
    let folder = Folder::new("header");
    let header = std::fs::read_to_string(header(&folder.0)).unwrap();

    let mut c = c_facts(&names, &folder.0);
    for (name, call) in names.calls() {
        let number = c.remove(&format!("ioctl {call}")).unwrap();
        assert_eq!(
            c.get(&call),
            Some(&number),
            "{call} is not _IOWR(0xE8, nr, struct {name})"
        );
    }
    let rust = rust_facts();
    let differences: Vec<_> = c
        .keys()
        .chain(rust.keys())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .filter(|&name| c.get(name) != rust.get(name))
        .map(|name| format!("{name}: C {:?}, Rust {:?}", c.get(name), rust.get(name)))
        .collect();
    assert!(differences.is_empty(), "{differences:#?}");

    // The other way round: nothing in the header that is not in uapi.rs.
    let after = |line: &'static str| {
        header
            .lines()
            .filter_map(move |text| text.strip_prefix(line))
    };
    let constants: BTreeSet<&str> = after("#define ")
        .filter_map(|rest| rest.split_once(' '))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(constants, names.constants.iter().copied().collect());
    let structs: BTreeSet<&str> = after("struct ")
        .map(|rest| rest.trim_end_matches(" {"))
        .collect();
    assert_eq!(
        structs,
        names.structs.iter().map(|(name, _)| *name).collect()
    );
}

#[test]
fn no_two_calls_have_one_number() {
    let names = Names::parse(UAPI);
    let facts = rust_facts();
    let calls: Vec<u64> = names.calls().map(|(_, call)| facts[&call] & 0xff).collect();
    assert_eq!(
        calls.iter().collect::<BTreeSet<_>>().len(),
        calls.len(),
        "{calls:?}"
    );
}
