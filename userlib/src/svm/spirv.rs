//! What has to be known of a shader before it is made a pipeline.

use super::SvmError;

const MAGIC: u32 = 0x0723_0203;
const HEADER_WORDS: usize = 5;

// Numbers of the SPIR-V specification.
const OP_ENTRY_POINT: u32 = 15;
const OP_EXECUTION_MODE: u32 = 16;
const OP_CAPABILITY: u32 = 17;
const OP_DECORATE: u32 = 71;
const GL_COMPUTE: u32 = 5;
const LOCAL_SIZE: u32 = 17;
const SPEC_ID: u32 = 1;
const CAPABILITY_FLOAT64: u32 = 10;
const CAPABILITY_INT64: u32 = 11;
const CAPABILITY_INT64_ATOMICS: u32 = 12;
const CAPABILITY_ADDRESSES: u32 = 5347;
/// What kernels may ask for: Matrix, Shader, and those above.
const KNOWN: [u32; 6] = [
    0,
    1,
    CAPABILITY_FLOAT64,
    CAPABILITY_INT64,
    CAPABILITY_INT64_ATOMICS,
    CAPABILITY_ADDRESSES,
];

/// What a module says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// Invocations of a group.
    pub(crate) group: u32,
    /// Whether invocations keep something from round to round.
    pub(crate) saves: bool,
    pub(crate) atomic64: bool,
    pub(crate) float64: bool,
}

fn not(problem: impl Into<String>) -> SvmError {
    SvmError::NotAKernel {
        problem: problem.into(),
    }
}

/// The words of a SPIR-V module as it is in a file, of either byte order.
pub(crate) fn words(bytes: &[u8]) -> Result<Vec<u32>, SvmError> {
    let chunks = bytes.chunks_exact(4);
    if !chunks.remainder().is_empty() {
        return Err(not("SPIR-V is made of words of 4 bytes"));
    }
    let words: Vec<u32> = chunks
        .map(|chunk| u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]))
        .collect();
    match words.first() {
        Some(&MAGIC) => Ok(words),
        Some(first) if first.swap_bytes() == MAGIC => {
            Ok(words.into_iter().map(u32::swap_bytes).collect())
        }
        _ => Err(not("it does not begin as SPIR-V does")),
    }
}

impl Module {
    /// Looks at a module: one that is a compute shader of `hmm_svm.glsl`.
    pub(crate) fn parse(words: &[u32]) -> Result<Self, SvmError> {
        if words.first() != Some(&MAGIC) || words.len() < HEADER_WORDS {
            return Err(not("it does not begin as SPIR-V does"));
        }
        let (mut group, mut entries, mut mode) = (None, 0, false);
        let mut module = Self {
            group: 0,
            saves: false,
            atomic64: false,
            float64: false,
        };
        let mut rest = &words[HEADER_WORDS..];
        while let Some(&first) = rest.first() {
            let (op, count) = (first & 0xffff, (first >> 16) as usize);
            if count == 0 || count > rest.len() {
                return Err(not("an instruction of it is cut off"));
            }
            let (instruction, after) = rest.split_at(count);
            rest = after;
            match (op, &instruction[1..]) {
                (OP_ENTRY_POINT, [model, _, name @ ..]) => {
                    entries += 1;
                    if *model != GL_COMPUTE {
                        return Err(not("it is not a compute shader"));
                    }
                    if name.first() != Some(&u32::from_le_bytes(*b"main"))
                        || name.get(1).is_some_and(|next| next & 0xff != 0)
                    {
                        return Err(not("its entry point is not called `main`"));
                    }
                }
                (OP_EXECUTION_MODE, [_, LOCAL_SIZE, x, y, z]) => {
                    group = x.checked_mul(*y).and_then(|xy| xy.checked_mul(*z));
                }
                (OP_DECORATE, [_, SPEC_ID, 0]) => mode = true,
                (OP_DECORATE, [_, SPEC_ID, 1]) => module.saves = true,
                (OP_CAPABILITY, [capability]) => {
                    if !KNOWN.contains(capability) {
                        return Err(not(format!(
                            "it asks for capability {capability} of SPIR-V, which is not enabled"
                        )));
                    }
                    module.atomic64 |= *capability == CAPABILITY_INT64_ATOMICS;
                    module.float64 |= *capability == CAPABILITY_FLOAT64;
                }
                _ => {}
            }
        }
        if entries != 1 {
            return Err(not(format!("it has {entries} entry points, not one")));
        }
        if !mode {
            return Err(not(
                "it does not include `hmm_svm.glsl`: nothing says how addresses are translated",
            ));
        }
        module.group = group
            .filter(|group| (1..=1024).contains(group))
            .ok_or_else(|| not("it does not say how many invocations, up to 1024, a group has"))?;
        Ok(module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped() -> Vec<u32> {
        words(include_bytes!("../../shaders/list.spv")).unwrap()
    }

    #[test]
    fn a_shipped_kernel_is_understood() {
        assert_eq!(
            Module::parse(&shipped()).unwrap(),
            Module {
                group: 64,
                saves: true,
                atomic64: false,
                float64: false
            }
        );
        let reduce = words(include_bytes!("../../shaders/reduce.spv")).unwrap();
        let module = Module::parse(&reduce).unwrap();
        assert!(module.atomic64 && !module.saves);
    }

    #[test]
    fn either_byte_order_is() {
        let swapped: Vec<u8> = shipped()
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .collect();
        assert_eq!(words(&swapped).unwrap(), shipped());
    }

    /// Catches reading beyond the end, and a loop without an end.
    #[test]
    fn what_is_cut_off_or_spoilt_is_refused_or_understood_and_ends() {
        let whole = shipped();
        for len in 0..whole.len() {
            let _ = Module::parse(&whole[..len]);
        }
        for at in 0..whole.len() {
            for word in [0, 1, 0xffff_ffff, 17 | (2 << 16)] {
                let mut spoilt = whole.clone();
                spoilt[at] = word;
                let _ = Module::parse(&spoilt);
            }
        }
        assert!(words(b"abc").is_err());
        assert!(words(b"abcd").is_err());
        assert!(Module::parse(&[]).is_err());
    }

    #[test]
    fn what_the_include_has_not_told_is_said() {
        let mut other = shipped();
        let at = other
            .windows(4)
            .position(|w| w[0] == (OP_DECORATE | (4 << 16)) && w[2] == SPEC_ID && w[3] == 0)
            .unwrap();
        other[at + 3] = 7;
        let error = Module::parse(&other).unwrap_err().to_string();
        assert!(error.contains("hmm_svm.glsl"), "{error}");
    }
}
