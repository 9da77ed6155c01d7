//! Advice: it changes where pages are, and never what they hold.
//!
//! Runs in the virtual GPU host: `bench/test guest_advised`.

use std::ops::Range;

use crate::common::driver::{counters, Driver, GPUS};
use crate::common::memory::{Area, HUGE, PAGE};
use crate::common::mirror::{
    device_check_by, device_fill_by, fault, snapshot, wants, MAP, MIGRATE, READ,
};
use crate::common::random::Random;
use crate::common::{assert_place, huge, moved, places, refused, to_device, to_system};
use hmm_gpu::{Advice, Device, Errno, Place, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Advises of some pages of an area.
#[track_caller]
fn advise(device: &Device, area: &Area, pages: Range<usize>, advice: Advice) {
    let addr = area.addr + pages.start * PAGE;
    device
        .advise_range(addr, pages.len() * PAGE, advice)
        .unwrap();
}

/// Catches device faults that move what is better where it is, or leave what is better on the device, and a request that minds.
#[test]
fn the_preferred_location_decides_what_device_faults_do() {
    let (driver, device) = Driver::load_with("bounce_ms=10000", GPUS[0]);
    let area = Area::filled(90, 1);
    advise(
        &device,
        &area,
        0..30,
        Advice::Location(Some(Target::System)),
    );
    advise(
        &device,
        &area,
        30..60,
        Advice::Location(Some(Target::Device)),
    );
    for (policy, rest) in [(MAP, Place::System), (MIGRATE, Place::Device)] {
        // Often enough for it to bounce.
        for seed in 2..7 {
            device_fill_by(&device, *area, seed, policy);
            assert_place(&device, area.part(0, 30), Place::System);
            assert_place(&device, area.part(30, 30), Place::Device);
            if seed < 5 {
                assert_place(&device, area.part(60, 30), rest);
            }
            area.check(seed);
        }
        to_system(&device, *area);
    }
    to_device(&device, *area);
    area.check(6);
    // Without it, all are alike.
    advise(&device, &area, 0..60, Advice::Location(None));
    device_check_by(&device, *area, 6, MAP);
    assert_place(&device, *area, Place::System);
    drop((area, device));
    driver.finish();
}

/// Catches read-mostly memory that moves, an entry for it that allows writing although the device only reads, and a write that is lost.
#[test]
fn what_is_read_mostly_is_mapped_where_it_is_for_reading() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(60, 1);
    advise(&device, &area, 20..40, Advice::ReadMostly(true));
    device_check_by(&device, *area, 1, MIGRATE);
    assert_place(&device, area.part(20, 20), Place::System);
    assert_place(&device, area.part(0, 20), Place::Device);
    let writable = |area: &Area, pages: Range<usize>| {
        let part = area.part(pages.start, pages.len());
        let seen = snapshot(&device, part);
        seen.iter()
            .filter(|seen| seen.is_mirrored_writable())
            .count()
    };
    assert_eq!(writable(&area, 20..40), 0);
    assert_eq!(writable(&area, 0..20), 20);
    // It can be written to all the same.
    device_fill_by(&device, area.part(25, 5), 2, MIGRATE);
    assert_eq!(writable(&area, 20..40), 5);
    assert_place(&device, area.part(20, 20), Place::System);
    area.part(25, 5).check(2);
    area.part(20, 5).check(1);
    area.part(30, 10).check(1);
    // And by the CPU, which the device sees.
    area.part(20, 20).fill(3);
    device_check_by(&device, area.part(20, 20), 3, MIGRATE);
    advise(&device, &area, 20..40, Advice::ReadMostly(false));
    area.part(20, 20).fill(4);
    let other = Device::open_path(device.path()).unwrap();
    device_check_by(&other, area.part(20, 20), 4, MIGRATE);
    assert_place(&device, area.part(20, 20), Place::Device);
    area.part(20, 20).check(4);
    drop((area, device, other));
    driver.finish();
}

/// Catches memory that goes to VRAM although it must not, and memory beside it, or of another client, that does not.
#[test]
fn what_must_not_migrate_stays() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(3 * HUGE, 1);
    advise(&device, &area, 500..600, Advice::NoMigrate(true));
    let answer = device
        .prefetch_range(area.addr, area.bytes(), Target::Device)
        .unwrap();
    assert_eq!(answer, moved(area.pages - 100, 0, 100, 0));
    device_check_by(&device, *area, 1, MIGRATE);
    assert_place(&device, area.part(500, 100), Place::System);
    assert_eq!(places(&device, *area).counts().device, area.pages - 100);
    // It is the client's own.
    let other = Device::open_path(device.path()).unwrap();
    to_device(&other, area.part(500, 100));
    // What is there stays, until it is asked back.
    advise(&device, &area, 0..100, Advice::NoMigrate(true));
    assert_place(&device, area.part(0, 100), Place::Device);
    to_system(&device, *area);
    advise(&device, &area, 0..area.pages, Advice::Reset);
    to_device(&device, *area);
    area.check(1);
    drop((area, device, other));
    driver.finish();
}

/// Catches a granularity that is not kept, or goes beyond the range that has it.
#[test]
fn faults_move_as_much_as_is_advised() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(3 * HUGE, 1);
    let first = area.addr / PAGE;
    assert_eq!(first % HUGE, 0);
    for (pages, page) in [(1, 5), (16, 100), (64, 300), (HUGE, HUGE + 7)] {
        advise(
            &device,
            &area,
            0..2 * HUGE,
            Advice::Granularity(Some(pages * PAGE)),
        );
        fault(&device, &mut [wants(area.page(page).addr, READ)], MIGRATE);
        let start = page / pages * pages;
        assert_place(&device, area.part(start, pages), Place::Device);
        assert_eq!(places(&device, *area).counts().device, pages, "{pages}");
        to_system(&device, *area);
    }
    advise(&device, &area, 0..2 * HUGE, Advice::Granularity(None));
    fault(&device, &mut [wants(area.page(9).addr, READ)], MIGRATE);
    assert_eq!(places(&device, *area).counts().device, 1);
    area.check(1);
    drop((area, device));
    driver.finish();
}

/// Catches advice that is left for who comes to be at the same address, or lost for what stays: unmapped in the middle, moved away,
/// mapped over, forked.
#[test]
fn advice_goes_with_the_mapping() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(100, 1);
    advise(&device, &area, 0..100, Advice::NoMigrate(true));
    let stays = |pages: Range<usize>| {
        let part = area.part(pages.start, pages.len());
        let answer = device
            .prefetch_range(part.addr, part.bytes(), Target::Device)
            .unwrap();
        to_system(&device, part);
        answer.skipped as usize / PAGE
    };
    assert_eq!(stays(0..100), 100);
    area.part(40, 10).unmap();
    area.part(40, 10)
        .map_over(RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    assert_eq!(stays(0..100), 90);
    area.part(90, 10)
        .map_over(RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    assert_eq!(stays(0..100), 80);
    area.part(0, 10).advise(libc::MADV_DONTNEED).unwrap();
    assert_eq!(stays(0..100), 80, "it is the same mapping");
    let room = Area::new(20);
    huge::remap(area.part(0, 20), room.addr, libc::MREMAP_DONTUNMAP);
    assert_eq!(stays(20..100), 60);
    drop(room);
    area.part(20, 20).check(1);
    area.part(50, 40).check(1);
    drop((area, device));
    driver.finish();
}

/// Catches ranges that are joined, split or dropped wrongly: random advice on random ranges, compared with a page-by-page model.
#[test]
fn advice_is_what_a_model_says() {
    const PAGES: usize = 64;

    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(PAGES, 1);
    let mut random = Random::new(11);
    let mut model = [false; PAGES];
    for _ in 0..300 {
        let first = random.below(PAGES);
        let pages = first..first + 1 + random.below(PAGES - first);
        match random.below(4) {
            0 => {
                model[pages.clone()].fill(true);
                advise(&device, &area, pages, Advice::NoMigrate(true));
            }
            1 => {
                model[pages.clone()].fill(false);
                advise(&device, &area, pages, Advice::Reset);
            }
            // Another kind, which leaves it.
            2 => advise(&device, &area, pages, Advice::Granularity(Some(PAGE))),
            _ => {
                model[pages.clone()].fill(false);
                let part = area.part(pages.start, pages.len());
                part.map_over(RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
                part.fill(1);
            }
        }
        let expected = model.iter().filter(|stays| **stays).count();
        let answer = device
            .prefetch_range(area.addr, area.bytes(), Target::Device)
            .unwrap();
        assert_eq!(answer.skipped as usize / PAGE, expected);
        let seen = places(&device, *area);
        for (i, page) in seen.pages().iter().enumerate() {
            assert_eq!(page.place() == Place::System, model[i], "page {i}");
        }
        to_system(&device, *area);
    }
    area.check(1);
    drop((area, device));
    driver.finish();
}

/// Catches bad advice that is taken, or has an effect, and more of it than a client may have.
#[test]
fn bad_advice_is_refused() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(4, 1);
    let call = |argument: hmm_gpu::uapi::hmm_gpu_advise| {
        let mut argument = argument;
        device.file().advise(&mut argument)
    };
    let good = hmm_gpu::uapi::hmm_gpu_advise {
        addr: area.addr as u64,
        len: area.bytes() as u64,
        advice: hmm_gpu::uapi::HMM_GPU_ADVICE_NO_MIGRATE,
        value: 1,
        ..Default::default()
    };
    for (what, bad, errno) in [
        (
            "no such advice",
            hmm_gpu::uapi::hmm_gpu_advise { advice: 5, ..good },
            Errno::INVAL,
        ),
        (
            "no such value",
            hmm_gpu::uapi::hmm_gpu_advise { value: 2, ..good },
            Errno::INVAL,
        ),
        (
            "a flag",
            hmm_gpu::uapi::hmm_gpu_advise { flags: 1, ..good },
            Errno::INVAL,
        ),
        (
            "reserved",
            hmm_gpu::uapi::hmm_gpu_advise {
                reserved: [0, 1],
                ..good
            },
            Errno::INVAL,
        ),
        (
            "no page",
            hmm_gpu::uapi::hmm_gpu_advise { len: 0, ..good },
            Errno::INVAL,
        ),
        (
            "half a page",
            hmm_gpu::uapi::hmm_gpu_advise {
                addr: good.addr + 8,
                ..good
            },
            Errno::INVAL,
        ),
        (
            "wrapping",
            hmm_gpu::uapi::hmm_gpu_advise {
                len: u64::MAX << 12,
                ..good
            },
            Errno::INVAL,
        ),
        (
            "the kernel",
            hmm_gpu::uapi::hmm_gpu_advise {
                addr: 0xffff_8880_0000_0000,
                ..good
            },
            Errno::FAULT,
        ),
        (
            "unmapped",
            hmm_gpu::uapi::hmm_gpu_advise {
                addr: 0x1000_0000_0000,
                ..good
            },
            Errno::FAULT,
        ),
    ] {
        assert_eq!(call(bad), Err(errno), "{what}");
    }
    for bytes in [0, 1, 4095, 12288, 4 << 20, usize::MAX] {
        let granularity = Advice::Granularity(Some(bytes));
        let result = device.advise_range(area.addr, area.bytes(), granularity);
        if bytes == 0 {
            result.unwrap();
        } else {
            assert_eq!(refused(result), Errno::INVAL, "{bytes}");
        }
    }
    to_device(&device, *area);
    assert_eq!(counters(&device).skipped_pages, 0);

    let many = Area::new(4096);
    let mut had = 0;
    let error = loop {
        let page = many.page(2 * had);
        match device.advise_range(page.addr, PAGE, Advice::NoMigrate(true)) {
            Ok(()) => had += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((had, error.errno()), (1024, Some(Errno::TOOBIG)));
    // Those that meet are one.
    advise(&device, &many, 0..4096, Advice::NoMigrate(true));
    advise(&device, &many, 7..8, Advice::Reset);
    many.fill(2);
    assert_eq!(
        device
            .prefetch_range(many.addr, many.bytes(), Target::Device)
            .unwrap(),
        moved(1, 0, 4095, 0)
    );
    many.check(2);
    drop((area, many, device));
    driver.finish();
}
