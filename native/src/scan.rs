//! The hash tracker's pass over a window: one look at every grain, while it is hot.
//!
//! A grain is tested for zero, hashed if it is not, and compared with what was
//! stored, all before the next one is touched, so that the window goes through the
//! cache once. Digests are XXH3-64 keyed with a full random 192-byte secret (never
//! a seed: collisions for a known seed are trivial to construct). 0 stands for a
//! zero grain, so a digest that happens to be 0 is stored as 1.
#![forbid(unsafe_code)]

use crate::error::{same_length, Refused, Result};
use crate::grain::{check_piece, is_zero};
use twox_hash::xxhash3_64::Hasher;

pub const SECRET_BYTES: usize = 192;

/// Digest of a grain that is all zero; no other grain has it.
pub const ZERO_GRAIN: u64 = 0;

/// What `scan` counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    pub dirty: usize,
    pub zero: usize,
}

/// The keyed digest of one full grain.
fn digest(grain: &[u8], secret: &[u8]) -> Result<u64> {
    if is_zero(grain) {
        return Ok(ZERO_GRAIN);
    }
    let digest = Hasher::oneshot_with_secret(secret, grain).map_err(|error| Refused(error.to_string()))?;
    Ok(digest.max(1))
}

/// Digest every grain of `window` into `new` and mark in `dirty` what differs from `old`.
///
/// `old` and `new` are 64-bit little-endian digests, one per grain. Without `old`
/// nothing is known and every grain is dirty. A short last grain is hashed as if
/// filled up with zeros.
pub fn scan(
    window: &[u8],
    grain_bytes: usize,
    secret: &[u8],
    old: Option<&[u8]>,
    new: &mut [u8],
    dirty: &mut [u8],
) -> Result<Counts> {
    check_piece("grain", grain_bytes)?;
    same_length("secret", secret.len(), SECRET_BYTES)?;
    let count = window.len().div_ceil(grain_bytes);
    same_length("new", new.len(), count * 8)?;
    same_length("dirty", dirty.len(), count)?;
    if let Some(old) = old {
        same_length("old", old.len(), count * 8)?;
    }

    let mut counts = Counts::default();
    let mut before = old.map(|old| old.chunks_exact(8));
    let mut padded = Vec::new();
    for ((grain, after), mark) in window.chunks(grain_bytes).zip(new.chunks_exact_mut(8)).zip(dirty) {
        let grain = if grain.len() == grain_bytes {
            grain
        } else {
            // At most once: only the last chunk of a window can be short.
            padded.extend_from_slice(grain);
            padded.resize(grain_bytes, 0);
            &padded
        };
        let value = digest(grain, secret)?;
        let bytes = value.to_le_bytes();
        let changed = match &mut before {
            Some(before) => before.next() != Some(bytes.as_slice()),
            None => true,
        };
        after.copy_from_slice(&bytes);
        *mark = u8::from(changed);
        counts.dirty += usize::from(changed);
        counts.zero += usize::from(value == ZERO_GRAIN);
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret() -> Vec<u8> {
        (0..SECRET_BYTES).map(|i| (i * 7 + 3) as u8).collect()
    }

    fn window(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i / 512 * 31 + i * 17) as u8 | 1).collect()
    }

    fn run(window: &[u8], old: Option<&[u8]>) -> (Counts, Vec<u8>, Vec<u8>) {
        let count = window.len().div_ceil(512);
        let (mut new, mut dirty) = (vec![0; count * 8], vec![0; count]);
        let counts = scan(window, 512, &secret(), old, &mut new, &mut dirty).unwrap();
        (counts, new, dirty)
    }

    #[test]
    fn finds_exactly_what_changed() {
        let mut data = window(8 * 512);
        data[1024..1536].fill(0);
        let (counts, old, dirty) = run(&data, None);
        assert_eq!(counts, Counts { dirty: 8, zero: 1 });
        assert_eq!(dirty, [1; 8]);
        assert_eq!(old[16..24], [0; 8]);
        assert_eq!(run(&data, Some(&old)).0, Counts { dirty: 0, zero: 1 });
        data[3 * 512 + 511] ^= 0x80;
        data[1024] = 1;
        let (counts, _, dirty) = run(&data, Some(&old));
        assert_eq!(counts, Counts { dirty: 2, zero: 0 });
        assert_eq!(dirty, [0, 0, 1, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn a_short_grain_counts_as_padded() {
        let mut data = window(2 * 512);
        data[700..].fill(0);
        assert_eq!(run(&data, None).1, run(&data[..700], None).1);
        assert_eq!(run(&[], None).0, Counts::default());
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let data = window(1024);
        let (mut new, mut dirty) = ([0; 16], [0; 2]);
        assert!(scan(&data, 512, &secret()[1..], None, &mut new, &mut dirty).is_err());
        assert!(scan(&data, 512, &secret(), Some(&[0; 15]), &mut new, &mut dirty).is_err());
        assert!(scan(&data, 512, &secret(), None, &mut new[1..], &mut dirty).is_err());
        assert!(scan(&data, 512, &secret(), None, &mut new, &mut dirty[1..]).is_err());
        assert!(scan(&data, 500, &secret(), None, &mut new, &mut dirty).is_err());
    }
}
