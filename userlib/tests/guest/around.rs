//! What comes along with a page that is touched, and what does not.
//!
//! Runs in the virtual GPU host: `bench/test guest_around`.

use std::time::Duration;

use crate::common::driver::{counters, Driver, GPUS};
use crate::common::memory::{Area, Span, HUGE};
use crate::common::mirror::{device_check_by, device_fill_by, MIGRATE};
use crate::common::{assert_place, places, to_device};
use hmm_gpu::{Device, Place};

/// How many CPU faults a deed costs.
fn faults(device: &Device, deed: impl FnOnce()) -> u64 {
    let before = counters(device).cpu_faults;
    deed();
    counters(device).cpu_faults - before
}

/// Pages of a span that are in VRAM.
fn resident(device: &Device, span: Span) -> usize {
    places(device, span).counts().device
}

/// Catches sequential touches that fault for each page, and neighbours that come back with a byte wrong.
#[test]
fn who_touches_page_after_page_gets_more_each_time() {
    let (driver, device) = Driver::load_with("fault_around=64", GPUS[0]);
    let area = Area::filled(4 * HUGE, 1);
    to_device(&device, *area);
    // 1, 2, 4, 8, 16, 32, and 64 from there on: in all 4 times 2 MiB, where each begins anew at the end of the last.
    let most = 7 + (4 * HUGE / 64) as u64 + 4;
    let took = faults(&device, || area.check(1));
    assert!(took <= most, "{took} faults for {} pages", area.pages);
    assert_place(&device, *area, Place::System);
    area.check(1);
    drop((area, device));
    driver.finish();
}

/// Catches a touch here and there that brings back what nobody asked for.
#[test]
fn who_touches_at_random_gets_one_page_each() {
    let (driver, device) = Driver::load_with("fault_around=64", GPUS[0]);
    let area = Area::filled(2 * HUGE, 2);
    to_device(&device, *area);
    // No two are neighbours, in an order that goes up and down.
    let touched = (0..100).map(|i| (i * 389) % 1000 / 2 * 2);
    let took = faults(&device, || touched.for_each(|page| area.page(page).touch()));
    assert_eq!(took, 100);
    assert_eq!(resident(&device, *area), area.pages - 100);
    area.check(2);
    drop((area, device));
    driver.finish();
}

/// Catches a limit that is not kept, and one page that is more than one.
#[test]
fn the_parameter_is_the_most_that_comes() {
    for (limit, most) in [(1, 1), (2, 2), (16, 16), (100_000, HUGE)] {
        let (driver, device) = Driver::load_with(&format!("fault_around={limit}"), GPUS[0]);
        let area = Area::filled(4 * HUGE, 3);
        to_device(&device, *area);
        let mut page = 0;
        while page < area.pages {
            let before = resident(&device, *area);
            area.page(page).touch();
            let came = before - resident(&device, *area);
            assert!((1..=most).contains(&came), "{came} with page {page}");
            page += came;
            if page >= 2 * HUGE && most == HUGE {
                break;
            }
            if most < HUGE && page > 100 {
                assert_eq!(came, most.min(HUGE - page % HUGE + came));
                break;
            }
        }
        area.check(3);
        drop((area, device));
        driver.finish();
    }
}

/// Catches neighbours that are brought from beyond the mapping, from holes, or from what may not be touched.
#[test]
fn what_is_not_there_does_not_come_along() {
    let (driver, device) = Driver::load_with("fault_around=64", GPUS[0]);
    let area = Area::filled(400, 4);
    to_device(&device, *area);
    area.part(50, 10).advise(libc::MADV_DONTNEED).unwrap();
    area.part(100, 20).protect(libc::PROT_NONE);
    area.part(200, 100).unmap();
    area.part(200, 100)
        .map_over(libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    area.part(0, 50).check(4);
    area.part(60, 40).check(4);
    assert_eq!(resident(&device, area.part(300, 100)), 100);
    area.part(120, 80).check(4);
    assert_eq!(resident(&device, area.part(300, 100)), 100);
    area.part(100, 20)
        .protect(libc::PROT_READ | libc::PROT_WRITE);
    assert_place(&device, area.part(100, 20), Place::Device);
    area.part(100, 20).check(4);
    area.part(50, 10).check_zero();
    area.part(300, 100).check(4);
    drop((area, device));
    driver.finish();
}

/// Catches a page that both sides want and that goes there and back for ever, and one that stays for ever since it once did.
#[test]
fn a_page_that_bounces_stays_for_a_while() {
    let (driver, device) = Driver::load_with("bounce_ms=1000", GPUS[0]);
    let area = Area::filled(20, 5);
    let page = area.page(10);
    let before = counters(&device);
    for seed in 6..9 {
        device_fill_by(&device, *area, seed, MIGRATE);
        assert_place(&device, page, Place::Device);
        page.check(seed);
    }
    assert_eq!(counters(&device).bounces - before.bounces, 3);
    // It is reached where it is, and its neighbours go.
    device_fill_by(&device, *area, 9, MIGRATE);
    assert_place(&device, page, Place::System);
    assert_place(&device, area.part(0, 10), Place::Device);
    assert_place(&device, area.part(11, 9), Place::Device);
    assert_eq!(counters(&device).kept_pages - before.kept_pages, 1);
    page.check(9);
    // Who asks for it to go is served.
    to_device(&device, *area);
    page.check(9);
    std::thread::sleep(Duration::from_millis(10_100));
    device_check_by(&device, *area, 9, MIGRATE);
    // Its entry is there still: another has to miss it.
    let other = Device::open_path(device.path()).unwrap();
    device_check_by(&other, *area, 9, MIGRATE);
    assert_place(&device, page, Place::Device);
    area.check(9);
    drop((area, device, other));
    driver.finish();
}

/// Catches pages that are said to bounce although nobody wants that known.
#[test]
fn without_a_window_nothing_bounces() {
    let (driver, device) = Driver::load_with("bounce_ms=0", GPUS[0]);
    let area = Area::filled(5, 1);
    for seed in 2..10 {
        device_fill_by(&device, *area, seed, MIGRATE);
        assert_place(&device, *area, Place::Device);
        area.check(seed);
    }
    let work = counters(&device);
    assert_eq!((work.bounces, work.kept_pages), (0, 0));
    drop((area, device));
    driver.finish();
}
