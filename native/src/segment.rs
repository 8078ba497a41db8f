//! Segments: sealed whole and opened whole.
//!
//! ```text
//! blob  = number u32 ‖ length of the sealed table u32 ‖ sealed table ‖ sealed chunks, one after the other
//! table = disk u32 ‖ chunks u32 ‖ extents u32 ‖ chunk rows ‖ encoded extents
//! chunk row = raw length u32 ‖ flags u32 (0 stored, 1 zstd frame) ‖ sealed length u32
//! ```
//!
//! Both directions are two steps, so that the result is written once, into memory of exactly its size: `Sealing` cuts
//! and compresses, then seals chunk by chunk and hashes the blob; `Opening` opens and checks the
//! table, then each chunk into its place. Every number is checked before memory is asked for by it.
#![forbid(unsafe_code)]

use crate::chunk::{self, Cut, Row};
use crate::error::{malformed, refuse, same_length, Fault, Refused, Result};
use crate::extents::{self, ROW_BYTES};
use crate::seal::{Cipher, Kind, Place, TAG_BYTES};
use std::mem;

pub const RAW_BYTES: usize = 4 << 20;
pub const MAX_EXTENTS: usize = 16384;
pub const MAX_CHUNKS: usize = RAW_BYTES / (32 << 10);
pub const DIGEST_BYTES: usize = blake3::OUT_LEN;
const PREFIX_BYTES: usize = 8;
const HEAD_BYTES: usize = 12;

/// The front of `room`, which becomes the rest.
fn take<'a>(room: &mut &'a mut [u8], count: usize) -> Result<&'a mut [u8]> {
    let Some((front, rest)) = mem::take(room).split_at_mut_checked(count) else {
        return refuse("the room for a segment is too small");
    };
    *room = rest;
    Ok(front)
}

fn number(count: usize) -> Result<u32> {
    u32::try_from(count).map_err(|_| Refused(format!("{count} does not fit 32 bits")))
}

/// A segment on its way to a blob: compressed, not sealed.
pub struct Sealing<'a> {
    number: u32,
    cut: Cut<'a>,
    table: Vec<u8>,
}

impl<'a> Sealing<'a> {
    /// Cut and compress the payload of the extents in `rows` (a table in memory).
    pub fn new(number: u32, disk: u32, rows: &[u8], payload: &'a [u8], level: i32) -> Result<Sealing<'a>> {
        let count_extents = rows.len() / ROW_BYTES;
        if !(1..=MAX_EXTENTS).contains(&count_extents) || payload.len() > RAW_BYTES {
            return refuse(format!("a segment of {count_extents} extents and {} bytes", payload.len()));
        }
        let cut = chunk::cut(payload, level)?;
        let head = [disk, self::number(cut.pieces.len())?, self::number(count_extents)?];
        let mut table: Vec<u8> = head.into_iter().flat_map(u32::to_le_bytes).collect();
        for piece in &cut.pieces {
            let (flags, body) = cut.body(piece);
            let row = [self::number(piece.raw.len())?, flags, self::number(body.len() + TAG_BYTES)?];
            table.extend(row.into_iter().flat_map(u32::to_le_bytes));
        }
        table.extend(extents::encode(rows)?);
        Ok(Sealing { number, cut, table })
    }

    pub fn blob_bytes(&self) -> usize {
        let chunks = self.cut.pieces.iter().map(|piece| self.cut.body(piece).1.len() + TAG_BYTES);
        PREFIX_BYTES + self.table.len() + TAG_BYTES + chunks.sum::<usize>()
    }

    /// Seal into `room`, which has `blob_bytes`. Returns the blob's BLAKE3 digest.
    pub fn write(&self, cipher: &Cipher, room: &mut [u8]) -> Result<[u8; DIGEST_BYTES]> {
        let mut rest = &mut *room;
        let mut seal = |place: Place, text: &[u8], prefix: &[u8]| -> Result<()> {
            let out = take(&mut rest, prefix.len() + text.len() + TAG_BYTES)?;
            let (front, sealed) = out.split_at_mut(prefix.len());
            front.copy_from_slice(prefix);
            sealed.split_at_mut(text.len()).0.copy_from_slice(text);
            cipher.seal(place, sealed)
        };
        let table_bytes = self::number(self.table.len())?;
        let prefix = [self.number.to_le_bytes(), (table_bytes + TAG_BYTES as u32).to_le_bytes()].concat();
        seal(Place::table(self.number, table_bytes), &self.table, &prefix)?;
        for (index, piece) in self.cut.pieces.iter().enumerate() {
            let (flags, body) = self.cut.body(piece);
            let (chunk, raw_bytes) = (self::number(index)?, self::number(piece.raw.len())?);
            seal(Place { kind: Kind::Chunk, segment: self.number, chunk, raw_bytes, flags }, body, &[])?;
        }
        same_length("what is left of the room for a segment", rest.len(), 0)?;
        Ok(blake3::hash(room).into()) // at once: chunks of odd lengths, one by one, keep its SIMD lanes empty
    }
}

/// A segment's opened table.
#[derive(Debug)]
pub struct Table {
    pub disk: u32,
    pub chunks: Vec<Row>,
    /// A table of extents in memory, valid, of 1 to `MAX_EXTENTS` rows.
    pub extents: Vec<u8>,
}

impl Table {
    /// Open the sealed table of segment `number`, whose blob has `blob_bytes`.
    pub fn open(cipher: &Cipher, number: u32, sealed: &[u8], blob_bytes: usize) -> Result<Table, Fault> {
        let table_bytes = self::number(sealed.len())?.saturating_sub(TAG_BYTES as u32);
        let plain = cipher.open_whole(Place::table(number, table_bytes), sealed)?;
        let table = format!("the table of segment {number} of {}", cipher.name);
        let Some((head, rest)) = plain.split_at_checked(HEAD_BYTES) else {
            return malformed(format!("{table} is too short"));
        };
        let [disk, count_chunks, count_extents] = numbers(head);
        let (count_chunks, count_extents) = (count_chunks as usize, count_extents as usize);
        let bounded = count_chunks <= MAX_CHUNKS && (1..=MAX_EXTENTS).contains(&count_extents);
        let Some((rows, encoded)) = rest.split_at_checked(count_chunks * HEAD_BYTES).filter(|_| bounded) else {
            return malformed(format!("{table} is out of bounds"));
        };
        let extents = match extents::decode(encoded, count_extents) {
            Ok(extents) => extents,
            Err(error) => return malformed(format!("{table}: {error}")),
        };
        let chunks: Vec<Row> = rows
            .chunks_exact(HEAD_BYTES)
            .map(numbers)
            .map(|[raw_bytes, flags, sealed_bytes]| Row { raw_bytes, flags, sealed_bytes })
            .collect();
        let possible = chunks.iter().enumerate().all(|(index, row)| row.is_possible(index + 1 == count_chunks));
        if !possible || extents.len() != count_extents * ROW_BYTES {
            return malformed(format!("{table} has chunks or extents that cannot be"));
        }
        let opened = Table { disk, chunks, extents };
        let bodies: usize = opened.chunks.iter().map(|row| row.sealed_bytes as usize).sum();
        if opened.payload_bytes() > RAW_BYTES || PREFIX_BYTES + sealed.len() + bodies != blob_bytes {
            return malformed(format!("{table} does not fit the segment's {blob_bytes} bytes"));
        }
        Ok(opened)
    }

    pub fn payload_bytes(&self) -> usize {
        self.chunks.iter().map(|row| row.raw_bytes as usize).sum()
    }

    /// Its chunk rows as they stand in the table.
    pub fn rows(&self) -> Vec<u8> {
        let row = |row: &Row| [row.raw_bytes, row.flags, row.sealed_bytes];
        self.chunks.iter().flat_map(row).flat_map(u32::to_le_bytes).collect()
    }
}

/// Three numbers of 4 bytes each; fewer bytes make zeros.
fn numbers(bytes: &[u8]) -> [u32; 3] {
    let mut numbers = [0; 3];
    for (to, from) in numbers.iter_mut().zip(bytes.chunks_exact(4)) {
        *to = from.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
    }
    numbers
}

/// A segment on its way from a blob: its table is opened and fits, its payload is not opened yet.
pub struct Opening<'a> {
    number: u32,
    chunks: &'a [u8],
    pub table: Table,
}

impl<'a> Opening<'a> {
    /// `table_bytes` is the length of the sealed table that `blob` names, `grain_bytes` that of the disk's grains.
    pub fn new(
        cipher: &Cipher,
        number: u32,
        blob: &'a [u8],
        table_bytes: usize,
        grain_bytes: u64,
    ) -> Result<Opening<'a>, Fault> {
        let sealed = blob.get(PREFIX_BYTES..).and_then(|rest| rest.split_at_checked(table_bytes));
        let Some((sealed_table, chunks)) = sealed else {
            return Err(Refused(format!("{table_bytes} bytes of table in {}", blob.len())).into());
        };
        let table = Table::open(cipher, number, sealed_table, blob.len())?;
        let needed = extents::count_data(&table.extents)?.checked_mul(grain_bytes);
        if needed != Some(table.payload_bytes() as u64) {
            return malformed(format!("segment {number} of {} has not the payload its extents need", cipher.name));
        }
        Ok(Opening { number, chunks, table })
    }

    /// Open the payload into `room`, which has the table's `payload_bytes`.
    pub fn write(&self, cipher: &Cipher, mut room: &mut [u8]) -> Result<(), Fault> {
        let mut chunks = self.chunks;
        for (index, row) in self.table.chunks.iter().enumerate() {
            let Some((sealed, rest)) = chunks.split_at_checked(row.sealed_bytes as usize) else {
                return Err(Refused("chunks that are longer than their segment".into()).into());
            };
            chunks = rest;
            let raw = take(&mut room, row.raw_bytes as usize)?;
            chunk::open(cipher, self.number, self::number(index)?, *row, sealed, raw)?;
        }
        Ok(same_length("what is left of the room for a payload", room.len(), 0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault::{Damaged, Malformed};

    const GRAIN: u64 = 4096;

    fn cipher() -> Cipher {
        Cipher::new(&[1; 32], &[2; 32], "x".into()).unwrap()
    }

    /// Bytes that do not compress.
    fn noise(length: usize, seed: u64) -> Vec<u8> {
        let mut out = vec![0; length];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    /// Bytes of a few words, which zstd makes about a third of.
    fn text(length: usize) -> Vec<u8> {
        let words = ["segment ", "chunk ", "extent ", "manifest\n", "of the delta, "];
        let pick = noise(length, 7);
        pick.iter().flat_map(|byte| words[usize::from(*byte) % 5].bytes()).take(length).collect()
    }

    fn rows(grains: u64) -> Vec<u8> {
        [9, grains.max(1), u64::from(grains > 0)].into_iter().flat_map(u64::to_le_bytes).collect()
    }

    fn sealed(payload: &[u8]) -> Vec<u8> {
        let rows = rows(payload.len() as u64 / GRAIN);
        let sealing = Sealing::new(3, 0, &rows, payload, 1).unwrap();
        let mut blob = vec![0; sealing.blob_bytes()];
        let digest = sealing.write(&cipher(), &mut blob).unwrap();
        assert_eq!(digest, *blake3::hash(&blob).as_bytes());
        blob
    }

    fn opened(blob: &[u8]) -> Result<(Table, Vec<u8>), Fault> {
        let table_bytes = numbers(&blob[4..8])[0] as usize;
        let opening = Opening::new(&cipher(), 3, blob, table_bytes, GRAIN)?;
        let mut payload = vec![0; opening.table.payload_bytes()];
        opening.write(&cipher(), &mut payload)?;
        Ok((opening.table, payload))
    }

    fn raw_and_flags(payload: &[u8]) -> Vec<(usize, u32)> {
        let (table, found) = opened(&sealed(payload)).unwrap();
        assert!(found == payload);
        table.chunks.iter().map(|row| (row.raw_bytes as usize >> 10, row.flags)).collect()
    }

    #[test]
    fn chunks_fit_the_data() {
        assert_eq!(raw_and_flags(&[]), []);
        assert_eq!(raw_and_flags(&noise(4096, 0)), [(4, 0)]);
        assert_eq!(raw_and_flags(&[7; 260 << 10]), [(64, 1), (128, 1), (68, 1)]);
        assert_eq!(raw_and_flags(&noise(132 << 10, 0)), [(32, 0), (32, 0), (32, 0), (32, 0), (4, 0)]);
        assert!(raw_and_flags(&text(1 << 20)).iter().all(|chunk| chunk.1 == 1));
        assert_eq!(sealed(&noise(RAW_BYTES, 0)).len(), 8 + 12 + 12 * 128 + 2 + 1 + 16 + RAW_BYTES + 128 * 16);
    }

    #[test]
    fn text_behind_noise_is_found_wherever_it_begins() {
        for grains in 1..20 {
            let payload = [noise(grains * 4096 + (64 << 10), 1), text(4096), noise(256 << 10, 2)].concat();
            assert!(raw_and_flags(&payload).contains(&(32, 1)), "{grains}");
        }
    }

    #[test]
    fn noise_that_repeats_is_found_before_long() {
        let page = noise(9 * 512, 3); // not the same 512 bytes of every 4 KiB
        let payload = [noise(64 << 10, 1), page.repeat(200)].concat();
        let unasked = raw_and_flags(&payload).iter().filter(|chunk| chunk.1 == 0).count();
        assert!((3..=18).contains(&unasked), "{unasked}");
    }

    #[test]
    fn every_flipped_bit_of_what_is_sealed_is_seen() {
        for payload in [noise(8192, 1), text(8192)] {
            let blob = sealed(&payload);
            for bit in (64..blob.len() * 8).step_by(13) {
                let mut other = blob.clone();
                other[bit / 8] ^= 1 << (bit % 8);
                assert!(matches!(opened(&other), Err(Damaged(_))), "{bit}");
            }
            for length in 8..blob.len() {
                assert!(matches!(opened(&blob[..length]), Err(Damaged(_) | Malformed(_) | Fault::Refused(_))));
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let payload = noise(4096, 1);
        let blob = sealed(&payload);
        let table_bytes = numbers(&blob[4..8])[0] as usize;
        let open = |blob, table_bytes, grain| Opening::new(&cipher(), 3, blob, table_bytes, grain).err();
        assert!(matches!(open(&blob, table_bytes, 512), Some(Malformed(_))));
        assert!(matches!(open(&blob, table_bytes, u64::MAX), Some(Malformed(_))));
        assert!(matches!(open(&blob, usize::MAX, GRAIN), Some(Fault::Refused(_))));
        assert!(matches!(open(&blob[..3], 0, GRAIN), Some(Fault::Refused(_))));
        assert!(Sealing::new(0, 0, &[], &payload, 1).is_err());
        assert!(Sealing::new(0, 0, &rows(1025), &noise(RAW_BYTES + 4096, 1), 1).is_err());
        let sealing = Sealing::new(0, 0, &rows(1), &payload, 1).unwrap();
        for length in [0, 8, sealing.blob_bytes() - 1, sealing.blob_bytes() + 1] {
            assert!(sealing.write(&cipher(), &mut vec![0; length]).is_err());
        }
    }

    #[test]
    fn only_possible_chunks_are_taken() {
        let row = |raw_bytes, flags, body: u32| Row { raw_bytes, flags, sealed_bytes: body + 16 };
        let good = [row(131072, 1, 32768), row(65536, 1, 1), row(32768, 1, 32767), row(32768, 0, 32768)];
        assert!(good.iter().all(|row| row.is_possible(false) && row.is_possible(true)));
        let last = [row(1, 0, 1), row(131071, 1, 9)];
        assert!(last.iter().all(|row| row.is_possible(true) && !row.is_possible(false)));
        let bad = [row(0, 0, 0), row(0, 1, 0), row(32768, 1, 32768), row(32768, 0, 32767), row(32768, 2, 9)];
        let too_large = [row(131073, 1, 9), row(65536, 0, 65536), row(65536, 1, 32769), row(512, 1, 0)];
        assert!(!bad.iter().chain(&too_large).any(|row| row.is_possible(true) || row.is_possible(false)));
        assert!(!Row { raw_bytes: 9, flags: 0, sealed_bytes: 9 }.is_possible(true));
    }
}
