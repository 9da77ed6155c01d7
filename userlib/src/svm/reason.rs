//! Why memory is not in VRAM.

use super::SvmError;
use crate::Error;

/// Gives an error of a backend the name of the kernel, which it does not know.
pub(crate) fn explain(error: Error, name: &str) -> Error {
    match error {
        Error::Svm(SvmError::NotInVram { addr, why, .. }) => SvmError::NotInVram {
            kernel: name.to_owned(),
            addr,
            why,
        }
        .into(),
        other => other,
    }
}

/// Why the page at an address does not go to VRAM, as far as the process's own list of mappings tells.
pub(crate) fn why(addr: usize) -> String {
    match std::fs::read_to_string("/proc/self/maps") {
        Ok(maps) => of_maps(&maps, addr),
        Err(_) => String::from("/proc/self/maps cannot be read, so why is not known"),
    }
}

/// Whether the page at an address is private memory that the process may write to, of no file: such as goes to VRAM.
pub(crate) fn is_private(addr: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps");
    maps.is_ok_and(|maps| private_in(&maps, addr))
}

fn private_in(maps: &str, addr: usize) -> bool {
    let found = maps.lines().find_map(|line| mapping(line, addr));
    found.is_some_and(|(access, file)| {
        access.starts_with("rw") && access.ends_with('p') && !file.starts_with('/')
    })
}

fn of_maps(maps: &str, addr: usize) -> String {
    let Some((access, file)) = maps.lines().find_map(|line| mapping(line, addr)) else {
        return String::from("nothing is mapped there");
    };
    let named = |what: &str| match file {
        "" => what.to_owned(),
        file => format!("{what} of {file}"),
    };
    if access.ends_with('s') {
        return named("it is a shared mapping") + ", and only private memory migrates";
    }
    if file.starts_with('/') && !file.starts_with("/dev/zero") {
        return named("it is a private mapping")
            + ", whose pages are the file's until they are written to: copy it to memory of your own";
    }
    if file == "[vdso]" || file == "[vvar]" || file == "[vsyscall]" {
        return format!("it is the kernel's own {file}");
    }
    String::from("it is private memory that does not go: it is pinned (by an import, or a transfer), advised to stay, merged, or of huge pages \
        that were reserved")
}

/// How a line of `/proc/self/maps` maps the address, if it does: its access, and the name of its file.
fn mapping(line: &str, addr: usize) -> Option<(&str, &str)> {
    let mut fields = line.splitn(6, ' ');
    let (begin, end) = fields.next()?.split_once('-')?;
    let begin = usize::from_str_radix(begin, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    let access = fields.next()?;
    (begin <= addr && addr < end).then(|| (access, fields.nth(3).unwrap_or("").trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c0000000-55d0c0001000 r--p 00000000 08:01 131 /usr/bin/a program
7f0000000000-7f0000002000 rw-s 00000000 00:01 4 /dev/shm/x (deleted)
7f0000002000-7f0000003000 rw-p 00000000 00:00 0 
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0                          [vdso]
";

    #[test]
    fn each_kind_of_memory_has_a_reason_of_its_own() {
        assert!(of_maps(MAPS, 0x55d0_c000_0fff).contains("private mapping of /usr/bin/a program"));
        assert!(of_maps(MAPS, 0x7f00_0000_0000).contains("shared mapping of /dev/shm/x (deleted)"));
        assert!(of_maps(MAPS, 0x7f00_0000_2000).contains("pinned"));
        assert!(of_maps(MAPS, 0x7ffd_0000_0000).contains("[vdso]"));
        assert_eq!(of_maps(MAPS, 0x1000), "nothing is mapped there");
    }

    #[test]
    fn only_what_may_be_written_to_and_is_no_files_is_private() {
        assert!(private_in(MAPS, 0x7f00_0000_2fff));
        for other in [0x55d0_c000_0000, 0x7f00_0000_0000, 0x7ffd_0000_0000, 0x1000] {
            assert!(!private_in(MAPS, other), "{other:#x}");
        }
    }

    #[test]
    fn ones_own_memory_is_found() {
        let number = Box::new(1_u8);
        assert!(why(&raw const *number as usize).contains("private memory"));
    }
}
