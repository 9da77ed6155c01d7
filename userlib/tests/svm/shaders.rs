//! What is shipped as SPIR-V is what its source says, and valid.

use std::path::PathBuf;
use std::process::Command;

/// The clone.
fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// A folder of this test's own.
fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("hmm-gpu-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Runs a program that must succeed.
#[track_caller]
fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        said[0],
        said[1]
    );
}

/// Compiles a shader of the tests, and checks it.
pub(crate) fn compile(source: &str) -> Vec<u8> {
    let name = source.rsplit('/').next().unwrap();
    let to = folder(name);
    let binary = to.join("shader.spv");
    run(Command::new("glslangValidator")
        .args([
            "--quiet",
            "--target-env",
            "vulkan1.2",
            "-Iuserlib/shaders",
            "-o",
        ])
        .arg(&binary)
        .arg(source)
        .current_dir(top()));
    run(Command::new("spirv-val")
        .args(["--target-env", "vulkan1.2"])
        .arg(&binary));
    let spirv = std::fs::read(&binary).unwrap();
    std::fs::remove_dir_all(to).unwrap();
    spirv
}

/// Catches a source that was changed without its binary, a binary without a source, and one that `spirv-val` does not take.
#[test]
fn what_is_shipped_is_what_its_source_says() {
    let (shaders, to) = (top().join("userlib/shaders"), folder("shipped"));
    run(Command::new(shaders.join("build")).arg(&to));
    let list = |folder: &PathBuf, ext: &str| {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|of| of == ext))
            .map(|path| path.file_stem().unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    let names = list(&shaders, "comp");
    assert_eq!(names, list(&shaders, "spv"));
    let mut shipped: Vec<_> = hmm_gpu::Shipped::ALL
        .map(|shipped| std::ffi::OsString::from(shipped.name()))
        .to_vec();
    shipped.sort();
    assert_eq!(names, shipped);
    for shipped in hmm_gpu::Shipped::ALL {
        let name = format!("{}.spv", shipped.name());
        let built = std::fs::read(to.join(&name)).unwrap();
        assert!(
            built == shipped.spirv(),
            "{name} is not what its source says: make shaders"
        );
    }
    std::fs::remove_dir_all(to).unwrap();
}
