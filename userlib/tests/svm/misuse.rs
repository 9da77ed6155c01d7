//! What is done wrong is said, and changes nothing.

use hmm_gpu::{Args, Errno, Error, Shipped, Strategy, SvmContext, SvmError};

use crate::data::{alone, compiled, context, contexts, has_vulkan};

#[track_caller]
fn svm(error: Error) -> SvmError {
    match error {
        Error::Svm(error) => error,
        other => panic!("{other}"),
    }
}

/// Catches a shader that can store before all of its operands are there, or elsewhere.
#[test]
fn a_shader_that_does_what_it_must_not_changes_nothing() {
    let _alone = alone();
    let said = [
        "before `svm_commit`",
        "outside of the span",
        "for reading",
        "after `svm_commit`",
        "4096 bytes",
    ];
    for context in contexts(64) {
        let kernel = compiled(&context, "misuse").unwrap();
        for what in [0_u32, 1, 2, 3, 4, 6] {
            let mut words = vec![7_u32; 64];
            let args = Args::new().write(&mut words).value(what);
            // SAFETY: the kernel does nothing but what is refused.
            let error = unsafe { context.dispatch(&kernel, args, 1) }.unwrap_err();
            let error = svm(error);
            assert!(
                matches!(error, SvmError::Misuse { .. }),
                "{context}, {what}: {error}"
            );
            let expected = if what == 6 {
                said[1]
            } else {
                said[what as usize]
            };
            assert!(
                error.to_string().contains(expected),
                "{context}, {what}: {error}"
            );
            assert_eq!(words, [7; 64], "{context}, {what}");
        }
        // It works on after that.
        crate::data::saxpy(&context, 5000);
    }
}

/// Catches a wild pointer that is followed.
#[test]
fn a_pointer_to_nothing_is_named() {
    let _alone = alone();
    for context in contexts(64) {
        let kernel = compiled(&context, "misuse").unwrap();
        let mut words = vec![7_u32; 64];
        let args = Args::new().write(&mut words).value(5_u32);
        // SAFETY: the kernel reads at 8, where nothing is, and ends then.
        let error = unsafe { context.dispatch(&kernel, args, 1) }.unwrap_err();
        match error {
            Error::Fault { fault, errno } => {
                assert_eq!((fault.addr, errno), (8, Errno::FAULT), "{context}")
            }
            Error::Svm(SvmError::OutOfReach { addr, strategy, .. }) => {
                assert_eq!((addr, strategy), (8, context.strategy()));
                assert!(strategy.needs_names());
            }
            other => panic!("{context}: {other}"),
        }
    }
}

/// Catches memory that a strategy without pointers reaches by chance, and writing to what is borrowed for reading.
#[test]
fn what_was_not_named_is_out_of_reach() {
    let _alone = alone();
    for strategy in [Strategy::Copy, Strategy::Mapped] {
        let context = context(strategy, 0);
        let kernel = context.kernel(Shipped::Saxpy).unwrap();
        let (x, y) = (vec![1.0_f32; 5000], vec![1.0_f32; 5000]);
        for (named, missing) in [(&x, &y), (&y, &x)] {
            let args = Args::new()
                .pointer(x.as_ptr())
                .pointer(y.as_ptr())
                .value(5000_u64)
                .value(1.0_f32)
                .reach(&named[..]);
            // SAFETY: nothing is written, since one of the two is always missing, or for reading only.
            let error = svm(unsafe { context.dispatch(&kernel, args, 5) }.unwrap_err());
            let SvmError::OutOfReach { addr, .. } = error else {
                panic!("{error}")
            };
            let inside = |of: &Vec<f32>| {
                of.as_ptr_range()
                    .contains(&std::ptr::with_exposed_provenance(addr))
            };
            assert!(inside(missing) || inside(&y), "{addr:#x}");
        }
        assert_eq!(y, vec![1.0; 5000]);
    }
}

#[test]
fn what_cannot_be_had_is_named() {
    let _alone = alone();
    if !has_vulkan() {
        return;
    }
    let nothing = SvmContext::builder().device("no such").build().unwrap_err();
    assert!(
        nothing
            .to_string()
            .contains("no Vulkan device named `no such`: there are "),
        "{nothing}"
    );
    let translated = SvmContext::builder()
        .strategy(Strategy::Translated)
        .build()
        .unwrap_err();
    let text = translated.to_string();
    assert!(
        text.contains("`translated` is not available on llvmpipe"),
        "{text}"
    );

    let (one, other) = (context(Strategy::Copy, 0), context(Strategy::Copy, 0));
    let kernel = one.kernel(Shipped::Saxpy).unwrap();
    // SAFETY: it does not run.
    let foreign = svm(unsafe { other.dispatch(&kernel, Args::new(), 1) }.unwrap_err());
    assert!(matches!(foreign, SvmError::Foreign { .. }), "{foreign}");
    let grid = [1 << 16, 1 << 16, 1];
    // SAFETY: as above.
    let many = svm(unsafe { one.dispatch(&kernel, Args::new(), grid) }.unwrap_err());
    assert!(matches!(many, SvmError::TooMany { .. }), "{many}");
    assert!(matches!(
        one.saxpy(1.0, &[1.0], &mut []),
        Err(Error::Lengths { from: 1, to: 0 })
    ));
    for bytes in [
        &b"abc"[..],
        b"",
        b"no SPIR-V at all",
        &Shipped::Saxpy.spirv()[..100],
    ] {
        // SAFETY: it is refused before Vulkan sees it.
        let error = svm(unsafe { one.kernel_from_spirv("x", bytes) }.unwrap_err());
        assert!(matches!(error, SvmError::NotAKernel { .. }), "{error}");
    }
}
