//! Seals: AES-256-GCM under the key of one delta file.
//!
//! A seal is ciphertext ‖ tag. Its nonce is its place, kind ‖ segment ‖ chunk, and its associated data are the digest
//! of the file's header, the place again, and what the plaintext says about itself (raw length ‖ flags), all numbers
//! u32 little-endian. That no place is sealed twice under one key is the caller's duty (`replica/delta/seal.py`).
#![forbid(unsafe_code)]

use crate::error::{refuse, same_length, Fault, Refused, Result};
use ring::aead::{Aad, LessSafeKey, Nonce, Tag, UnboundKey, AES_256_GCM, NONCE_LEN};

pub const TAG_BYTES: usize = 16;
const DIGEST_BYTES: usize = 32;

/// What is sealed; the first word of the nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Manifest = 1,
    Table = 2,
    Chunk = 3,
}

impl Kind {
    pub fn of(number: u32) -> Result<Kind> {
        match number {
            1 => Ok(Kind::Manifest),
            2 => Ok(Kind::Table),
            3 => Ok(Kind::Chunk),
            _ => refuse(format!("a seal of kind {number}")),
        }
    }
}

/// Where something is sealed, and as what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub kind: Kind,
    pub segment: u32,
    pub chunk: u32,
    pub raw_bytes: u32,
    pub flags: u32,
}

impl Place {
    /// That of a segment's table of so many bytes.
    pub fn table(segment: u32, table_bytes: u32) -> Place {
        Place { kind: Kind::Table, segment, chunk: 0, raw_bytes: table_bytes, flags: 0 }
    }

    fn nonce(&self) -> [u8; NONCE_LEN] {
        filled(words([self.kind as u32, self.segment, self.chunk]))
    }

    fn associated(&self, header_digest: [u8; DIGEST_BYTES]) -> [u8; DIGEST_BYTES + NONCE_LEN + 8] {
        filled(header_digest.into_iter().chain(self.nonce()).chain(words([self.raw_bytes, self.flags])))
    }

    fn name(&self) -> String {
        match self.kind {
            Kind::Manifest => "manifest".into(),
            Kind::Table => format!("segment {} (table {})", self.segment, self.chunk),
            Kind::Chunk => format!("segment {} (chunk {})", self.segment, self.chunk),
        }
    }
}

fn words<const N: usize>(numbers: [u32; N]) -> impl Iterator<Item = u8> {
    numbers.into_iter().flat_map(u32::to_le_bytes)
}

fn filled<const N: usize>(bytes: impl Iterator<Item = u8>) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(bytes) {
        *to = from;
    }
    out
}

/// Seals and opens in one delta file. `name` is the file's, for what is said of it.
pub struct Cipher {
    key: LessSafeKey,
    header_digest: [u8; DIGEST_BYTES],
    pub name: String,
}

impl Cipher {
    pub fn new(key: &[u8], header_digest: &[u8], name: String) -> Result<Cipher> {
        same_length("key", key.len(), AES_256_GCM.key_len())?;
        same_length("header digest", header_digest.len(), DIGEST_BYTES)?;
        let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| Refused("a key that AES does not take".into()))?;
        Ok(Cipher { key: LessSafeKey::new(key), header_digest: filled(header_digest.iter().copied()), name })
    }

    /// Seal in place: `room` is the plaintext and 16 bytes more, which become the tag.
    pub fn seal(&self, place: Place, room: &mut [u8]) -> Result<()> {
        let Some((text, tag)) = room.split_last_chunk_mut::<TAG_BYTES>() else {
            return refuse(format!("{} bytes hold no seal", room.len()));
        };
        let nonce = Nonce::assume_unique_for_key(place.nonce());
        let made = self.key.seal_in_place_separate_tag(nonce, Aad::from(place.associated(self.header_digest)), text);
        tag.copy_from_slice(
            made.map_err(|_| Refused(format!("{} bytes are too many for a seal", text.len())))?.as_ref(),
        );
        Ok(())
    }

    /// Open `sealed` into `plain`, which is 16 bytes shorter. After an error what is in `plain` means nothing.
    pub fn open(&self, place: Place, sealed: &[u8], plain: &mut [u8]) -> Result<(), Fault> {
        let damaged = || Fault::Damaged(format!("the {} of {} is not as it was sealed", place.name(), self.name));
        let (text, tag) = sealed.split_last_chunk::<TAG_BYTES>().ok_or_else(damaged)?;
        same_length("the room for the plaintext", plain.len(), text.len())?;
        plain.copy_from_slice(text);
        let nonce = Nonce::assume_unique_for_key(place.nonce());
        let associated = Aad::from(place.associated(self.header_digest));
        self.key.open_in_place_separate_tag(nonce, associated, Tag::from(*tag), plain, 0..).map_err(|_| damaged())?;
        Ok(())
    }

    /// `open` into memory of its own.
    pub fn open_whole(&self, place: Place, sealed: &[u8]) -> Result<Vec<u8>, Fault> {
        let mut plain = vec![0; sealed.len().saturating_sub(TAG_BYTES)];
        self.open(place, sealed, &mut plain)?;
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { kind: Kind::Chunk, segment: 5, chunk: 6, raw_bytes: 7, flags: 1 };

    fn cipher(key: u8, digest: u8) -> Cipher {
        Cipher::new(&[key; 32], &[digest; 32], "x".into()).unwrap()
    }

    fn sealed(text: &[u8]) -> Vec<u8> {
        let mut room = [text, &[0; TAG_BYTES]].concat();
        cipher(1, 2).seal(PLACE, &mut room).unwrap();
        room
    }

    #[test]
    fn place_and_header_are_bound_as_the_format_says() {
        assert_eq!(PLACE.nonce(), [3, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0]);
        let associated = PLACE.associated([9; 32]);
        assert_eq!(associated[..32], [9; 32]);
        assert_eq!(associated[32..44], PLACE.nonce());
        assert_eq!(associated[44..], [7, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn opens_with_the_same_key_file_and_place_only() {
        let seal = sealed(b"content");
        assert_eq!(cipher(1, 2).open_whole(PLACE, &seal).unwrap(), b"content");
        let others = [
            Place { kind: Kind::Table, ..PLACE },
            Place { segment: 6, ..PLACE },
            Place { chunk: 7, ..PLACE },
            Place { raw_bytes: 8, ..PLACE },
            Place { flags: 0, ..PLACE },
        ];
        for place in others {
            assert!(matches!(cipher(1, 2).open_whole(place, &seal), Err(Fault::Damaged(_))));
        }
        for other in [cipher(2, 2), cipher(1, 1)] {
            assert!(matches!(other.open_whole(PLACE, &seal), Err(Fault::Damaged(_))));
        }
    }

    #[test]
    fn every_flipped_bit_and_cut_is_seen() {
        let seal = sealed(b"content");
        for bit in 0..seal.len() * 8 {
            let mut other = seal.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            let found = cipher(1, 2).open_whole(PLACE, &other);
            assert_eq!(found, Err(Fault::Damaged("the segment 5 (chunk 6) of x is not as it was sealed".into())));
        }
        for length in 0..seal.len() {
            assert!(matches!(cipher(1, 2).open_whole(PLACE, &seal[..length]), Err(Fault::Damaged(_))));
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        assert!(Cipher::new(&[0; 31], &[0; 32], String::new()).is_err());
        assert!(Cipher::new(&[0; 32], &[0; 33], String::new()).is_err());
        assert!(cipher(1, 2).seal(PLACE, &mut [0; 15]).is_err());
        assert!(matches!(cipher(1, 2).open(PLACE, &sealed(b"ab"), &mut [0; 3]), Err(Fault::Refused(_))));
        assert!(Kind::of(0).is_err() && Kind::of(4).is_err());
    }
}
