//! Canonical LEB128: seven bits a byte, least significant first, and exactly one
//! encoding per number. Anything longer than needed, or beyond 64 bits, is refused.
#![forbid(unsafe_code)]

use crate::error::{refuse, Result};

pub const MAX_BYTES: usize = 10;

/// Append `value` to `out`.
pub fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The number at the start of `bytes`, and what follows it.
pub fn take(bytes: &[u8]) -> Result<(u64, &[u8])> {
    let mut value = 0;
    for (position, &byte) in bytes.iter().enumerate() {
        if position == MAX_BYTES - 1 && byte > 1 {
            return refuse("a varint of more than 64 bits");
        }
        value |= u64::from(byte & 0x7f) << (7 * position);
        if byte & 0x80 == 0 {
            if byte == 0 && position > 0 {
                return refuse("a varint that is longer than it needs to be");
            }
            let (_, rest) = bytes.split_at(position + 1);
            return Ok((value, rest));
        }
    }
    refuse("a varint that is cut off")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_returns() {
        for shift in 0..64 {
            for value in [1u64 << shift, (1 << shift) - 1, u64::MAX >> shift] {
                let mut bytes = Vec::new();
                put(&mut bytes, value);
                assert!(bytes.len() <= MAX_BYTES);
                bytes.push(0xaa);
                assert_eq!(take(&bytes).unwrap(), (value, [0xaa].as_slice()));
            }
        }
    }

    #[test]
    fn other_encodings_are_refused() {
        let beyond = [[0xff; 9].as_slice(), &[0x02]].concat();
        let endless = [0x80; 32];
        for bytes in [&[][..], &[0x80], &[0x80, 0x00], &[0xff, 0x80, 0x00], &beyond, &endless] {
            assert!(take(bytes).is_err(), "{bytes:02x?}");
        }
        let most = [[0xff; 9].as_slice(), &[0x01]].concat();
        assert_eq!(take(&most).unwrap().0, u64::MAX);
    }
}
