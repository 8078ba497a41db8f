//! A window of a disk cut into equal pieces, and which of them are all zero.
//!
//! The last piece of a window may be short (the disk ends inside it); it counts as
//! if it were filled up with zeros.
#![forbid(unsafe_code)]

use crate::error::{refuse, same_length, Result};

/// Smallest and largest piece a kernel takes: the smallest grain, the largest leaf.
pub const MIN_PIECE_BYTES: usize = 512;
pub const MAX_PIECE_BYTES: usize = 1 << 20;

/// `bytes` if it is a power of two from 512 to 1 MiB. `what` is "grain" or "leaf".
pub fn check_piece(what: &str, bytes: usize) -> Result<usize> {
    if bytes.is_power_of_two() && (MIN_PIECE_BYTES..=MAX_PIECE_BYTES).contains(&bytes) {
        return Ok(bytes);
    }
    refuse(format!("a {what} of {bytes} bytes is no power of two from {MIN_PIECE_BYTES} to {MAX_PIECE_BYTES}"))
}

/// Whether every byte is zero.
///
/// Goes on in blocks that the compiler turns into vector ORs, and stops at the
/// first block that is not zero, so that live data costs next to nothing.
pub fn is_zero(bytes: &[u8]) -> bool {
    let blocks = bytes.chunks_exact(256);
    let rest = blocks.remainder();
    let blank = |block: &[u8]| block.iter().fold(0, |seen, byte| seen | byte) == 0;
    blocks.into_iter().all(blank) && blank(rest)
}

/// `out[i] = 1` where grain `i` of the window is all zero, else 0.
pub fn mark_zeros(window: &[u8], grain_bytes: usize, out: &mut [u8]) -> Result<()> {
    check_piece("grain", grain_bytes)?;
    same_length("out", out.len(), window.len().div_ceil(grain_bytes))?;
    for (grain, mark) in window.chunks(grain_bytes).zip(out) {
        *mark = u8::from(is_zero(grain));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_seen() {
        for length in [0, 1, 7, 255, 256, 257, 511, 512, 4096, 4097] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "byte {at} of {length}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn the_short_last_grain_is_a_grain() {
        let mut window = vec![0; 3 * 512 + 1];
        window[512] = 1;
        window[3 * 512] = 1;
        let mut out = [9; 4];
        mark_zeros(&window, 512, &mut out).unwrap();
        assert_eq!(out, [1, 0, 1, 0]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        for bytes in [0, 1, 256, 513, 4095, 2 << 20, usize::MAX] {
            assert!(check_piece("grain", bytes).is_err());
        }
        assert!(mark_zeros(&[0; 1024], 512, &mut [0; 1]).is_err());
        assert!(mark_zeros(&[0; 1024], 512, &mut [0; 3]).is_err());
    }
}
