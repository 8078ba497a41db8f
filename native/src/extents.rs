//! Tables of extents and their encoding.
//!
//! A row is (first grain, count, data), three 64-bit little-endian numbers; rows are
//! strictly ascending and never overlap, `count` is at least 1, and `data` is 1 where
//! the segment's payload has the grains, 0 where they are zero and 2 where their content
//! is lost. A row's payload begins where that of the data rows before it ends.
//!
//! Encoded, a row is two varints: the gap since the end of the row before it, and
//! `count << 1 | data`; a lost row has 1 there (data of no grain, which is nothing else)
//! and its count as a third. So every table has one encoding, and one without lost rows
//! the encoding it always had. Both directions check everything, so a table that exists is valid.
#![forbid(unsafe_code)]

use crate::error::{refuse, same_length, Result};
use crate::varint;

pub const ROW_BYTES: usize = 24;
/// What stands for `count << 1 | data` before the count of a lost row.
const LOST_MARK: u64 = 1;

/// What is known of an extent's grains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Zero,
    Data,
    Lost,
}

impl Kind {
    pub fn of(mark: u64) -> Result<Kind> {
        match mark {
            0 => Ok(Kind::Zero),
            1 => Ok(Kind::Data),
            2 => Ok(Kind::Lost),
            _ => refuse(format!("an extent whose data mark is {mark}")),
        }
    }

    pub fn mark(self) -> u64 {
        match self {
            Kind::Zero => 0,
            Kind::Data => 1,
            Kind::Lost => 2,
        }
    }
}

/// One extent; `first + count` never overflows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub first: u64,
    pub count: u64,
    pub kind: Kind,
}

impl Row {
    /// One past the last grain.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// The 64-bit numbers in little-endian `bytes`, in groups of `N`.
pub fn groups<const N: usize>(what: &str, bytes: &[u8]) -> Result<Vec<[u64; N]>> {
    same_length(what, bytes.len(), bytes.len() / (8 * N) * (8 * N))?;
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
    let group = |bytes: &[u8]| {
        let mut group = [0; N];
        for (to, from) in group.iter_mut().zip(bytes.chunks_exact(8)) {
            *to = number(from);
        }
        group
    };
    Ok(bytes.chunks_exact(8 * N).map(group).collect())
}

/// `row` if it may follow a row that ended at `end`.
fn check(row: [u64; 3], end: u64) -> Result<Row> {
    let [first, count, mark] = row;
    let kind = Kind::of(mark)?;
    if count == 0 || count > u64::MAX >> 1 || first.checked_add(count).is_none() {
        return refuse(format!("an extent of {count} grains at grain {first}"));
    }
    if first < end {
        return refuse(format!("an extent at grain {first} after one that ends at {end}"));
    }
    Ok(Row { first, count, kind })
}

/// The checked rows of a table in memory.
pub fn rows(bytes: &[u8]) -> Result<Vec<Row>> {
    let mut end = 0;
    let mut rows = Vec::with_capacity(bytes.len() / ROW_BYTES);
    for group in groups("rows", bytes)? {
        let row = check(group, end)?;
        end = row.end();
        rows.push(row);
    }
    Ok(rows)
}

/// Grains that a table in memory has data of.
pub fn count_data(table: &[u8]) -> Result<u64> {
    let data = rows(table)?.into_iter().filter(|row| row.kind == Kind::Data);
    Ok(data.fold(0, |sum: u64, row| sum.saturating_add(row.count)))
}

/// Encode a table in memory.
pub fn encode(table: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(table.len() / ROW_BYTES * 4);
    let mut end = 0;
    for row in rows(table)? {
        varint::put(&mut out, row.first - end);
        if row.kind == Kind::Lost {
            varint::put(&mut out, LOST_MARK);
            varint::put(&mut out, row.count);
        } else {
            varint::put(&mut out, row.count << 1 | row.kind.mark());
        }
        end = row.end();
    }
    Ok(out)
}

/// Decode into a table in memory of at most `max_rows` rows.
pub fn decode(mut encoded: &[u8], max_rows: usize) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(max_rows.min(encoded.len() / 2) * ROW_BYTES);
    let (mut end, mut count_rows) = (0u64, 0);
    while !encoded.is_empty() {
        if count_rows == max_rows {
            return refuse(format!("more than the {max_rows} extents that may be there"));
        }
        let (gap, rest) = varint::take(encoded)?;
        let (tail, rest) = varint::take(rest)?;
        let (count, mark, rest) = if tail == LOST_MARK {
            let (count, rest) = varint::take(rest)?;
            (count, Kind::Lost.mark(), rest)
        } else {
            (tail >> 1, tail & 1, rest)
        };
        let Some(first) = end.checked_add(gap) else {
            return refuse(format!("an extent {gap} grains after grain {end}"));
        };
        let row = check([first, count, mark], end)?;
        for number in [row.first, row.count, row.kind.mark()] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        end = row.end();
        count_rows += 1;
        encoded = rest;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[[u64; 3]]) -> Vec<u8> {
        rows.iter().flatten().flat_map(|number| number.to_le_bytes()).collect()
    }

    #[test]
    fn a_table_returns_and_has_the_documented_bytes() {
        let rows = table(&[[5, 1, 1], [6, 200, 0], [206, 200, 2], [1 << 40, (1 << 63) - 1, 1]]);
        let encoded = encode(&rows).unwrap();
        assert_eq!(encoded[..9], [5, 3, 0, 0x90, 0x03, 0, 1, 0xc8, 0x01]);
        assert_eq!(decode(&encoded, 4).unwrap(), rows);
        assert!(decode(&encoded, 3).is_err());
        assert!(decode(&[], 0).unwrap().is_empty());
        for length in 0..encoded.len() {
            assert!(decode(&encoded[..length], 4).map_or(true, |part| rows.starts_with(&part)));
        }
    }

    #[test]
    fn invalid_tables_are_refused() {
        for rows in [
            &[[0, 0, 1]][..],
            &[[0, 1, 3]],
            &[[0, 0, 2]],
            &[[0, 1 << 63, 2]],
            &[[0, 1 << 63, 0]],
            &[[u64::MAX, 1, 0]],
            &[[4, 2, 1], [5, 1, 1]],
            &[[4, 2, 1], [0, 1, 1]],
        ] {
            assert!(encode(&table(rows)).is_err(), "{rows:?}");
        }
        assert!(encode(&[0; 23]).is_err());
        assert!(decode(&[0, 0], 9).is_err(), "an empty extent");
        assert!(decode(&[0], 9).is_err(), "half a row");
        assert!(decode(&[0, 1], 9).is_err(), "a lost row without its count");
        assert!(decode(&[0, 1, 0], 9).is_err(), "an empty lost row");
        let far = [[0xff; 9].as_slice(), &[1, 2]].concat();
        assert!(decode(&far, 9).is_err(), "past the last grain");
    }
}
